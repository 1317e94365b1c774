"""Sound files of every kind, made once: what cases are spoilt from, and beside which they are read."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters import make_adapter
from tiny_models import INDEX, make_pair

from lox_merge import Recipe, harden
from lox_merge.jobs.decompose import decompose

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Materials:
    """folder: everything lies in here. base has one file, aligned two and an index, single the same in one."""

    folder: Path
    base: Path
    aligned: Path
    single: Path
    adapter: Path
    hardened: Path
    factors: Path

    def copy(self, source: Path, name: str) -> Path:
        """A copy to be spoilt, beside the others."""
        target = self.folder / "work" / name
        shutil.copytree(source, target)
        return target

    def place(self, name: str) -> Path:
        """A fresh path inside the folder."""
        (self.folder / "work").mkdir(exist_ok=True)
        return self.folder / "work" / name


def make_materials(folder: Path) -> Materials:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, aligned = make_pair(folder / "pair", "llama", base_shards=1, aligned_shards=2, hidden=16, layers=1, vocabulary=32)
        _, single = make_pair(folder / "single", "llama", base_shards=1, aligned_shards=1, hidden=16, layers=1, vocabulary=32)
        adapter = make_adapter(base, folder / "adapter", target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 3}, r=2)
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "base"}))
        harden(base, aligned, folder / "hardened", recipe=Recipe(rank=2))
        factors = folder / "factors.safetensors"
        decompose(base, aligned, factors, recipe=Recipe(rank=3))
    return Materials(folder, base, aligned, single, adapter, folder / "hardened", factors)


def split_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """JSON header and data of a safetensors file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def looks_like_a_model(out: Path) -> bool:
    """Whether transformers would begin to load this folder."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    return "config.json" in names and bool(names & {WEIGHTS, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"})


def remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
