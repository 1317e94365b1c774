"""The paper's random projection: its mean over seeds, the noise that its square carries, and the estimate without it."""

from __future__ import annotations

import pytest
import torch
from curvature_reference import completions, explicit_gradients, flat, tiny

from lox_merge.diagnostics.curvature.gram import fisher_gram
from lox_merge.diagnostics.curvature.products import products_with
from lox_merge.diagnostics.curvature.projection import Projection
from lox_merge.diagnostics.curvature.sites import find_sites
from lox_merge.maths.fisher import overlap_scores
from lox_merge.maths.rademacher import add_projection, projected_scores, signs

K = 32


def test_signs_are_fair_and_the_same_everywhere() -> None:
    first = signs(64, 100, "layer.weight", 3, 7)
    assert torch.equal(first, signs(64, 100, "layer.weight", 3, 7)) and set(first.unique().tolist()) == {-1.0, 1.0}
    assert not torch.equal(first, signs(64, 100, "layer.weight", 4, 7)) and not torch.equal(first, signs(64, 100, "other.weight", 3, 7))
    assert abs(float(first.mean())) < 0.04  # 6,400 fair coins: 3 standard deviations


def test_over_200_seeds_the_unbiased_score_is_the_exact_one_and_the_papers_is_above_it_as_derived() -> None:
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(5, 6, 8, generator=generator, dtype=torch.float64)
    change = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    products = (gradients * change).sum((1, 2))
    exact = float(products.square().mean())
    squares, size = (gradients**2).sum((1, 2)), float((change**2).sum())
    bias = float((squares * size + products**2 - 2 * (gradients**2 * change**2).sum((1, 2))).mean()) / K
    plain, unbiased = [], []
    for seed in range(200):
        ours, its = torch.zeros(5, K, dtype=torch.float64), torch.zeros(1, K, dtype=torch.float64)
        add_projection(ours, gradients, "w", 0, seed)
        add_projection(its, change[None], "w", 0, seed)
        found = projected_scores(ours, its[0])
        plain.append(found[0])
        unbiased.append(found[1])
    scores = torch.tensor([plain, unbiased], dtype=torch.float64)
    errors = scores.std(1) / 200**0.5
    assert abs(float(scores[1].mean()) - exact) < 3 * float(errors[1])
    assert abs(float(scores[0].mean()) - exact - bias) < 3 * float(errors[0])
    assert bias > 6 * float(errors[0])  # so the paper's score is not unbiased, and this test would see it


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_blocks_and_layouts_of_a_model_give_the_projection_of_the_whole_matrix(architecture: str) -> None:
    model, examples = tiny(architecture), completions()
    projection = Projection(find_sites(model)[0], K, (0, 1))
    fisher_gram(model, examples, memory=200_000, rows_seen=projection.rows_seen, wanted=lambda name: "1." in name)
    explicit = explicit_gradients(model, examples)
    # Experts and linear layers, no router, norm or embedding.
    assert projection.names and not any("norm" in name or "gate.weight" in name or "router" in name for name in projection.names)
    for name in projection.names:
        parameter = model.get_parameter(name)
        change = torch.randn_like(parameter)
        found = projection.scores(name, change)
        flipped = architecture == "gpt2" or (architecture == "gpt_oss" and "experts" in name)
        gradients = torch.stack([one[name].transpose(-1, -2) if flipped else one[name] for one in explicit])
        rows = gradients.reshape(len(examples), -1, gradients.shape[-1])
        whole = torch.cat([signs(K, rows.shape[2], name, row, 1) for row in range(rows.shape[1])], 1).double()
        moved = (change.transpose(-1, -2) if flipped else change).reshape(-1)
        expected = projected_scores(rows.flatten(1) @ whole.T, whole @ moved)
        assert found["plain"][1] == pytest.approx(expected[0], rel=1e-4)
        assert found["unbiased"][1] == pytest.approx(expected[1], rel=1e-3, abs=1e-5 * abs(expected[0]))


def test_enough_dimensions_come_near_the_exact_score() -> None:
    model, examples = tiny("llama"), completions()
    name = "model.layers.0.mlp.up_proj.weight"
    projection = Projection(find_sites(model)[0], 4096, (0,))
    gram = fisher_gram(model, examples, wanted=lambda other: other == name, rows_seen=projection.rows_seen)
    change = flat(explicit_gradients(model, examples), (name,)).sum(0).view_as(model.get_parameter(name))
    exact = float(overlap_scores(products_with(model, examples, gram, [{name: change}])[name][0]))
    assert projection.scores(name, change)["plain"][0] == pytest.approx(exact, rel=0.1)
