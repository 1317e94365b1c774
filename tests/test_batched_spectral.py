"""Many matrices at once against a full SVD in float64, against the single path, and what the host is told meanwhile."""

from __future__ import annotations

import gc
import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_spectral import matrix_with, noisy, reference, spectrum
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lox_merge.errors import LoxMergeWarning
from lox_merge.maths import batched_lanczos, krylov_spaces, parse_rank, truncated_svd
from lox_merge.maths.batched_spectral import batched_rank, batched_truncated_svd
from lox_merge.maths.block_qr import orthonormal_rows
from lox_merge.maths.lanczos import SMALLEST_GAP
from lox_merge.maths.rank import RankRule
from lox_merge.maths.subspace import Subspace
from lox_merge.maths.thin_products import LongSide, runs

SIX = RankRule("fixed", 6)


def batch(rows: int, columns: int) -> Tensor:
    """Easy ones, which converge early, a noisy one, which takes long, an empty one, a tie, and one of exactly rank 2."""
    side = min(rows, columns)
    planted = [spectrum(kind, side) for kind in ("power law", "slow decay", "steep", "scaled down")]
    tie = torch.tensor([8.0, 7, 6, 5, 4, 3, 3, 2, 1], dtype=torch.float64)
    low = torch.tensor([2.0, 1.0], dtype=torch.float64)
    matrices = [matrix_with(values, rows, columns) for values in (*planted, tie, low)]
    return torch.stack([*matrices, noisy(rows, columns), torch.zeros(rows, columns)])


def norms(matrices: Tensor) -> list[float]:
    return [float(matrix.double().norm()) for matrix in matrices]


def decompose(matrices: Tensor, rule: RankRule = SIX, **settings: Any) -> list[Subspace]:
    return batched_truncated_svd(matrices, rule, norms=norms(matrices), **settings)


@pytest.mark.parametrize("rank", [6, 40])
@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
def test_each_is_what_it_is_alone(shape: tuple[int, int], rank: int) -> None:
    matrices = batch(*shape)
    for matrix, found in zip(matrices, decompose(matrices, RankRule("fixed", rank)), strict=True):
        alone = truncated_svd(matrix, rank)
        assert found.rank == alone.rank
        assert found.norm == pytest.approx(alone.norm, rel=1e-6)
        assert found.certificate.ambiguous == alone.certificate.ambiguous
        assert found.certificate.method == alone.certificate.method
        assert found.certificate.passes <= alone.certificate.passes + 2  # a test that was left out comes one step later
        expected, values = reference(matrix, found.rank)
        if found.certificate.gap_ratio < 1 / SMALLEST_GAP:  # above that the span is not determined, the energy is
            assert (found.low_rank() - expected).norm() <= 1e-3 * expected.norm()
        torch.testing.assert_close(found.singular_values, values[: found.rank], rtol=1e-5, atol=1e-8 * float(values[0]))
        eye = torch.eye(found.rank)
        torch.testing.assert_close(found.left.T @ found.left, eye, rtol=0, atol=2e-5)
        torch.testing.assert_close(found.right.T @ found.right, eye, rtol=0, atol=2e-5)
        assert found.left.is_contiguous() and found.right.is_contiguous()


@pytest.mark.parametrize("shape", [(300, 400), (400, 300)])
def test_certificates_bound_the_true_errors(shape: tuple[int, int]) -> None:
    matrices = torch.stack([matrix_with(spectrum(kind, 300), *shape) for kind in ("power law", "slow decay")])
    for matrix, found in zip(matrices, decompose(matrices, RankRule("fixed", 5), tolerance=0.3), strict=True):
        expected, values = reference(matrix, 5)
        bound = found.certificate.projection_error_bound
        assert bound is not None
        assert float((found.low_rank() - expected).norm()) <= 1.05 * bound + 1e-5 * float(values[0])
        assert found.certificate.next_singular_value == pytest.approx(float(values[5]), rel=0.1)


def test_company_changes_no_more_than_the_last_bits_and_the_same_company_nothing() -> None:
    matrices = batch(300, 400)
    together, again = decompose(matrices), decompose(matrices)
    for one, other in zip(together, again, strict=True):
        assert torch.equal(one.left, other.left) and torch.equal(one.right, other.right)
    for index in (0, 1, 6):
        (alone,) = decompose(matrices[index : index + 1])
        assert (alone.low_rank() - together[index].low_rank()).norm() <= 1e-4 * alone.low_rank().norm()


def test_restarts_in_step_reach_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_lanczos, "BASIS", 56)
    matrices = torch.stack([noisy(500, 600, seed) for seed in range(3)])
    for matrix, found in zip(matrices, decompose(matrices, RankRule("fixed", 4), tolerance=1e-4), strict=True):
        _, values = reference(matrix, 4)
        assert found.certificate.method == "lanczos" and found.certificate.passes > 2 * 56 / 8
        torch.testing.assert_close(found.singular_values, values[:4], rtol=1e-6, atol=0)


def test_what_is_settled_early_waits_unspoilt_for_the_others() -> None:
    early = matrix_with(torch.arange(1, 301, dtype=torch.float64) ** -3, 300, 400)  # its next blocks are soon dependent
    late = matrix_with(torch.arange(1, 301, dtype=torch.float64) ** -0.6, 300, 400)
    together = decompose(torch.stack([early, late]))
    (alone,) = decompose(early[None])
    assert together[0].certificate.passes + 4 <= together[1].certificate.passes <= 2 * krylov_spaces.FIRST_ROWS / 8 + 2
    torch.testing.assert_close(together[0].low_rank(), alone.low_rank(), rtol=0, atol=1e-5)


def test_what_does_not_converge_goes_the_single_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched_lanczos, "LARGEST_PASSES", 3)
    matrices = torch.stack([matrix_with(spectrum("slow decay", 300), 300, 320), matrix_with(spectrum("steep", 300), 300, 320)])
    slow, _ = decompose(matrices)
    alone = truncated_svd(matrices[0], 6)
    assert torch.equal(slow.left, alone.left) and slow.certificate == alone.certificate


def test_a_stall_of_the_single_way_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from lox_merge.maths import lanczos

    monkeypatch.setattr(batched_lanczos, "LARGEST_PASSES", 2)
    monkeypatch.setattr(lanczos, "LARGEST_PASSES", 2)
    matrix = matrix_with(spectrum("slow decay", 300), 300, 320)
    with pytest.warns(LoxMergeWarning, match="did not converge"):
        (found,) = decompose(matrix[None], tolerance=1e-6)
    assert found.certificate.method == "gram"


def test_one_that_is_not_finite_does_not_spoil_its_company() -> None:
    matrices = batch(300, 400)
    expected = decompose(matrices)[0]
    matrices[2, 5, 7] = math.nan
    found = batched_lanczos.batched_lanczos(matrices, 6, chosen=[0, 1, 2], tolerance=1e-3, seed=0)
    assert sorted(found) == [0, 1]
    torch.testing.assert_close(found[0].triplets.values, expected.singular_values)


@pytest.mark.parametrize(
    ("shape", "rule", "rank"),
    [
        ((300, 400), "6", 6),
        ((300, 400), "10%", 30),
        ((300, 400), "61", None),  # above a fifth of the short side
        ((2000, 3000), "200", None),  # above what a basis holds
        ((128, 400), "6", None),  # small sides are exact
        ((1, 400), "1", None),
        ((300, 400), "energy:0.9", None),
        ((300, 400), "noise-floor", None),
        ((300, 400), "full", None),
    ],
)
def test_which_rules_and_shapes_go_in_batches(shape: tuple[int, int], rule: str, rank: int | None) -> None:
    assert batched_rank(shape, parse_rank(rule)) == rank


def test_others_are_refused() -> None:
    with pytest.raises(ValueError, match="does not go in a batch"):
        decompose(torch.ones(2, 40, 30))


class Operations(TorchDispatchMode):
    """Names of the operations that this thread calls. On a GPU the host waits in those that make a number of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.names.append(function.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return function(*arguments, **(keywords or {}))


WAITING = {"nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "linalg_qr", "_linalg_eigh", "_linalg_svd"}


def test_the_host_waits_for_nothing_but_the_stop_test(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    class Counted(krylov_spaces.Telling):
        def wait(self, chosen: Any) -> Any:
            told.append(len(chosen))
            return super().wait(chosen)

    monkeypatch.setattr(krylov_spaces, "Telling", Counted)
    quick = torch.arange(1, 301, dtype=torch.float64) ** -2
    matrices = torch.stack([matrix_with(values, 300, 400) for values in (quick, spectrum("slow decay", 300))] + [noisy(300, 400)])
    with ThreadPoolExecutor(2) as pool, Operations() as operations:
        # The stop test itself runs in the pool, whose threads are not watched.
        found = batched_lanczos.batched_lanczos(matrices, 6, chosen=[0, 1, 2], tolerance=1e-3, seed=0, run=pool.map)
    passes = [found[index].passes for index in range(3)]
    assert passes[0] < passes[1] < passes[2]
    assert "_local_scalar_dense" not in operations.names
    assert operations.names.count("bmm") > 50 and not WAITING & set(operations.names)
    # Once a step at most, and less often while the slow one is far from its target; those that are done are not told of again.
    assert len(told) <= (passes[2] - 1) / 2
    assert told[0] == 3 and told[-1] == 1 and sorted(told, reverse=True) == told


def test_what_is_kept_of_a_shape_does_not_hold_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = krylov_spaces.KrylovSpaces(2, krylov_spaces.FIRST_ROWS, 8, 6, 300, 400, torch.device("cpu"))
    monkeypatch.setattr(batched_lanczos, "spaces_for", lambda *_: nullcontext(kept))
    for seed in (1, 2):  # the second time all that was there of the first is gone
        matrices = torch.stack([noisy(300, 400, seed), matrix_with(spectrum("power law", 300), 300, 400, seed)])
        found = decompose(matrices)
        torch.testing.assert_close(found[1].low_rank(), reference(matrices[1], 6)[0].float(), rtol=0, atol=1e-3)
        held = weakref.ref(matrices)
        del matrices
        gc.collect()
        assert held() is None


def test_products_leave_out_what_is_done() -> None:
    assert runs([0, 1, 2, 5, 7, 8]) == [slice(0, 3), slice(5, 6), slice(7, 9)]
    assert runs([]) == []
    matrices = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0))
    out = torch.full((4, 2, 7), -1.0)
    rows = torch.ones(4, 2, 5)
    LongSide(matrices).to_long(rows, [0, 3], out)
    assert (out[1:3] == -1).all()
    torch.testing.assert_close(out[[0, 3]], (rows @ matrices)[[0, 3]])


def two_rounds(blocks: Tensor) -> tuple[Tensor, Tensor]:
    lost = torch.zeros(len(blocks), dtype=torch.bool)
    once, gram = orthonormal_rows(blocks, lost)
    torch.testing.assert_close(gram, blocks.double() @ blocks.double().mT, equal_nan=True)
    return orthonormal_rows(once, lost, nearly=True)[0], lost


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_blocks_of_any_usable_condition_become_orthonormal(condition: float) -> None:
    values = torch.logspace(0, -math.log10(condition), 8, dtype=torch.float64)
    blocks = torch.stack([matrix_with(values, 8, 500, seed) for seed in range(3)])
    rows, lost = two_rounds(blocks)
    assert not lost.any()
    torch.testing.assert_close(rows @ rows.mT, torch.eye(8).expand(3, 8, 8), rtol=0, atol=2e-6)
    within = (blocks @ rows.mT) @ rows  # the same row space
    torch.testing.assert_close(within, blocks, rtol=0, atol=2e-6)


def test_rows_are_orthonormal_or_told_to_be_lost() -> None:
    blocks = torch.randn(4, 8, 100, generator=torch.Generator().manual_seed(0))
    blocks[0, 3] = blocks[0, 2]  # rounding may give it a direction of its own: any will do, as with Householder's
    blocks[2] = 0
    blocks[3, 1, 1] = math.nan
    rows, lost = two_rounds(blocks)
    assert lost.tolist()[1:] == [False, True, True]
    assert not rows[lost].any()
    for block in rows[~lost]:
        torch.testing.assert_close(block @ block.T, torch.eye(8), rtol=0, atol=2e-6)
