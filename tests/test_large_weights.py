"""Weights whose squares float32 cannot hold: worked on where that can be done, and never called NaN or Inf."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetuned import finetune
from fuzz.materials import Materials
from safetensors.torch import load_file, save_file

from lox_merge import Recipe, harden, inspect, project
from lox_merge.checkpoint.safetensors_format import TensorInfo
from lox_merge.errors import NonFiniteDeltaError, NumericalError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.engine import _non_finite
from lox_merge.jobs.filter_recipe import FilterRecipe
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.lox_edit import edit_batch
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.triplets import TakenNow
from lox_merge.jobs.work import form_delta, form_deltas
from lox_merge.maths.batched_spectral import batched_truncated_svd
from lox_merge.maths.precision import frobenius_norm, rounding_noise_edge
from lox_merge.maths.rank import RankRule
from lox_merge.maths.spectral import truncated_svd

LARGE = "finite, but the sum of their squares overflows float32"


def scaled(folder: Path, target: Path, scale: float) -> Path:
    """The same model with all weights times `scale`."""
    shutil.copytree(folder, target)
    for file in target.glob("*.safetensors"):
        save_file({name: tensor * scale for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return target


@pytest.fixture
def pair(materials: Materials, tmp_path: Path) -> tuple[Path, Path]:
    """A pair of finite weights whose deltas are far too large."""
    return scaled(materials.base, tmp_path / "base", 1e32), scaled(materials.aligned, tmp_path / "aligned", 1e32)


@pytest.mark.parametrize("skip", [False, True])
def test_finite_deltas_are_not_called_damaged(pair: tuple[Path, Path], tmp_path: Path, skip: bool) -> None:
    with pytest.raises(NumericalError, match=LARGE) as caught:
        harden(*pair, tmp_path / "out", recipe=Recipe(rank=2, skip_non_finite=skip))
    assert not isinstance(caught.value, NonFiniteDeltaError) and "tensor " in str(caught.value)
    with pytest.raises(NumericalError, match=LARGE):
        decompose(*pair, tmp_path / "factors.safetensors", recipe=Recipe(rank=2, skip_non_finite=skip))
    with pytest.raises(NumericalError, match=f"tensor .*{LARGE}"):
        inspect(*pair)


@pytest.mark.parametrize("skip", [False, True])
def test_a_filter_says_the_same(pair: tuple[Path, Path], materials: Materials, tmp_path: Path, skip: bool) -> None:
    finetuned = scaled(finetune(materials.aligned, tmp_path / "before"), tmp_path / "finetuned", 1e32)
    for layers in (None, 2):
        with pytest.raises(NumericalError, match=f"tensor .*{LARGE}"):
            project(*pair, finetuned, tmp_path / f"out{layers}", recipe=FilterRecipe(fraction=0.1, layers=layers, skip_non_finite=skip))


def test_only_entries_that_are_nan_or_inf_are_counted() -> None:
    base, aligned = torch.zeros(4, 5), torch.full((4, 5), 1e30)
    with pytest.raises(NumericalError, match=r"entries up to 1.0e\+30"):
        form_delta(base, aligned)
    with pytest.raises(NumericalError, match=LARGE):
        form_deltas(base[None], aligned[None])
    aligned[1, 2] = float("nan")
    assert form_delta(base, aligned)[2] == 1 and form_deltas(base[None], aligned[None])[2] == [1]


def test_float64_that_cancels_is_not_counted() -> None:
    class Stored:
        def __init__(self, value: float) -> None:
            self.value = value

        def tensor(self, name: str) -> torch.Tensor:
            return torch.tensor([1e300, self.value], dtype=torch.float64)

    plan: Any = SimpleNamespace(checkpoints={"base": Stored(0.0), "aligned": Stored(float("nan"))})
    assert _non_finite(plan, TensorPlan("x", TensorInfo("x", "F64", (2,), 0, 16), "edit")) == 1


@pytest.mark.parametrize("scale", [1e15, 1e16, 1e17])
def test_what_float32_products_cannot_hold_is_decomposed_in_float64(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, 4, generator=generator) @ torch.randn(4, 400, generator=generator) + 0.01 * torch.randn(300, 400, generator=generator)
    expected = torch.linalg.svdvals(matrix.double())[:4]
    for found in (
        truncated_svd(matrix * scale, 4),
        batched_truncated_svd(torch.stack([matrix, matrix]) * scale, RankRule("fixed", 4), norms=[frobenius_norm(matrix * scale)] * 2)[1],
    ):
        assert torch.allclose(found.singular_values / scale, expected, rtol=1e-5) and found.certificate.residual < 1e-5


def test_norms_and_noise_of_large_weights() -> None:
    matrix = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    scale = 2.0**100
    assert frobenius_norm(matrix * scale) == pytest.approx(frobenius_norm(matrix) * scale)
    for dtype in (torch.float32, torch.bfloat16):
        stored = matrix.to(dtype)
        assert rounding_noise_edge(stored * scale) == pytest.approx(rounding_noise_edge(stored) * scale)
    assert frobenius_norm(torch.full((2, 2), float("inf"))) == float("inf")


def test_a_batch_names_what_is_too_large() -> None:
    base, aligned = torch.zeros(2, 4, 5), torch.full((2, 4, 5), 1e30)
    tensor = TensorPlan("w", TensorInfo("w", "F32", (4, 5), 0, 80), "edit", rank=RankRule("fixed", 1), alpha=1.0)
    members = [(tensor, MatrixView((4, 5)))] * 2
    with pytest.raises(NumericalError, match=f"^w or one of its shape in the same shard: .*{LARGE}"):
        edit_batch(base, aligned, torch.empty(2, 4, 5), members, Recipe(rank=1), TakenNow(1e-3, 0), map)
