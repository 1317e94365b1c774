"""The LoX edit, its controls, and rounding, against independent float64 arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lox_merge.errors import NumericalError, RecipeError
from lox_merge.maths import edits, parse_rank, truncated_svd
from lox_merge.maths.rounding import round_stochastic


def pair(rows: int, columns: int, change: float = 0.05, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(rows, columns, generator=generator) * 0.02).to(dtype)
    low = torch.randn(rows, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
    low *= change * base.float().norm() / low.norm()
    noise = torch.randn(rows, columns, generator=generator) * 0.02 * change * 0.3
    return base, (base.float() + low + noise).to(dtype)


def expected_lox(base: torch.Tensor, aligned: torch.Tensor, k: int, alpha: float) -> torch.Tensor:
    left, values, right = torch.linalg.svd(aligned.double() - base.double(), full_matrices=False)
    return aligned.double() + alpha * (left[:, :k] * values[:k]) @ right[:k]


@pytest.mark.parametrize("shape", [(60, 80), (300, 200), (1, 40), (40, 1), (150, 400)])
@pytest.mark.parametrize(("k", "alpha"), [(6, 1.25), (1, 0.5), (1000, 2.0)])
def test_lox_is_the_formula(shape: tuple[int, int], k: int, alpha: float) -> None:
    base, aligned = pair(*shape)
    torch.testing.assert_close(edits.lox(base, aligned, k, alpha).double(), expected_lox(base, aligned, k, alpha), rtol=0, atol=2e-7)


def test_full_rank_is_expo_without_an_svd() -> None:
    base, aligned = pair(50, 70)
    edited, subspace, realised = edits.lox_edit(base, aligned, parse_rank("full"), 0.5)
    assert subspace is None
    torch.testing.assert_close(edited, aligned + 0.5 * (aligned - base), rtol=0, atol=1e-8)
    assert realised.gain == pytest.approx(1.0, abs=1e-5)


def test_bfloat16_is_the_rounding_of_the_exact_result() -> None:
    base, aligned = pair(300, 200, dtype=torch.bfloat16)
    out = edits.lox(base, aligned)
    exact = expected_lox(base, aligned, 6, 1.25)
    assert out.dtype == torch.bfloat16
    # Ties apart, float32 arithmetic can only move a value across the midpoint between two neighbours.
    wrong = out != exact.to(torch.bfloat16)
    assert wrong.float().mean() < 2e-3
    assert torch.equal(edits.lox(base, aligned), out)
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_inputs_are_not_changed_and_strides_do_not_matter() -> None:
    base, aligned = pair(90, 140)
    before = aligned.clone()
    out = edits.lox(base, aligned)
    assert torch.equal(aligned, before)
    strided = edits.lox(base.T.contiguous().T, aligned.T.contiguous().T)
    torch.testing.assert_close(strided, out, rtol=0, atol=1e-7)


def test_float64_weights_keep_their_digits() -> None:
    base, aligned = pair(40, 50, dtype=torch.float64)
    out = edits.lox(base, aligned)
    assert out.dtype == torch.float64
    assert ((out - expected_lox(base, aligned, 6, 1.25)).norm() / (out - aligned).norm()) < 1e-5


def test_zero_delta_returns_aligned() -> None:
    _, aligned = pair(60, 50, dtype=torch.bfloat16)
    edited, subspace, realised = edits.lox_edit(aligned, aligned, 6, 1.25)
    assert torch.equal(edited, aligned)
    assert subspace is not None and subspace.rank == 0
    assert realised.gain is None and realised.cosine is None and realised.realised_norm == 0


def test_overflow_of_the_output_dtype_is_an_error() -> None:
    base = torch.full((20, 20), 30000.0, dtype=torch.float16)
    with pytest.raises(NumericalError, match="overflows float16"):
        edits.lox(base, (base.float() * 2).half(), 1, 1.25)


@pytest.mark.parametrize("alpha", [-1, -1e-9, math.inf, math.nan])
def test_no_matrix_is_weakened(alpha: float) -> None:
    with pytest.raises(RecipeError, match="alpha is"):
        edits.lox(*pair(20, 30), alpha=alpha)


def test_realised_measures_what_was_written() -> None:
    base, aligned = pair(200, 300, change=0.003, dtype=torch.bfloat16)
    edited, subspace, realised = edits.lox_edit(base, aligned, 6, 1.0)
    assert subspace is not None
    intended = subspace.low_rank().double()
    kept = edited.double() - aligned.double()
    assert realised.gain == pytest.approx(float((kept * intended).sum() / intended.square().sum()), rel=1e-4)
    assert realised.cosine == pytest.approx(float((kept * intended).sum() / kept.norm() / intended.norm()), rel=1e-4)
    assert realised.intended_norm == pytest.approx(float(intended.norm()), rel=1e-5)
    assert realised.realised_norm == pytest.approx(float(kept.norm()), rel=1e-5)
    assert realised.gain < 0.95


@pytest.mark.parametrize("rank", ["1", "6"])
def test_feedback_restores_the_gain(rank: str) -> None:
    base, aligned = pair(256, 384, change=0.002, dtype=torch.bfloat16)
    rule = parse_rank(rank)
    nearest = edits.lox_edit(base, aligned, rule, 0.5)[2]
    edited, _, feedback = edits.lox_edit(base, aligned, rule, 0.5, rounding="feedback")
    assert nearest.gain is not None and nearest.gain < 0.9
    assert feedback.gain == pytest.approx(1.0, abs=0.01)
    assert torch.equal(edited, edits.lox(base, aligned, rule, 0.5, rounding="feedback"))


def test_feedback_is_refused_where_it_cannot_work() -> None:
    base, aligned = pair(60, 80, change=0.002, dtype=torch.bfloat16)
    with pytest.raises(NumericalError, match="limited rank"):
        edits.lox(base, aligned, parse_rank("full"), 0.3, rounding="feedback")


def test_stochastic_rounding_is_unbiased_and_seeded() -> None:
    base, aligned = pair(256, 384, change=0.002, dtype=torch.bfloat16)
    one, _, realised = edits.lox_edit(base, aligned, 6, 0.5, rounding="stochastic", seed=1)
    assert realised.gain == pytest.approx(1.0, abs=0.05)
    assert torch.equal(one, edits.lox(base, aligned, 6, 0.5, rounding="stochastic", seed=1))
    assert not torch.equal(one, edits.lox(base, aligned, 6, 0.5, rounding="stochastic", seed=2))


@settings(max_examples=40, deadline=None)
@given(st.floats(-1000, 1000, width=32).filter(lambda value: abs(value) > 1e-30), st.sampled_from([torch.bfloat16, torch.float16]))
def test_stochastic_rounding_has_the_right_mean(value: float, dtype: torch.dtype) -> None:
    draws = 4000
    values = torch.full((draws,), value)
    rounded = round_stochastic(values, dtype, torch.Generator().manual_seed(0)).double()
    neighbours = rounded.unique()
    assert len(neighbours) <= 2
    spread = float(neighbours.max() - neighbours.min())
    assert abs(float(rounded.mean()) - float(values[0])) <= 5 * spread / (2 * math.sqrt(draws)) + 1e-12
    representable = values.to(dtype).float()
    assert torch.equal(round_stochastic(representable, dtype, torch.Generator().manual_seed(0)).float(), representable)


def test_rounding_to_float32_changes_nothing() -> None:
    base, aligned = pair(30, 40)
    for rounding in ("nearest", "feedback", "stochastic"):
        assert torch.equal(edits.lox(base, aligned, rounding=rounding), edits.lox(base, aligned))


def test_controls_have_the_norm_of_the_edit_they_control() -> None:
    base, aligned = pair(140, 200)
    delta = aligned - base
    norm = 1.25 * float(truncated_svd(delta, 6).singular_values.norm())
    every = truncated_svd(delta, parse_rank("full"))
    updates = {
        "full": edits.full_rank_update_of_norm(delta, norm),
        "random": edits.random_subspace_update(delta, 6, norm, seed=3),
        "random-k": edits.random_directions_update(every, 6, norm, seed=3),
        "gaussian": edits.gaussian_update((140, 200), 6, norm, seed=3),
    }
    for name, update in updates.items():
        change = edits.apply_update(aligned, update, delta=delta)[0] - aligned
        assert float(change.double().norm()) == pytest.approx(norm, rel=1e-4), name
        rank = int(torch.linalg.matrix_rank(change, rtol=1e-3))
        assert rank == (140 if name == "full" else 6), name
    again = edits.random_subspace_update(delta, 6, norm, seed=3)
    assert torch.equal(again.left, updates["random"].left)
    other = edits.random_subspace_update(delta, 6, norm, seed=4)
    assert not torch.equal(again.left, other.left)


def test_random_directions_are_singular_directions_of_the_delta() -> None:
    base, aligned = pair(100, 120)
    every = truncated_svd(aligned - base, parse_rank("full"))
    update = edits.random_directions_update(every, 4, 1.0, seed=0)
    overlaps = (every.left.T @ torch.nn.functional.normalize(update.left, dim=0)).abs()
    assert sorted(overlaps.max(dim=0).values.tolist()) == pytest.approx([1.0] * 4, abs=1e-5)
    assert len(set(overlaps.argmax(dim=0).tolist())) == 4


def test_random_subspace_keeps_the_share_that_haar_expects() -> None:
    delta = torch.randn(120, 150, generator=torch.Generator().manual_seed(0))
    kept = []
    for seed in range(60):
        left = torch.linalg.qr(edits.random_subspace_update(delta, 12, 1.0, seed=seed).left).Q
        kept.append(float((left.T @ delta).square().sum() / delta.square().sum()))
    mean = sum(kept) / len(kept)
    error = (sum((share - mean) ** 2 for share in kept) / (len(kept) - 1) / len(kept)) ** 0.5
    assert abs(mean - 12 / 120) <= 3 * error
