"""Terms of an update, leading and random, and the weights in memory that they give: the definition's, and aligned's own at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from reference import lox_tensor
from test_rank_model import Case, assert_same, case
from tiny_models import read_tensors
from transformers import AutoModelForCausalLM

from lox_merge.maths.spectral import truncated_svd
from lox_merge.maths.terms import Terms, haar_columns, leading_terms, random_subspace_terms, random_terms
from lox_merge.safety.rank_edits import REMOVAL, THETA, DecomposedMatrix, random_removal
from lox_merge.safety.rank_model import RankSwapper


def dense(terms: Terms, rank: int) -> torch.Tensor:
    update = terms.first(rank)
    assert update.left is not None and update.right is not None
    return update.left.double() @ update.right.double().T


@pytest.fixture(scope="module")
def delta() -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(24, 6) @ torch.diag(torch.tensor([9.0, 5, 3, 2, 1, 0.5])) @ torch.randn(6, 40)


def test_terms_of_every_kind_have_the_norm_of_the_leading_ones_at_every_rank(delta: torch.Tensor) -> None:
    subspace = truncated_svd(delta, 6)
    values = torch.linalg.svdvals(delta.double())
    kinds = (
        leading_terms(subspace),
        random_terms((24, 40), subspace.singular_values, seed=1),
        random_subspace_terms(delta, subspace.singular_values, seed=1),
    )
    for terms in kinds:
        assert float(dense(terms, 0).norm()) == 0
        for rank in (1, 2, 5, 6):
            assert float(dense(terms, rank).norm()) == pytest.approx(float(values[:rank].norm()), rel=1e-5)
        assert torch.equal(dense(terms, 99), dense(terms, 6))  # a matrix has no more directions than it has
    leading, random, mixed = kinds
    torch.testing.assert_close(dense(leading, 6), delta.double(), rtol=0, atol=1e-4)
    # Random terms are terms with the delta's singular values, in other directions; nested as the delta's are.
    torch.testing.assert_close(torch.linalg.svdvals(dense(random, 6))[:6], values[:6], rtol=1e-5, atol=1e-5)
    assert abs(float((dense(random, 6) * delta).sum() / delta.norm() ** 2)) < 0.3
    difference = dense(random, 3) - dense(random, 2)
    assert torch.linalg.matrix_rank(difference.float()) == 1 and float(difference.norm()) == pytest.approx(float(values[2]), rel=1e-5)
    # Rows of the mixed kind are mixtures of the delta's own rows.
    rows = torch.linalg.svd(delta.double(), full_matrices=False).Vh[:6]
    torch.testing.assert_close(dense(mixed, 4) @ rows.T @ rows, dense(mixed, 4), rtol=0, atol=1e-4)


def test_random_columns_are_orthonormal_seeded_and_of_either_sign() -> None:
    columns = haar_columns(30, 5, seed=7)
    torch.testing.assert_close(columns.T @ columns, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(haar_columns(30, 8, seed=7)[:, :5], columns, rtol=0, atol=1e-12)
    assert not torch.equal(haar_columns(30, 5, seed=8), columns) and haar_columns(30, 0, seed=7).shape == (30, 0)
    # A Householder QR alone gives the first entry one sign only.
    assert {bool(haar_columns(9, 1, seed=seed)[0, 0] > 0) for seed in range(20)} == {True, False}


def test_terms_of_a_zero_delta_change_nothing() -> None:
    zero, none = torch.zeros(4, 5), torch.zeros(0, dtype=torch.float64)
    assert torch.equal(dense(random_terms((4, 5), none, seed=0), 3), zero.double())
    assert torch.equal(dense(random_subspace_terms(zero, none, seed=0), 3), zero.double())


def loaded_from(folder: Path, made: Case, exact: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that transformers reads from a checkpoint of these tensors: names and fusions are not ours to get right."""
    from safetensors.torch import save_file

    folder.mkdir()
    save_file(exact, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((made.aligned / "config.json").read_bytes())
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return state


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mixtral", "gpt_oss"])
def test_weights_equal_the_definition_in_float64(tmp_path: Path, architecture: str) -> None:
    """W_align - Proj_k(W_align - W_base), and at rank 0 aligned itself bit for bit."""
    made = case(tmp_path / "pair", architecture)
    original = made.weights()
    with RankSwapper(made.model, made.plan, made.factors, edit=REMOVAL) as swapper:
        swapper.set_rank(0)
        assert_same(made.weights(), original)
        swapper.set_rank(3)
        changed = made.weights()
    assert_same(made.weights(), original)
    before, after = read_tensors(made.base), read_tensors(made.aligned)
    exact = {name: lox_tensor(name, before[name], values, 3, -1.0, gpt_oss=architecture == "gpt_oss").float() for name, values in after.items()}
    expected = loaded_from(tmp_path / "reference", made, exact)
    assert changed.keys() == expected.keys()
    for name, value in changed.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-6 * float(expected[name].abs().max() + 1), msg=name)
    assert any(not torch.equal(value, original[name]) for name, value in changed.items())


@pytest.mark.parametrize("kind", ["random", "random-subspace"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_random_directions_change_every_parameter_as_much(tmp_path: Path, architecture: str, kind: Any) -> None:
    made = case(tmp_path, architecture)
    original = made.weights()

    def changes(edit: Any) -> dict[str, torch.Tensor]:
        swapper.use(edit)
        swapper.set_rank(2)
        return {name: value.double() - original[name].double() for name, value in made.weights().items() if value.ndim > 1}

    with RankSwapper(made.model, made.plan, made.factors, edit=REMOVAL) as swapper:
        leading, drawn, other, again = (changes(edit) for edit in (REMOVAL, *(random_removal(kind, seed, 0) for seed in (0, 1, 0))))
        with pytest.raises(ValueError, match="cannot follow"):
            swapper.use(THETA)
    assert_same(made.weights(), original)
    for name, change in leading.items():
        assert float(drawn[name].norm()) == pytest.approx(float(change.norm()), rel=1e-4) and float(change.norm()) > 0
        assert not torch.allclose(drawn[name], change, atol=1e-3 * float(change.abs().max()))
        assert torch.equal(drawn[name], again[name]) and not torch.equal(drawn[name], other[name])
    # No two matrices of a shape get the same directions: the same ones would span the same outputs, or inputs.
    first, second = ([change for name, change in drawn.items() if f".{layer}." in name and change.ndim == 2] for layer in (0, 1))
    assert first and all(overlap(one, other) < 0.99 and overlap(one.T, other.T) < 0.99 for one, other in zip(first, second, strict=True))


def overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of the two leading left singular vectors of each, in [0, 1]."""
    first, second = (torch.linalg.svd(matrix, full_matrices=False).U[:, :2] for matrix in (one, other))
    return float((first.T @ second).square().sum()) / 2


def test_output_directions_are_those_of_the_layer_however_it_is_stored(delta: torch.Tensor) -> None:
    edit, subspace = random_removal("random-subspace", 0, 0), truncated_svd(delta, 6)
    stored = edit.terms(DecomposedMatrix("w", (24, 40), False, subspace, lambda: delta))
    turned = edit.terms(DecomposedMatrix("w", (40, 24), True, subspace, lambda: delta.T.contiguous()))
    for rank in (1, 4):
        torch.testing.assert_close(dense(turned, rank).T, dense(stored, rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_what_rounding_leaves_of_a_small_change_is_measured(tmp_path: Path, architecture: str) -> None:
    made = case(tmp_path, architecture, torch.bfloat16)
    original = made.weights()
    swapper = RankSwapper(made.model, made.plan, made.factors, edit=REMOVAL)
    assert swapper.realised_gain() is None
    swapper.set_rank(2)
    gain = swapper.realised_gain()
    rounded = {name: value.double() - original[name].double() for name, value in made.weights().items()}
    wide = AutoModelForCausalLM.from_pretrained(made.aligned, dtype=torch.float32)
    unrounded = {name: value.double().clone() for name, value in wide.state_dict().items()}
    exact = RankSwapper(wide, made.plan, made.factors, edit=REMOVAL)
    exact.set_rank(2)
    assert exact.realised_gain() is None
    intended = {name: value.double() - unrounded[name] for name, value in wide.state_dict().items()}
    product = sum(float((rounded[name] * change).sum()) for name, change in intended.items())
    assert gain == pytest.approx(product / sum(float(change.square().sum()) for change in intended.values()), rel=1e-4)
