"""Numbers that a smaller dtype cannot hold: named, instead of written as Inf."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import RunCli
from reference import load
from safetensors.torch import save_file
from tiny_models import make_pair

from lox_merge import FilterRecipe, Recipe, harden, project
from lox_merge.errors import NumericalError
from lox_merge.jobs.engine import check_range

NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


def with_large(folder: Path, name: str, out: Path, value: float = 1e5) -> Path:
    """A copy of a model in which one number of a tensor is beyond float16."""
    tensors = {other: tensor.clone() for other, tensor in load(folder).items()}
    tensors[name].view(-1)[3] = value
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_pair(tmp_path / "pair", "llama", "float32", aligned_shards=1)


@pytest.mark.parametrize("name", [NORM, QUERY])
def test_copied_tensors(pair: tuple[Path, Path], tmp_path: Path, name: str, run_cli: RunCli) -> None:
    """A norm is copied; so is a matrix that alignment left alone."""
    aligned = with_large(pair[1], name, tmp_path / "aligned")
    base = with_large(pair[1], name, tmp_path / "base") if name == QUERY else pair[0]
    if name == QUERY:  # something else has to differ
        tensors = load(base)
        save_file({other: tensor * 0.9 if "mlp" in other else tensor for other, tensor in tensors.items()}, base / "model.safetensors")
    done = run_cli("harden", base, aligned, tmp_path / "out", "--rank", 4, "--dtype", "float16", "--device", "cpu")
    assert done.returncode == 1, done.stderr
    assert f"tensor {name} holds 1 number(s) that float16 cannot hold (its largest is 6.55e+04)" in " ".join(done.stderr.split())
    assert not (tmp_path / "out" / "model.safetensors").exists()
    wider = harden(base, aligned, tmp_path / "wider", recipe=Recipe(rank=4, dtype="bfloat16"))
    assert torch.isfinite(load(wider.out)[name].float()).all()


def test_filtered_models(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A matrix that fine-tuning left alone."""
    aligned, finetuned = (with_large(pair[1], QUERY, tmp_path / name) for name in ("aligned", "finetuned"))
    save_file({name: tensor * 1.01 if "mlp" in name else tensor for name, tensor in load(finetuned).items()}, finetuned / "model.safetensors")
    with pytest.raises(NumericalError, match=rf"tensor {QUERY} holds 1 number\(s\)"):
        project(pair[0], aligned, finetuned, tmp_path / "out", recipe=FilterRecipe(fraction=0.25, dtype="float16"))


def test_what_was_not_finite_before_is_not_counted() -> None:
    read = torch.tensor([1.0, torch.inf, torch.nan, 7e4, -7e4])
    check_range("w", read[:3], read[:3].half())
    check_range("w", read.bfloat16(), read)
    check_range("w", torch.arange(3), torch.arange(3).half())
    with pytest.raises(NumericalError, match="holds 2 number"):
        check_range("w", read, read.half())
