"""Sources that are replaced between plan and run, or after the output was finished: never mixed up, never passed over."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import RunCli
from safetensors.torch import load_file, save_file
from tiny_models import make_pair

from lox_merge import Recipe, harden
from lox_merge.errors import SourceChangedError
from lox_merge.jobs.harden import execute, plan_hardening

Change = Callable[[Path], None]


def replace(path: Path, data: bytes) -> None:
    """As careful programs save: beside it, then renamed over it."""
    beside = path.with_suffix(".new")
    beside.write_bytes(data)
    beside.replace(path)


def other_order(path: Path) -> None:
    """The same tensors, the last one first."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__", {})
    entries, parts, offset = {}, [], 0
    for name in reversed(header):
        begin, end = header[name]["data_offsets"]
        entries[name] = header[name] | {"data_offsets": [offset, offset + end - begin]}
        parts.append(data[begin:end])
        offset += end - begin
    text = json.dumps({"__metadata__": metadata} | entries).encode()
    replace(path, struct.pack("<Q", len(text)) + text + b"".join(parts))


def cut_short(path: Path) -> None:
    replace(path, path.read_bytes()[:-100])


def emptied(path: Path) -> None:
    replace(path, b"")


def other_values(path: Path) -> None:
    changed = {name: tensor + 0.25 for name, tensor in load_file(path).items()}
    save_file(changed, path.with_suffix(".new"), metadata={"format": "pt"})
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [other_order, cut_short, emptied, other_values, os.unlink])
@pytest.mark.parametrize("workers", [1, 2])
def test_replaced_between_plan_and_run(tmp_path: Path, change: Change, workers: int) -> None:
    base, aligned = make_pair(tmp_path, "llama", aligned_shards=3)
    plan = plan_hardening(base, aligned, tmp_path / "out", recipe=Recipe(rank=4))
    change(base / "model.safetensors")
    with pytest.raises(SourceChangedError, match=r"base: .*model\.safetensors"):
        execute(plan, device="cpu", workers=workers)
    assert not (tmp_path / "out" / "lox_merge.json").exists()


def test_replaced_after_it_was_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was mapped to see that the models differ stays the old file; its name is another file's by now."""
    base, aligned = make_pair(tmp_path, "llama", aligned_shards=3)
    plan = plan_hardening(base, aligned, tmp_path / "out", recipe=Recipe(rank=4))
    first = plan.edited[0]
    assert isinstance(plan.base.tensor(first.base_name), torch.Tensor)
    other_values(base / "model.safetensors")
    with pytest.raises(SourceChangedError, match=r"base: .*model\.safetensors changed"):
        execute(plan, device="cpu")


@pytest.mark.parametrize("pickled", [True, False])
def test_weights_of_a_finished_output_that_changed(tmp_path: Path, pickled: bool) -> None:
    base, aligned = make_pair(tmp_path, "llama", aligned_shards=1)
    weights = aligned / "model.safetensors"
    if pickled:
        torch.save(load_file(weights), aligned / "pytorch_model.bin")
        weights.unlink()
        weights = aligned / "pytorch_model.bin"

    def again() -> int:
        return harden(base, aligned, tmp_path / "out", recipe=Recipe(rank=4)).bytes_written

    with pytest.warns(UserWarning) if pickled else pytest.MonkeyPatch.context():
        assert again() and not again()
        if pickled:
            torch.save({name: tensor + 1 for name, tensor in torch.load(weights).items()}, weights)
        else:
            other_values(weights)
        with pytest.raises(SourceChangedError, match=rf"made from other files: aligned: {weights.name} has other contents.*--overwrite"):
            again()


def test_files_beside_the_weights_that_changed(tmp_path: Path, run_cli: RunCli) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    (aligned / "chat_template.jinja").write_text("{{ messages }}")
    asked = ("harden", base, aligned, tmp_path / "out", "--rank", 4, "--dtype", "float32", "--device", "cpu")
    assert run_cli(*asked).returncode == 0
    assert run_cli(*asked).returncode == 0, "config.json is written anew for another dtype, and is no change"
    (aligned / "chat_template.jinja").write_text("{{ messages[0] }}")
    done = run_cli(*asked)
    assert done.returncode == 1 and "aligned: chat_template.jinja has other contents" in " ".join(done.stderr.split()), done.stderr
    assert run_cli(*asked, "--overwrite").returncode == 0
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0] }}"
    config = json.loads((aligned / "config.json").read_text())
    (aligned / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    done = run_cli(*asked)
    assert done.returncode == 1 and "config.json has other contents" in " ".join(done.stderr.split())
