"""The maths of the projection filter against float64 numpy, its identities, and the law of its random control."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lox_merge.errors import NumericalError
from lox_merge.maths.directions import (
    Directions,
    needs_dense,
    random_directions,
    random_k_directions,
    rank_of_fraction,
    top_directions,
)
from lox_merge.maths.filter import filter_matrix, project_by_delta, project_on, write_filtered, write_merged

SHAPES = [(24, 40), (40, 24), (33, 33), (1, 17), (17, 1)]
Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def triple(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Triple:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    aligned = base + 0.1 * torch.randn(shape, generator=generator)
    finetuned = aligned + 0.05 * torch.randn(shape, generator=generator)
    return base.to(dtype), aligned.to(dtype), finetuned.to(dtype)


def projector(delta: np.ndarray, k: int, side: str) -> np.ndarray:
    left, _, right = np.linalg.svd(delta, full_matrices=False)
    basis = left[:, :k] if side == "left" else right[:k].T
    return basis @ basis.T


def exact(models: Triple, k: int, mode: str, side: str) -> np.ndarray:
    base, aligned, finetuned = (model.double().numpy() for model in models)
    change, p = finetuned - aligned, projector(aligned - base, k, side)
    inside = p @ change if side == "left" else change @ p
    return aligned + inside if mode == "parallel" else aligned + change - inside


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["parallel", "orthogonal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula_in_float64(shape: tuple[int, int], mode: str, side: str) -> None:
    models = triple(shape)
    for k in {1, max(1, min(shape) // 3), min(shape)}:
        found = filter_matrix(*models, k, mode, side=side)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.numpy(), exact(models, k, mode, side), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("shape", "k"), [((200, 300), 5), ((200, 300), 150), ((300, 200), 150), ((300, 200), 198)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_way_to_the_directions_gives_the_same_projection(shape: tuple[int, int], k: int, side: str) -> None:
    models = triple(shape, seed=1)
    delta = models[1] - models[0]
    found = top_directions(delta, k, side, tolerance=1e-5)  # type: ignore[arg-type]
    assert found.method == ("gram" if needs_dense(*shape, k) else "lanczos") and found.dense == (k > 100)
    p = projector(delta.double().numpy(), k, side)
    own = found.vectors.double()
    # Where σ_k is close to σ_{k+1} the span itself is known to a few digits only.
    np.testing.assert_allclose((own @ own.T).numpy(), p, rtol=0, atol=2e-3 if k == 5 else 2e-5)
    torch.testing.assert_close(own.T @ own, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-5)
    assert found.certificate is not None and found.certificate.residual < 1e-3


@pytest.mark.parametrize("basis", ["top", "random-k", "random"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_two_modes_share_out_the_update(shape: tuple[int, int], basis: str) -> None:
    models = triple(shape, seed=2)
    k = max(1, min(shape) // 2)
    parallel, orthogonal = (filter_matrix(*models, k, mode, basis=basis, seed=4) - models[1] for mode in ("parallel", "orthogonal"))  # type: ignore[arg-type]
    torch.testing.assert_close(parallel + orthogonal, models[2] - models[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("basis", ["top", "random-k", "random"])
@pytest.mark.parametrize("mode", ["parallel", "orthogonal"])
def test_filtering_twice_changes_nothing(basis: str, mode: str) -> None:
    base, aligned, finetuned = triple((30, 50), seed=3)
    once = filter_matrix(base, aligned, finetuned, 9, mode, basis=basis, seed=1)  # type: ignore[arg-type]
    twice = filter_matrix(base, aligned, once, 9, mode, basis=basis, seed=1)  # type: ignore[arg-type]
    torch.testing.assert_close(twice, once, rtol=0, atol=2e-6)
    assert float((once - finetuned).norm()) > 0.1 * float((finetuned - aligned).norm())


def test_all_directions_keep_everything() -> None:
    base, aligned, finetuned = triple((20, 35))  # with d_out ≤ d_in the left vectors span the whole output space
    torch.testing.assert_close(filter_matrix(base, aligned, finetuned, 20, "parallel"), finetuned, rtol=0, atol=2e-6)
    torch.testing.assert_close(filter_matrix(base, aligned, finetuned, 20, "orthogonal"), aligned, rtol=0, atol=2e-6)
    change = finetuned - aligned
    assert project_on(top_directions(aligned - base, 20), change).kept == pytest.approx(1.0, abs=1e-6)


def test_a_vector_is_projected_on_the_alignment_delta() -> None:
    base, aligned, finetuned = (model.reshape(-1) for model in triple((17, 1)))
    v, u = (aligned - base).double(), (finetuned - aligned).double()
    expected = aligned.double() + (u @ v) / (v @ v) * v
    found = filter_matrix(base[:, None], aligned[:, None], finetuned[:, None], 1, "parallel")
    torch.testing.assert_close(found[:, 0].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 30), (17, 1), (200, 220)])
def test_a_zero_alignment_delta_gives_nothing(shape: tuple[int, int]) -> None:
    _, aligned, finetuned = triple(shape)
    k = max(1, min(shape) // 2)
    assert torch.equal(filter_matrix(aligned, aligned, finetuned, k, "parallel"), aligned)
    assert torch.equal(filter_matrix(aligned, aligned, finetuned, k, "orthogonal"), finetuned)
    found = project_on(top_directions(torch.zeros(shape), k), finetuned - aligned)
    assert (found.norm, found.kept, found.cosine) == (0.0, 0.0, None)


def test_directions_that_do_not_exist_are_not_made_up() -> None:
    low = torch.randn(150, 3) @ torch.randn(3, 180)
    for rank, seed in ((100, 0), (5, 1)):
        assert top_directions(low, rank).rank == 3
        assert random_k_directions(low, rank, seed=seed).rank == 3


def test_ratios_and_their_random_expectation() -> None:
    base, aligned, finetuned = triple((40, 60), seed=5)
    change = finetuned - aligned
    found = project_on(top_directions(aligned - base, 10), change)
    inside = projector((aligned - base).double().numpy(), 10, "left") @ change.double().numpy()
    assert found.kept == pytest.approx(np.linalg.norm(inside) / np.linalg.norm(change.double().numpy()), rel=1e-5)
    assert found.cosine == found.kept and found.kept_random == math.sqrt(10 / 40)
    assert project_on(top_directions(aligned - base, 10, "right"), change, "right").kept_random == math.sqrt(10 / 60)
    squares = [project_on(random_directions(40, 10, seed=seed), change).kept ** 2 for seed in range(400)]  # type: ignore[operator]
    error = np.std(squares) / math.sqrt(len(squares))
    assert abs(np.mean(squares) - 10 / 40) < 3 * error


def test_the_random_basis_has_the_law_of_a_gaussian_matrix() -> None:
    """Of a Haar subspace the projection of a fixed unit vector has squared length Beta(k/2, (d−k)/2): both ways are held to its moments."""
    d, k, draws = 12, 4, 3000
    direction = torch.zeros(d)
    direction[3] = 1.0
    mean, second = k / d, k * (k + 2) / (d * (d + 2))

    def of_svd(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.linalg.svd(torch.randn(d, d, generator=generator)).U[:, :k]

    for draw in (lambda seed: random_directions(d, k, seed=seed).vectors, of_svd):
        lengths = torch.tensor([float((draw(seed).T @ direction).square().sum()) for seed in range(draws)], dtype=torch.float64)
        for power, expected in ((1, mean), (2, second)):
            values = lengths**power
            assert abs(float(values.mean()) - expected) < 3.5 * float(values.std()) / math.sqrt(draws)
    signs = torch.stack([random_directions(d, 1, seed=seed).vectors[:, 0] for seed in range(draws)])
    outer = (signs[:, :, None] * signs[:, None, :]).mean(0)
    torch.testing.assert_close(outer, torch.eye(d) / d, rtol=0, atol=4.5 * math.sqrt(2) / d / math.sqrt(draws))


def test_random_k_draws_from_the_singular_directions_without_replacement() -> None:
    delta = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    left = torch.linalg.svd(delta.double()).U
    counts = torch.zeros(12)
    for seed in range(600):
        found = random_k_directions(delta, 5, seed=seed)
        overlap = (left.T @ found.vectors.double()).abs()
        chosen = (overlap > 0.999).any(1)
        assert int(chosen.sum()) == 5
        counts += chosen
    expected, spread = 600 * 5 / 12, math.sqrt(600 * 5 / 12 * 7 / 12)
    assert ((counts - expected).abs() < 4 * spread).all()
    assert torch.equal(random_k_directions(delta, 5, seed=7).vectors, random_k_directions(delta, 5, seed=7).vectors)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_published_safe_lora_projector(shape: tuple[int, int], side: str) -> None:
    base, aligned, finetuned = triple(shape, seed=6)
    delta, change = (aligned - base).double().numpy(), (finetuned - aligned).double().numpy()
    c = delta @ delta.T if side == "left" else delta.T @ delta
    inside = (c @ change if side == "left" else change @ c) / np.linalg.norm(delta)
    found = project_by_delta(aligned - base, finetuned - aligned, side)  # type: ignore[arg-type]
    written, _ = write_filtered(aligned, finetuned, found)
    np.testing.assert_allclose(written.double().numpy(), aligned.double().numpy() + inside, rtol=0, atol=5e-6)
    cosine = (inside * change).sum() / np.linalg.norm(inside) / np.linalg.norm(change)
    assert found.cosine == pytest.approx(cosine, rel=1e-5) and found.kept_random is None
    assert project_by_delta(torch.zeros(shape), finetuned - aligned, side).cosine is None  # type: ignore[arg-type]


def test_merging_takes_a_share_of_the_update() -> None:
    _, aligned, finetuned = triple((20, 30), seed=7)
    merged, realised = write_merged(aligned, finetuned - aligned, 0.2)
    torch.testing.assert_close(merged, 0.2 * aligned + 0.8 * finetuned, rtol=0, atol=1e-6)
    assert realised.gain == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("mode", ["parallel", "orthogonal"])
def test_feedback_rounding_restores_the_gain(mode: str) -> None:
    base, aligned, finetuned = triple((128, 96), seed=8)
    aligned = (base + 0.002 * (aligned - base)).bfloat16()
    finetuned = (aligned.float() + 0.02 * (finetuned - finetuned.mean())).bfloat16()
    found = project_on(top_directions(aligned.float() - base, 12), finetuned.float() - aligned.float())
    gains = {}
    for rounding in ("nearest", "feedback", "stochastic"):
        out, realised = write_filtered(aligned, finetuned, found, mode, rounding=rounding, seed=1)  # type: ignore[arg-type]
        start = aligned if mode == "parallel" else finetuned
        kept = (out.double() - start.double()).numpy()
        intended = (found.update.left @ found.update.right.T).double().numpy() * (1 if mode == "parallel" else -1)  # type: ignore[operator, union-attr]
        gains[rounding] = (kept * intended).sum() / (intended**2).sum()
        assert realised.gain == pytest.approx(gains[rounding], abs=1e-3)
    assert abs(gains["feedback"] - 1) < 0.01 and abs(gains["stochastic"] - 1) < 0.05


def test_layout_and_dtype_do_not_matter() -> None:
    base, aligned, finetuned = triple((24, 30))
    turned = [model.T.contiguous().T for model in (base, aligned, finetuned)]
    torch.testing.assert_close(filter_matrix(*turned, 5), filter_matrix(base, aligned, finetuned, 5), rtol=0, atol=1e-6)
    low = [model.bfloat16() for model in (base, aligned, finetuned)]
    assert filter_matrix(*low, 5).dtype == torch.bfloat16 and filter_matrix(*low, 5, dtype=torch.float32).dtype == torch.float32


def test_rank_of_a_fraction() -> None:
    assert [rank_of_fraction(fraction, 40) for fraction in (0.001, 0.07, 0.25, 0.5, 0.99)] == [1, 3, 10, 20, 40]
    assert rank_of_fraction(0.29, 100) == 29  # 100 * 0.29 is 28.999…


def test_broken_deltas_are_refused() -> None:
    delta = torch.ones(150, 160)
    delta[2, 3] = float("nan")
    for find in (lambda: top_directions(delta, 140), lambda: random_k_directions(delta, 3), lambda: top_directions(delta, 3)):
        with pytest.raises(NumericalError, match="NaN or Inf"):
            find()
    assert isinstance(random_directions(5, 9), Directions) and random_directions(5, 9).rank == 5
