"""Files in formats of weights beside the weights: those that the model needs come along, the same weights in another form do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from adapters import make_adapter
from safetensors.torch import load_file, save_file
from tiny_models import INDEX, make_pair

from lox_merge import Recipe, harden
from lox_merge.errors import LoxMergeWarning
from lox_merge.jobs.harden import execute, plan_hardening
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
NEEDED += ["scheduler.py", "optimizer_utils.py", "scaler.json", "scheduler/scheduler.py"]
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
        (aligned / name).parent.mkdir(parents=True, exist_ok=True)
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


def test_many_parts_are_one_copy_of_the_weights(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """None of them is large by itself."""
    base, aligned = pair
    size = sum(file.stat().st_size for file in aligned.glob("*.safetensors"))
    (aligned / "int8").mkdir()
    for number in range(30):
        (aligned / "int8" / f"model-{number:05d}-of-00030.safetensors").write_bytes(bytes(size // 60))
        (aligned / f"part-{number:05d}-of-00030.bin").write_bytes(bytes(size // 60))
    (aligned / "int8" / INDEX).write_text("{}")
    plan = plan_hardening(base, aligned, tmp_path / "out")
    assert not [name for name in plan.side_files if "int8" in name or "part" in name]
    assert any("int8/model-00000-of-00030.safetensors" in text and "not copied" in text for text in plan.warnings)


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("rename", ["weights-{}", "sub/{}"])
def test_shards_of_the_model_below_an_adapter_are_weights(tmp_path: Path, rename: str, dtype: str | None) -> None:
    """Whatever they are called: taken for files beside the adapter they would be written last, over the edited ones."""
    base, _ = make_pair(tmp_path / "pair", "llama", base_shards=4)
    index = json.loads((base / INDEX).read_text())
    for file in sorted(base.glob("*.safetensors")):
        target = base / rename.format(file.name)
        target.parent.mkdir(exist_ok=True)
        file.rename(target)
    index["weight_map"] = {name: rename.format(file) for name, file in index["weight_map"].items()}
    (base / INDEX).write_text(json.dumps(index))
    (tmp_path / "whole").mkdir()
    tensors = {name: tensor for file in base.rglob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(tensors, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", tmp_path / "whole")
    (base / "spk_dict.pt").write_bytes(bytes(2000))
    adapter = make_adapter(tmp_path / "whole", tmp_path / "adapter", r=8)
    plan = plan_hardening(base, adapter, tmp_path / "out", recipe=Recipe(rank=2, dtype=dtype), base_is_right=True)
    assert "spk_dict.pt" in plan.side_files and not [text for text in plan.warnings if "not copied" in text]
    out = execute(plan).out
    assert verify(out, base=base, aligned=adapter).problems == []
