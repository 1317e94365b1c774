"""Work done a piece of rows, or a panel of columns, at a time gives what the whole at once gives."""

from __future__ import annotations

import math

import pytest
import torch

from lox_merge.jobs.work import form_delta
from lox_merge.maths import lanczos, truncated_svd
from lox_merge.maths.edits import apply_update
from lox_merge.maths.pieces import PIECE, row_pieces, rows_at_once
from lox_merge.maths.update import Update

# Several pieces of rows, the last one short.
ROWS, COLUMNS = 1000, 515


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pieces_are_all_rows_in_order() -> None:
    matrix = torch.empty(ROWS, COLUMNS)
    pieces = row_pieces(matrix)
    assert len(pieces) > 2 and [row for piece in pieces for row in range(ROWS)[piece]] == list(range(ROWS))
    assert rows_at_once(torch.empty(3, 2 * PIECE)) == 1, "a row that is longer than a piece is one"
    assert row_pieces(torch.empty(0, 5)) == [slice(0, 0)]
    assert rows_at_once(torch.empty(300, PIECE // 11), rank=6) == 16, "products need some rows at a time"
    assert rows_at_once(torch.empty(300, PIECE // 11), rank=65) == 64 and rows_at_once(torch.empty(300, PIECE // 35), rank=6) == 32
    assert row_pieces(torch.empty(130, PIECE), rank=100) == [slice(0, 64), slice(64, 128), slice(128, 130)]
    out, realised = apply_update(torch.empty(0, 5), Update(torch.empty(0, 2), torch.ones(5, 2)))
    assert out.shape == (0, 5) and realised.gain is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_delta_and_its_norm_are_those_of_the_whole(dtype: torch.dtype, transposed: bool) -> None:
    base, aligned = normal(ROWS, COLUMNS).to(dtype), normal(ROWS, COLUMNS, seed=1).to(dtype)
    if transposed:
        base, aligned = base.T, aligned.T
    expected = aligned.double() - base.double()
    delta, norm, bad = form_delta(base, aligned)
    assert delta.dtype == torch.float32 and delta.shape == aligned.shape and bad == 0
    assert torch.equal(delta, (expected if dtype == torch.float64 else aligned.float() - base.float()).float())
    assert norm == pytest.approx(float(expected.norm()), rel=1e-6)


def test_every_entry_that_is_not_finite_is_counted_in_whichever_piece() -> None:
    base, aligned = normal(ROWS, COLUMNS).bfloat16(), normal(ROWS, COLUMNS, seed=1).bfloat16()
    aligned[0, 0], aligned[ROWS // 2, 7], base[-1, -1] = math.nan, math.inf, -math.inf
    assert form_delta(base, aligned)[2] == 3


@pytest.mark.parametrize("rank", ["full", 1, 4, 20, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_update_and_what_survived_are_those_of_the_whole(dtype: torch.dtype, rank: int | str) -> None:
    full = rank == "full"
    width = rank if isinstance(rank, int) else 4
    aligned = normal(ROWS, COLUMNS).to(dtype)
    delta = normal(ROWS, COLUMNS, seed=1).float() * 0.05
    left, right = normal(ROWS, width, seed=2).float() * 0.02, normal(COLUMNS, width, seed=3).float()
    update = Update(None, None, 1.5) if full else Update(left, right)
    intended = 1.5 * delta.double() if full else left.double() @ right.double().T
    out, realised = apply_update(aligned, update, delta=delta)
    exact = aligned.double() + intended
    assert (out.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps
    kept = out.double() - aligned.double()
    assert realised.intended_norm == pytest.approx(float(intended.norm()), rel=1e-5)
    assert realised.realised_norm == pytest.approx(float(kept.norm()), rel=1e-5)
    assert realised.gain == pytest.approx(float((kept * intended).sum() / intended.square().sum()), rel=1e-5)


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("shape", [(40, 1100), (256, 700), (300, 300), (3, 5)])
def test_panels_give_both_products(shape: tuple[int, int], width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanczos, "_CACHED_ENTRIES", 0)
    for matrix in (normal(*shape).float(), normal(*reversed(shape)).float().T):
        rows = normal(width, shape[0], seed=1).float()
        image, back = lanczos._there_and_back(rows, matrix)
        expected = rows.double() @ matrix.double()
        torch.testing.assert_close(image.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(back.double(), expected @ matrix.double().T, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("shape", [(520, 4100), (4100, 520)])
def test_a_matrix_that_is_taken_in_panels_has_the_triplets_of_its_full_svd(shape: tuple[int, int]) -> None:
    assert math.prod(shape) > lanczos._CACHED_ENTRIES
    values = torch.arange(1, 65, dtype=torch.float64) ** -0.8
    matrix = (normal(shape[0], 64) * values @ normal(64, shape[1], seed=1) + normal(*shape, seed=2)).float()
    found = truncated_svd(matrix, 6)
    wide = matrix.double() if shape[0] <= shape[1] else matrix.double().T
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    leading = vectors[:, -6:]
    inner = (found.left if shape[0] <= shape[1] else found.right).double()
    torch.testing.assert_close(found.singular_values, squares[-6:].flip(0).sqrt(), rtol=1e-5, atol=0.0)
    error = (leading @ (leading.T @ wide) - inner @ (inner.T @ wide)).norm() / (leading.T @ wide).norm()
    assert error <= 1e-3 and found.certificate.projection_error_bound is not None
    assert error * (leading.T @ wide).norm() <= found.certificate.projection_error_bound
