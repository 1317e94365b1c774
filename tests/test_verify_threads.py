"""Outputs are verified on as many cores a matrix as they were made with: the number decides the order of sums."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from lox_merge.jobs.harden import harden
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.verify import verify


def test_the_bytes_do_not_depend_on_the_threads_of_who_verifies(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = {f"layers.{number}.weight": (normal(320, 9001) * 0.02).bfloat16() for number in range(4)}
    low = {name: normal(320, 9) @ normal(9, 9001) * 2e-4 for name in base}
    aligned = {name: (weight + low[name] + normal(320, 9001) * 1e-4).bfloat16() for name, weight in base.items()}
    for name, weights in (("base", base), ("aligned", aligned)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        harden(tmp_path / "base", tmp_path / "aligned", tmp_path / "out", recipe=Recipe(rank=40))
        found = verify(tmp_path / "out", base=tmp_path / "base", aligned=tmp_path / "aligned")
    finally:
        torch.set_num_threads(before)
    assert found.problems == [] and found.rounded_apart == [] and found.tensors_recomputed == 4
