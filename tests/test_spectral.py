"""Truncated SVD against a full SVD in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lox_merge.errors import LoxMergeWarning, NumericalError
from lox_merge.maths import lanczos, parse_rank, truncated_svd
from lox_merge.maths.precision import frobenius_norm, rounding_noise_edge

SHAPES = [(200, 300), (300, 200), (257, 1000), (1000, 257), (64, 90), (1, 50), (50, 1), (129, 2000)]


def matrix_with(values: torch.Tensor, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A float32 matrix whose singular values are `values` to float32 rounding."""
    generator = torch.Generator().manual_seed(seed)
    count = min(rows, columns, len(values))
    left = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64)).Q
    return ((left * values[:count]) @ right.T).float()


def spectrum(kind: str, count: int) -> torch.Tensor:
    index = torch.arange(1, count + 1, dtype=torch.float64)
    return {"power law": index**-0.8, "slow decay": index**-0.3, "steep": 0.3**index, "scaled down": 1e-6 * index**-0.8}[kind]


def noisy(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Three weak directions under a bulk of noise, as a delta of rounded weights looks."""
    generator = torch.Generator().manual_seed(seed)
    bulk = torch.randn(rows, columns, generator=generator) / (math.sqrt(rows) + math.sqrt(columns))
    return matrix_with(torch.tensor([1.6, 1.4, 1.3], dtype=torch.float64), rows, columns, seed) + bulk


def reference(matrix: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (left[:, :k] * values[:k]) @ right[:k], values


@pytest.mark.parametrize("kind", ["power law", "slow decay", "steep", "scaled down"])
@pytest.mark.parametrize("shape", SHAPES)
def test_projection_equals_full_svd(shape: tuple[int, int], kind: str) -> None:
    matrix = matrix_with(spectrum(kind, min(shape)), *shape)
    found = truncated_svd(matrix, 6)
    k = min(6, *shape)
    assert found.rank == k
    expected, values = reference(matrix, k)
    assert (found.low_rank() - expected).norm() <= 1e-3 * expected.norm()
    torch.testing.assert_close(found.singular_values, values[:k], rtol=1e-5, atol=0)
    eye = torch.eye(k)
    torch.testing.assert_close(found.left.T @ found.left, eye, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.right.T @ found.right, eye, rtol=0, atol=2e-5)
    assert found.norm == pytest.approx(float(values.norm()), rel=1e-6)
    assert found.alignment_ratio == pytest.approx(float(values[:k].norm() / values.norm()), rel=1e-5)


@pytest.mark.parametrize("shape", [(300, 260), (260, 900), (700, 200)])
def test_noise_bulk_keeps_the_energy_and_says_that_the_span_is_ambiguous(shape: tuple[int, int]) -> None:
    matrix = noisy(*shape)
    found = truncated_svd(matrix, 12)
    _, values = reference(matrix, 12)
    assert found.certificate.method == "lanczos"
    assert float(found.singular_values.norm()) == pytest.approx(float(values[:12].norm()), rel=1e-5)
    clear = truncated_svd(matrix, 2)
    assert not clear.certificate.ambiguous


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (100, 120)])
def test_certificate_bounds_the_true_error(shape: tuple[int, int]) -> None:
    for kind in ("power law", "slow decay"):
        matrix = matrix_with(spectrum(kind, min(shape)), *shape)
        found = truncated_svd(matrix, 5, tolerance=0.3)  # loose, so that there is an error to bound
        expected, values = reference(matrix, 5)
        bound = found.certificate.projection_error_bound
        assert bound is not None
        assert float((found.low_rank() - expected).norm()) <= 1.05 * bound + 1e-5 * float(values[0])
        assert found.certificate.next_singular_value == pytest.approx(float(values[5]), rel=0.1)


def test_exact_tie_is_ambiguous_but_its_energy_is_right() -> None:
    for side in (100, 300):  # exact path and Lanczos
        values = torch.tensor([8.0, 7, 6, 5, 4, 3, 3, 2, 1], dtype=torch.float64)
        found = truncated_svd(matrix_with(values, side, side + 20), 6)
        assert found.certificate.ambiguous
        assert float(found.singular_values.norm()) == pytest.approx(float(values[:6].norm()), rel=1e-5)
        assert not truncated_svd(matrix_with(values, side, side + 20), 5).certificate.ambiguous


def test_zero_delta_has_no_direction_and_undefined_ratios() -> None:
    for shape in ((40, 30), (400, 300), (1, 7), (0, 5)):
        found = truncated_svd(torch.zeros(shape), 6)
        assert found.rank == 0 and found.norm == 0
        assert found.alignment_ratio is None and found.energy_ratio is None
        assert found.low_rank().shape == shape


@pytest.mark.parametrize("side", [90, 300])
def test_directions_that_do_not_exist_are_dropped(side: int) -> None:
    found = truncated_svd(matrix_with(torch.tensor([2.0, 1.0], dtype=torch.float64), side, side + 10), 6)
    assert found.rank == 2
    assert found.alignment_ratio == pytest.approx(1.0, abs=1e-6)


def test_rank_above_the_short_side_is_everything() -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    found = truncated_svd(matrix, 500)
    assert found.rank == 20
    torch.testing.assert_close(found.low_rank(), matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_entries_are_counted(value: float) -> None:
    matrix = torch.ones(200, 300)
    matrix[3, 4] = matrix[7, 8] = value
    with pytest.raises(NumericalError, match="2 NaN or Inf"):
        truncated_svd(matrix, 6)


@pytest.mark.parametrize("shape", [(90, 300), (300, 260)])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_energy_rule_takes_the_fewest_directions(shape: tuple[int, int], share: float) -> None:
    matrix = matrix_with(spectrum("power law", min(shape)), *shape)
    values = torch.linalg.svdvals(matrix.double())
    cumulative = torch.cumsum(values.square(), 0) / values.square().sum()
    expected = int((cumulative >= share).to(torch.uint8).argmax()) + 1
    assert truncated_svd(matrix, parse_rank(f"energy:{share}")).rank == expected


@pytest.mark.parametrize("planted", [0, 3])
def test_noise_floor_counts_what_stands_above_rounding(planted: int) -> None:
    generator = torch.Generator().manual_seed(1)
    base = (torch.randn(400, 300, generator=generator) * 0.02).bfloat16()
    signal = matrix_with(torch.tensor([0.6, 0.5, 0.4][:planted] or [0.0], dtype=torch.float64), 400, 300)
    # Changes far below one unit in the last place: beside the planted directions only rounding noise is stored.
    aligned = (base.float() + signal + torch.randn(400, 300, generator=generator) * 1e-5).bfloat16()
    edge = rounding_noise_edge(aligned)
    found = truncated_svd(aligned.float() - base.float(), parse_rank("noise-floor"), noise_edge=edge)
    values = torch.linalg.svdvals(aligned.double() - base.double())
    assert found.rank == int((values > edge).sum())
    # Where the signal is below one unit in the last place its rounding is uneven: a few directions may pass the edge.
    assert planted <= found.rank <= planted + 3


def test_rounding_noise_edge_predicts_the_largest_noise_singular_value() -> None:
    weights = torch.randn(600, 400, generator=torch.Generator().manual_seed(0)) * 0.02
    stored = weights.bfloat16()
    largest = float(torch.linalg.svdvals(stored.double() - weights.double())[0])
    edge = rounding_noise_edge(stored)
    assert largest <= edge <= 1.03 * largest


def test_large_share_takes_the_dense_path_and_is_exact() -> None:
    matrix = matrix_with(spectrum("slow decay", 200), 200, 240)
    found = truncated_svd(matrix, parse_rank("50%"))
    expected, _ = reference(matrix, 100)
    assert found.certificate.method == "gram" and found.rank == 100
    assert (found.low_rank() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("rule", ["energy:0.95", "noise-floor"])
def test_rules_that_want_many_directions_take_the_dense_path_without_a_warning(rule: str) -> None:
    matrix = noisy(260, 900)
    found = truncated_svd(matrix, parse_rank(rule), noise_edge=0.5)
    values = torch.linalg.svdvals(matrix.double())
    shares = torch.cumsum(values.square(), 0) / values.square().sum()
    expected = int((values > 0.5).sum()) if rule == "noise-floor" else int((shares >= 0.95).to(torch.uint8).argmax()) + 1
    assert found.rank == expected > 0.2 * 260
    assert found.certificate.method == "gram"


def test_no_convergence_falls_back_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanczos, "LARGEST_PASSES", 2)
    matrix = matrix_with(spectrum("slow decay", 300), 300, 320)
    with pytest.warns(LoxMergeWarning, match="did not converge"):
        found = truncated_svd(matrix, 6, tolerance=1e-6)
    expected, _ = reference(matrix, 6)
    assert found.certificate.method == "gram"
    assert (found.low_rank() - expected).norm() <= 1e-6 * expected.norm()


def test_many_restarts_reach_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanczos, "BASIS", 80)
    matrix = noisy(500, 600)
    found = truncated_svd(matrix, 4, tolerance=1e-4)
    _, values = reference(matrix, 4)
    assert found.certificate.method == "lanczos"
    torch.testing.assert_close(found.singular_values, values[:4], rtol=1e-6, atol=0)


def test_memory_layout_and_threads_do_not_matter() -> None:
    matrix = matrix_with(spectrum("power law", 260), 260, 300)
    one = truncated_svd(matrix, 6)
    transposed = truncated_svd(matrix.T.contiguous().T, 6)
    torch.testing.assert_close(one.low_rank(), transposed.low_rank(), rtol=0, atol=1e-5)
    again = truncated_svd(matrix, 6)
    assert torch.equal(one.left, again.left) and torch.equal(one.right, again.right)


def test_truncate_equals_asking_for_less() -> None:
    matrix = matrix_with(spectrum("power law", 300), 300, 320)
    eight, three = truncated_svd(matrix, 8), truncated_svd(matrix, 3)
    cut = eight.truncate(3)
    assert (cut.low_rank() - three.low_rank()).norm() <= 1e-3 * three.low_rank().norm()
    assert cut.certificate.next_singular_value == pytest.approx(float(eight.singular_values[3]))
    assert eight.truncate(8) is eight
    assert eight.truncate(0).low_rank().abs().max() == 0
    with pytest.raises(ValueError, match="rank 8 to rank 9"):
        eight.truncate(9)


def test_projection_is_idempotent_and_of_delta_itself_is_low_rank() -> None:
    matrix = matrix_with(spectrum("power law", 80), 80, 100)
    found = truncated_svd(matrix, 6)
    for side in ("left", "right"):
        torch.testing.assert_close(found.project(matrix, side), found.low_rank(), rtol=0, atol=1e-5)
        other = torch.randn(80, 100, generator=torch.Generator().manual_seed(3))
        once = found.project(other, side)
        torch.testing.assert_close(found.project(once, side), once, rtol=0, atol=1e-5)


def test_norm_does_not_drift() -> None:
    matrix = torch.full((4096, 4096), 1e-3)
    assert frobenius_norm(matrix) == pytest.approx(4.096, rel=2e-5)  # one float32 sum over all entries is off by 1e-3
