"""Geometry of deltas against numpy in float64, and the laws of random subspaces against draws that are made another way."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from lox_merge.maths.geometry import (
    Products,
    cosine,
    count_above,
    effective_ranks,
    expected_overlap,
    inner_products,
    leading_count,
    mode_subspace_overlap,
    squared_overlaps,
)
from lox_merge.maths.random_subspace import band, band_of_draws, concentration_bound, cosine_band, haar_basis, haar_energy, sampled_energy
from lox_merge.maths.spectral import truncated_svd


def squares_of(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.double()).square()


def test_leading_count_is_the_fewest_that_hold_the_energy() -> None:
    squares = torch.tensor([5.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    assert [leading_count(squares, 10.0, energy) for energy in (0.01, 0.5, 0.51, 0.8, 0.85, 0.99, 1.0)] == [1, 1, 2, 2, 3, 4, 4]
    assert leading_count(squares[:2], 10.0, 0.8) == 2 and leading_count(squares[:2], 10.0, 0.81) is None
    assert leading_count(torch.zeros(0, dtype=torch.float64), 0.0, 0.5) is None
    assert leading_count(torch.tensor([1.0 - 1e-12, 1e-12], dtype=torch.float64), 1.0, 1.0) == 1  # rounding does not ask for a direction more


def test_effective_ranks_of_spectra_known_by_hand() -> None:
    flat = effective_ranks(torch.ones(10, dtype=torch.float64), 10.0, complete=True)
    assert (flat.energy_50, flat.energy_90, flat.energy_99) == (5, 9, 10)
    assert flat.stable == pytest.approx(10) and flat.participation == pytest.approx(10)
    one = effective_ranks(torch.tensor([4.0], dtype=torch.float64), 4.0, complete=True)
    assert one.energy_99 == 1 and one.stable == 1 and one.participation == 1
    cut = effective_ranks(torch.tensor([4.0, 2.0], dtype=torch.float64), 10.0, complete=False)
    assert (cut.energy_50, cut.energy_90, cut.stable, cut.participation) == (2, None, 2.5, None)
    nothing = effective_ranks(torch.zeros(0, dtype=torch.float64), 0.0, complete=True)
    assert set(nothing.__dict__.values()) == {None}


def test_directions_above_an_edge() -> None:
    squares = torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64)
    assert count_above(squares, 0.9, 1.5, complete=False) == 2
    assert count_above(squares, 0.9, 0.95, complete=False) == 3  # the next one is known, and below
    assert count_above(squares, 0.9, 0.5, complete=False) is None and count_above(squares, None, 0.5, complete=False) is None
    assert count_above(squares, None, 0.5, complete=True) == 3


def test_overlap_of_a_matrix_with_itself_is_one_and_of_orthogonal_spaces_zero() -> None:
    torch.manual_seed(0)
    left = torch.linalg.qr(torch.randn(40, 40)).Q
    overlaps = squared_overlaps(left[:, :9], left[:, :9])
    for count in (1, 4, 9):
        assert mode_subspace_overlap(overlaps, count, count) == pytest.approx(1, abs=1e-6)
    assert mode_subspace_overlap(overlaps, 3, 9) == pytest.approx(1, abs=1e-6)  # nested
    assert mode_subspace_overlap(squared_overlaps(left[:, :9], left[:, 9:20]), 9, 11) == pytest.approx(0, abs=1e-6)
    turned = left[:, :9] @ torch.linalg.qr(torch.randn(9, 9)).Q  # another basis of the same space
    assert mode_subspace_overlap(squared_overlaps(left[:, :9], turned), 9, 9) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("first", "second"), [(3, 3), (2, 11), (20, 5)])
def test_overlap_of_random_subspaces_has_its_expectation(first: int, second: int) -> None:
    dimension, draws = 48, 400
    generator = torch.Generator().manual_seed(1)
    found = [
        mode_subspace_overlap(squared_overlaps(haar_basis(dimension, first, generator), haar_basis(dimension, second, generator)), first, second)
        for _ in range(draws)
    ]
    error = np.std(found, ddof=1) / math.sqrt(draws)
    assert abs(np.mean(found) - expected_overlap(first, second, dimension)) < 3 * error
    assert expected_overlap(first, second, dimension) == max(first, second) / dimension


def test_qr_of_a_thin_gaussian_has_the_law_of_left_singular_vectors() -> None:
    """The statistic ||Q^T M||² of both, by a two-sample Kolmogorov-Smirnov test, and of QR against the exact Beta law."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    dimension, count, draws = 20, 3, 400
    matrix = torch.diag(torch.linspace(3, 0.1, dimension)) @ torch.randn(dimension, 7)
    by_qr = [haar_basis(dimension, count, generator) for _ in range(draws)]
    by_svd = [torch.linalg.svd(torch.randn(dimension, 30, generator=generator), full_matrices=False).U[:, :count] for _ in range(draws)]
    one, other = ([float((basis.T @ matrix).square().sum()) for basis in bases] for bases in (by_qr, by_svd))
    assert stats.ks_2samp(one, other).pvalue > 0.01
    # A coordinate subspace would pass for one of the two only by its mean.
    axis = [float(basis[0].square().sum()) for basis in by_qr]
    assert stats.kstest(axis, stats.beta(count / 2, (dimension - count) / 2).cdf).pvalue > 0.01
    torch.testing.assert_close(by_qr[0].T @ by_qr[0], torch.eye(count), atol=1e-5, rtol=0)


@pytest.mark.parametrize("decay", [0.0, 0.3, 3.0])
def test_mean_variance_and_band_of_what_a_random_subspace_keeps(decay: float) -> None:
    dimension, count, draws = 30, 4, 2000
    generator = torch.Generator().manual_seed(5)
    matrix = torch.diag(torch.exp(-decay * torch.arange(dimension))) @ torch.linalg.qr(torch.randn(dimension, dimension, generator=generator)).Q
    squares = squares_of(matrix)
    total = float(squares.sum())
    mean, variance = haar_energy(count, dimension, concentration_bound(squares, total, 0.0))
    found = np.array([float((haar_basis(dimension, count, generator).T @ matrix).square().sum()) / total for _ in range(draws)])
    assert mean == count / dimension
    assert abs(found.mean() - mean) < 3.5 * found.std() / math.sqrt(draws) + 1e-6
    assert found.var() == pytest.approx(variance, rel=0.15, abs=1e-10)
    low, high = band(mean, variance)
    inside = np.mean((found >= low - 1e-6) & (found <= high + 1e-6))
    assert 0.935 < inside <= 1 and (decay == 0 or inside < 0.965)


def test_a_cut_spectrum_bounds_the_concentration_from_above() -> None:
    squares = torch.exp(-0.2 * torch.arange(60, dtype=torch.float64))
    total = float(squares.sum())
    exact = float((squares / total).square().sum())
    assert concentration_bound(squares, total, 0.0) == pytest.approx(exact, rel=1e-12)
    bounds = [concentration_bound(squares[:count], total, math.sqrt(float(squares[count]))) for count in (1, 5, 20)]
    assert all(exact <= bound <= 1 for bound in bounds) and bounds == sorted(bounds, reverse=True)
    assert concentration_bound(squares[:5], total, None) >= concentration_bound(squares[:5], total, math.sqrt(float(squares[5])))
    assert concentration_bound(torch.zeros(0, dtype=torch.float64), 1.0, 0.5) == 1.0


def test_energy_of_directions_drawn_without_replacement() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(25, generator=generator, dtype=torch.float64)
    mean, variance = sampled_energy(shares, 6)
    found = torch.stack([shares[torch.randperm(25, generator=generator)[:6]].sum() for _ in range(4000)])
    assert abs(float(found.mean()) - mean) < 3.5 * math.sqrt(variance / 4000)
    assert float(found.var()) == pytest.approx(variance, rel=0.08)
    assert sampled_energy(shares, 25) == (pytest.approx(float(shares.sum())), 0.0)
    assert sampled_energy(shares[:1], 1) == (float(shares[0]), 0.0)


def test_bands_of_degenerate_laws() -> None:
    assert band(0.3, 0.0) == (0.3, 0.3) and band(1.0, 0.1) == (1.0, 1.0)
    assert band(0.5, 1.0) == (0.0, 1.0)
    assert haar_energy(1, 1, 1.0) == (1.0, 0.0) and haar_energy(5, 5, 0.5) == (1.0, 0.0)
    assert band_of_draws([2.0]) == (2.0, None)


def test_bands_of_draws_hold_the_next_draw() -> None:
    generator = np.random.default_rng(0)
    inside = 0
    for _ in range(2000):
        values = generator.normal(3, 0.2, 9).tolist()
        limits = band_of_draws(values[:8])[1]
        assert limits is not None
        inside += limits[0] <= values[8] <= limits[1]
    assert 0.935 < inside / 2000 < 0.965


def test_cosines_of_random_directions_fall_into_their_band() -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = cosine_band(50)
    found = torch.nn.functional.cosine_similarity(torch.randn(4000, 50, generator=generator), torch.randn(4000, 50, generator=generator))
    assert 0.94 < float(((found > low) & (found < high)).double().mean()) < 0.96
    assert cosine_band(10**8)[1] == pytest.approx(1.96e-4, rel=1e-3) and cosine_band(1) == (-1.0, 1.0)


@pytest.mark.parametrize("shape", [(7, 33), (33, 7), (1, 9), (9, 1)])
def test_inner_products_and_cosines_against_numpy(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    delta, update = torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)
    product, total = inner_products(delta, update, 2)
    a, f = delta.double().numpy().ravel(), update.double().numpy().ravel()
    assert product == pytest.approx(a @ f, rel=1e-5, abs=1e-5) and total == pytest.approx(np.linalg.norm(a + f), rel=1e-6)
    products = Products(a @ a, f @ f, product, total**2)

    def cos(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    assert products.update_to_total == pytest.approx(cos(f, a + f), abs=1e-5)
    assert products.update_to_alignment == pytest.approx(cos(f, a), abs=1e-5)
    assert products.safety_angle == pytest.approx(cos(f, -a), abs=1e-5)
    assert products.update_to_total_at(products.update_to_alignment or 0.0) == pytest.approx(cos(f, a + f), abs=1e-5)


def test_a_step_back_to_the_base_model_has_no_direction_left() -> None:
    delta = torch.randn(13, 17, generator=torch.Generator().manual_seed(0))
    product, total = inner_products(delta, -delta, 4)
    products = Products(-product, -product, product, total**2)
    assert total == 0.0 and products.update_to_total is None
    assert products.safety_angle == pytest.approx(1.0)
    nothing = Products(aligned=1.0, total=1.0)
    assert (nothing.update_to_total, nothing.safety_angle, nothing.update_to_total_at(0.0)) == (None, None, None)
    assert cosine(2.0, 1.0, 1.0) == 1.0 and cosine(0.0, 0.0, 1.0) is None


def test_r_align_squared_is_the_leading_energy() -> None:
    matrix = torch.randn(30, 200, generator=torch.Generator().manual_seed(0)) @ torch.randn(200, 150, generator=torch.Generator().manual_seed(1))
    squares = squares_of(matrix)
    for k in (1, 6, 30):
        ratio = truncated_svd(matrix, k).alignment_ratio
        assert ratio is not None and ratio**2 == pytest.approx(float(squares[:k].sum() / squares.sum()), rel=1e-5)
    assert truncated_svd(matrix, 30).alignment_ratio == pytest.approx(1, abs=1e-6)
