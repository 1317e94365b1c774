"""The functions on one matrix agree with the jobs on checkpoints, and refuse what the jobs refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_program
from project_fixtures import Three
from safetensors.torch import load_file, save_file

from lox_merge import FilterRecipe, Recipe, filter_matrix, harden, lox, project, truncated_svd
from lox_merge.errors import RecipeError
from lox_merge.maths import RankRule, parse_rank

NAME = "model.layers.0.mlp.up_proj.weight"


def in_float64(folder: Path, out: Path, seed: int) -> tuple[Path, torch.Tensor]:
    """The checkpoint in float64, moved by what float32 cannot hold. Returns it and one of its matrices."""
    out.mkdir()
    noise: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "dtype": torch.float64}
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    wide = {name: tensor.double() * (1 + 1e-9 * torch.randn(tensor.shape, **noise)) for name, tensor in found.items()}
    save_file(wide, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out, wide[NAME]


def test_float64_weights_are_subtracted_in_float64(three: Three, tmp_path: Path) -> None:
    """All three are copies of one model that differ by less than float32 holds: in float32 most of every delta is lost."""
    (base, first), (aligned, second), (finetuned, third) = (in_float64(three[0], tmp_path / name, seed) for seed, name in enumerate("abc"))
    harden(base, aligned, tmp_path / "hardened")
    assert torch.equal(load_file(tmp_path / "hardened" / "model.safetensors")[NAME], lox(first, second))
    exact = second + 1.25 * torch.linalg.multi_dot(leading(second - first, 6))
    assert float((lox(first, second) - exact).norm()) <= 1e-5 * float((exact - second).norm())
    project(base, aligned, finetuned, tmp_path / "filtered", recipe=FilterRecipe(rank=3))
    assert torch.equal(load_file(tmp_path / "filtered" / "model.safetensors")[NAME], filter_matrix(first, second, third, 3))


def leading(delta: torch.Tensor, rank: int) -> list[torch.Tensor]:
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return [left[:, :rank], values[:rank].diag(), right[:rank]]


def test_ranks_may_be_rules_and_texts() -> None:
    generator = torch.Generator().manual_seed(0)
    base, aligned, finetuned = (torch.randn(40, 30, generator=generator) for _ in range(3))
    for text in ("4", "10%", "energy:0.5", "full", "noise-floor"):
        assert torch.equal(lox(base, aligned, rank=text), lox(base, aligned, rank=parse_rank(text)))
    assert truncated_svd(aligned - base, "10%").rank == 3
    assert torch.equal(filter_matrix(base, aligned, finetuned, "10%"), filter_matrix(base, aligned, finetuned, 3))
    with pytest.raises(RecipeError, match="rank energy:0.5 depends on the spectrum".replace(".", r"\.")):
        filter_matrix(base, aligned, finetuned, "energy:0.5")
    with pytest.raises(RecipeError, match="rank 'ten' is not understood"):
        lox(base, aligned, rank="ten")
    assert Recipe(rank=parse_rank("10%")).rank == parse_rank("10%")


# Without the shape checks of the tests, which would see these first.
_MISSPELT = """
import torch
from lox_merge import filter_matrix, lox
from lox_merge.errors import RecipeError
from lox_merge.maths import RankRule
one = torch.eye(4)
calls = {
    "mode 'paralel'": lambda: filter_matrix(one, 2 * one, 3 * one, 1, mode="paralel"),
    "basis 'Top'": lambda: filter_matrix(one, 2 * one, 3 * one, 1, basis="Top"),
    "side 'Left'": lambda: filter_matrix(one, 2 * one, 3 * one, 1, side="Left"),
    "rounding 'stochastik'": lambda: lox(one, 2 * one, rounding="stochastik"),
    "rank rule 'fixd'": lambda: RankRule("fixd", 3),
}
for says, call in calls.items():
    try:
        call()
    except RecipeError as error:
        assert str(error).startswith(f"{says} is not known"), error
    else:
        raise AssertionError(says)
"""


def test_misspelt_choices_are_refused() -> None:
    done = run_program(_MISSPELT)
    assert done.returncode == 0, done.stderr
    assert RankRule("full").kind == "full"
