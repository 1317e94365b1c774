"""Files in formats of weights beside the weights: those that the model needs come along, the same weights in another form do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make_pair

from lox_merge import Recipe, harden
from lox_merge.errors import LoxMergeWarning
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.verify import verify

NEEDED = [
    "spk_dict.pt",
    "voices.npz",
    "vocab.bin",
    "2_Dense/model.safetensors",
    "2_Dense/pytorch_model.bin",
    "modeling_own.py",
    "modeling.index.json.txt",
]
OTHER_FORMS = [
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "model.pt", "tf_model.h5", "flax_model.msgpack"),
    *("consolidated.00.pth", "consolidated.safetensors", "model-Q4_K_M.gguf", "model-00001-of-00009.safetensors", "rust_model.ot"),
    *("optimizer.pt", "optimizer_0.bin", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "global_step9/mp_rank_00_model_states.pt"),
]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make_pair(tmp_path / "pair", "llama", hidden=64)


def test_what_a_model_needs_comes_along(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = pair
    for name in (*NEEDED, *OTHER_FORMS):
        (aligned / name).parent.mkdir(exist_ok=True)
        (aligned / name).write_bytes(name.encode())
    out = harden(base, aligned, tmp_path / "out", recipe=Recipe(rank=2)).out
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert set(NEEDED) <= written and not set(OTHER_FORMS) & written
    assert all((out / name).read_bytes() == name.encode() for name in NEEDED)
    assert verify(out, base=base, aligned=aligned).problems == []


def test_weights_of_an_unknown_name_are_named_and_left(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A second copy of the weights would be of the model that was not hardened."""
    base, aligned = pair
    size = sum(file.stat().st_size for file in aligned.glob("*.safetensors"))
    save_file({"w": torch.zeros(size // 2, dtype=torch.uint8)}, aligned / "qwen.safetensors")
    with pytest.warns(LoxMergeWarning, match=r"qwen\.safetensors of aligned is not copied"):
        out = harden(base, aligned, tmp_path / "out", recipe=Recipe(rank=2)).out
    assert not (out / "qwen.safetensors").exists()


def test_an_adapter_beside_whole_weights_is_named_and_left(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = pair
    shutil.copytree(aligned, tmp_path / "aligned")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "aligned" / name).write_text("{}")
    plan = plan_hardening(base, tmp_path / "aligned", tmp_path / "out")
    assert any("holds an adapter beside whole weights" in text for text in plan.warnings)
    assert not {"adapter_config.json", "adapter_model.safetensors"} & set(plan.side_files)
