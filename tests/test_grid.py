"""Rounding onto the values that a quantised matrix can hold, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lox_merge.maths.edits import apply_update, lox_update
from lox_merge.maths.grid import Codes, FloatCodes, Grid, WholeCodes
from lox_merge.maths.spectral import truncated_svd

EVERY = slice(None)
KINDS: list[Codes] = [FloatCodes(torch.float8_e4m3fn), FloatCodes(torch.float8_e5m2), WholeCodes(8), WholeCodes(4)]


def all_codes(codes: Codes) -> np.ndarray:
    """Every number that a code can be, ascending."""
    if isinstance(codes, WholeCodes):
        return np.arange(codes.smallest, codes.largest + 1).astype(float)
    assert isinstance(codes, FloatCodes)
    numbers = torch.arange(256, dtype=torch.uint8).view(codes.dtype).double().numpy()
    return np.unique(numbers[np.isfinite(numbers)])


def grid_of(codes: Codes, *, zeros: bool = False, rows: int = 10, columns: int = 13) -> Grid:
    generator = torch.Generator().manual_seed(3)
    scales = torch.rand(3, 4, generator=generator) * 0.01 + 0.001
    zero = torch.randint(-3, 4, (3, 4), generator=generator).float() if zeros else None
    return Grid.of_blocks(codes, scales, zero, (rows, columns), (4, 4))


@pytest.mark.parametrize("codes", KINDS, ids=str)
@pytest.mark.parametrize("zeros", [False, True])
def test_nearest_is_the_nearest_number_of_the_grid(codes: Codes, zeros: bool) -> None:
    grid = grid_of(codes, zeros=zeros)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(10, 13, generator=generator) * 0.05
    found = grid.round(values, EVERY).double().numpy()
    numbers = all_codes(codes)
    for i in range(10):
        for j in range(13):
            zero = 0.0 if grid.zeros is None else float(grid.zeros[i // 4, j // 4])
            possible = (numbers - zero) * float(grid.scales[i // 4, j // 4])
            best = np.abs(possible - float(values[i, j])).min()
            assert abs(abs(found[i, j] - float(values[i, j])) - best) <= 1e-6 * np.abs(possible).max()


@pytest.mark.parametrize("codes", KINDS, ids=str)
def test_codes_of_values_on_the_grid_are_found_again(codes: Codes) -> None:
    grid = grid_of(codes, zeros=isinstance(codes, WholeCodes))
    numbers = torch.tensor(all_codes(codes), dtype=torch.float32)
    chosen = numbers[torch.randint(0, len(numbers), (10, 13), generator=torch.Generator().manual_seed(1))]
    assert torch.equal(grid.encode(grid.decode(chosen)), chosen)


@pytest.mark.parametrize("codes", KINDS, ids=str)
def test_stochastic_takes_neighbours_and_is_right_in_the_mean(codes: Codes) -> None:
    numbers = all_codes(codes)
    value = float(numbers[-2] * 0.3 + numbers[-1] * 0.7) if isinstance(codes, WholeCodes) else 0.30000001
    values = torch.full((400, 400), value)
    drawn = codes.stochastic(values, torch.Generator().manual_seed(0))
    low, high = numbers[numbers <= value].max(), numbers[numbers >= value].min()
    assert set(np.unique(drawn.double().numpy())) == {low, high}
    assert float(drawn.double().mean()) == pytest.approx(value, abs=5 * (high - low) / 2 / 400)


@pytest.mark.parametrize("codes", KINDS, ids=str)
def test_beyond_the_largest_number_is_the_largest_and_a_scale_of_zero_gives_zero(codes: Codes) -> None:
    grid = Grid.of_blocks(codes, torch.tensor([[1.0, 0.0]]), None, (1, 2), (1, 1))
    numbers = all_codes(codes)
    for rounding in ("nearest", "stochastic"):
        generator = torch.Generator().manual_seed(0)
        assert grid.round(torch.tensor([[1e9, 1.0]]), EVERY, rounding, generator).tolist() == [[numbers.max(), 0.0]]  # type: ignore[arg-type]
        assert grid.round(torch.tensor([[-1e9, -1.0]]), EVERY, rounding, generator).tolist() == [[numbers.min(), 0.0]]  # type: ignore[arg-type]


def test_a_part_of_a_grid_is_the_grid_of_that_part() -> None:
    grid = grid_of(WholeCodes(8), zeros=True)
    values = torch.randn(10, 13, generator=torch.Generator().manual_seed(0)) * 0.05
    whole = grid.round(values, EVERY)
    rows, columns = slice(1, 10, 2), slice(5, 12)
    assert torch.equal(grid.part(rows, columns).round(values[rows, columns], EVERY), whole[rows, columns])


@pytest.mark.parametrize("rounding", ["nearest", "feedback", "stochastic"])
def test_an_edit_on_a_grid_is_made_of_its_values_and_its_figures_are_true(rounding: str) -> None:
    generator = torch.Generator().manual_seed(5)
    shape = (160, 96)
    values = torch.randn(shape, generator=generator) * 0.02
    scales = values.abs().reshape(5, 32, 3, 32).amax((1, 3)) / 448
    grid = Grid.of_blocks(FloatCodes(torch.float8_e4m3fn), scales, None, shape, (32, 32))
    aligned = grid.round(values, EVERY)
    low = torch.randn(160, 4, generator=generator) @ torch.randn(4, 96, generator=generator)
    update = lox_update(truncated_svd(low * (0.01 * aligned.norm() / low.norm()), 4), 1.0)
    out, realised = apply_update(aligned, update, grid=grid, rounding=rounding)  # type: ignore[arg-type]
    assert torch.equal(grid.round(out, EVERY), out) and not torch.equal(out, aligned)
    assert update.left is not None and update.right is not None
    intended, kept = (update.left.double() @ update.right.double().T).numpy(), (out.double() - aligned.double()).numpy()
    gain = (intended * kept).sum() / (intended**2).sum()
    assert realised.gain == pytest.approx(gain, abs=1e-4)
    assert realised.realised_norm == pytest.approx(np.linalg.norm(kept), rel=1e-4)
    wanted = {"nearest": (0.2, 0.7), "feedback": (0.99, 1.01), "stochastic": (0.8, 1.2)}[rounding]
    assert wanted[0] < gain < wanted[1]
