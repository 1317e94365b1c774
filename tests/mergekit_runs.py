"""Merges of tiny checkpoints by the methods that `lox-merge yaml` adds to mergekit, and what they have to give."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny_models import read_tensors

from lox_merge.cli.yaml import yaml_command
from lox_merge.maths.edits import lox_edit
from lox_merge.maths.rank import parse_rank

CONFIGS = Path(__file__).parent.parent / "merge_configs"
Pair = tuple[Path, Path]
Tensors = dict[str, torch.Tensor]


def write_config(path: Path, pair: Pair, **settings: Any) -> Path:
    """The smallest configuration for a pair, with changes; a setting of None removes it."""
    config = {"merge_method": "lox", "base_model": str(pair[0]), "models": [{"model": str(pair[1])}], **settings}
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


def command(config: Path, out: Path, *options: str) -> None:
    yaml_command.main([str(config), str(out), "--quiet", *options], standalone_mode=False)


def merge(folder: Path, pair: Pair, *options: str, **settings: Any) -> Tensors:
    command(write_config(folder / "config.yaml", pair, **settings), folder / "out", *options)
    return read_tensors(folder / "out")


def edit(base: torch.Tensor, aligned: torch.Tensor, rank: int | str = 6, alpha: float = 1.25) -> torch.Tensor:
    if aligned.ndim < 2 or alpha == 0 or rank == 0:
        return aligned
    return lox_edit(base, aligned, parse_rank(rank), alpha, seed=0)[0]


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_nothing_left(folder: Path) -> None:
    assert not list(folder.glob("out*"))


def layer_of(name: str) -> int | None:
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def expect(pair: Pair, parameters: Any) -> Tensors:
    """What the aligned model becomes under `parameters(name) -> (rank, alpha)`."""
    base, aligned = read_tensors(pair[0]), read_tensors(pair[1])
    return {name: edit(base[name], aligned[name], *parameters(name)) for name in aligned}
