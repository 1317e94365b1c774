"""What another machine's sums explain of a difference, and what they do not."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lox_merge.jobs.harden import harden
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.verify import verify
from lox_merge.jobs.verify_values import code_difference, copy_difference, edit_difference

NAME = "layers.0.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One matrix, too large for an exact SVD; the edit of its first rows nearly cancels them, so that what is left is small."""
    folder, generator = tmp_path_factory.mktemp("values"), torch.Generator().manual_seed(0)
    delta = torch.randn(300, 6, generator=generator) @ torch.randn(6, 500, generator=generator) * 1e-3
    weight = torch.randn(300, 500, generator=generator) * 0.02
    weight[:40] = -1.25 * delta[:40]
    noise = torch.randn(300, 500, generator=generator) * 1e-4
    for name, values in (("base", weight - delta - noise), ("aligned", weight)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
        save_file({NAME: values.bfloat16()}, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder / "base", folder / "aligned"


def _written(pair: tuple[Path, Path], out: Path, recipe: Recipe) -> Path:
    return harden(*pair, out, recipe=recipe).out


def _put(out: Path, tensor: torch.Tensor) -> None:
    """Other values, and their hash in the manifest."""
    file, path = out / "model.safetensors", out / "lox_merge.json"
    save_file({NAME: tensor}, file, metadata={"format": "pt"})
    manifest = json.loads(path.read_text())
    manifest["output"]["shards"][0] |= {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "size": file.stat().st_size}
    path.write_text(json.dumps(manifest))


def _with_another_start(out: Path) -> None:
    """The SVD of who verifies begins elsewhere, and ends as near to the truth as the tolerance asks: all that another machine may do."""
    path = out / "lox_merge.json"
    manifest = json.loads(path.read_text())
    manifest["job"]["recipe"]["seed"] = 1
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_machine_rounds_apart(pair: tuple[Path, Path], tmp_path: Path, dtype: str, rounding: str) -> None:
    out = _written(pair, tmp_path / "out", Recipe(dtype=dtype, rounding=rounding))  # type: ignore[arg-type]
    _with_another_start(out)
    found = verify(out, base=pair[0], aligned=pair[1])
    assert found.problems == [] and found.rounded_apart == [NAME]


def test_other_instructions_round_apart_at_most(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = _written(pair, tmp_path / "out", Recipe())
    old = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    call = [sys.executable, "-m", "lox_merge.cli.main", "verify", out, "--base", pair[0], "--aligned", pair[1], "--device", "cpu"]
    done = subprocess.run([str(word) for word in call], env={**os.environ, **old}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_value_of_another_machine_is_enough(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Small tensors differ in a single value. It is where the exact result is near the midpoint; anywhere else it is another edit."""
    out = _written(pair, tmp_path / "out", Recipe())
    written = load_file(out / "model.safetensors")[NAME]
    exact = load_file(_written(pair, tmp_path / "exact", Recipe(dtype="float32")) / "model.safetensors")[NAME]
    units = torch.finfo(torch.bfloat16).eps * 2 ** torch.frexp(exact).exponent.sub(1).float()
    off = (exact - written.float()).abs() / units
    assert off.max() > 0.49 and off.min() < 0.1
    for place, sound in ((off[40:].argmax() + 40 * 500, True), (off[40:].argmin() + 40 * 500, False)):
        forged = written.clone()
        towards = torch.where(exact.view(-1)[place] > written.view(-1)[place].float(), torch.inf, -torch.inf).bfloat16()
        forged.view(-1)[place] = torch.nextafter(written.view(-1)[place], towards)
        _put(out, forged)
        found = verify(out, base=pair[0], aligned=pair[1])
        if sound:
            assert found.problems == [] and found.rounded_apart == [NAME]
        else:
            assert f"1 of {written.numel():,} values differ" in found.problems[0]


def test_infinity_hides_no_other_difference() -> None:
    expected = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0, 2.0])

    def difference(written: torch.Tensor, dtype: torch.dtype, rounding: str = "nearest") -> str:
        found = expected.to(dtype)
        return edit_difference(written.to(dtype), found, found, lambda: expected, tolerance=1e-3, rounding=rounding)  # type: ignore[arg-type]

    assert difference(expected + torch.tensor([0, 0, 0, 1e-5, 0]), torch.float32) == ""
    for dtype in (torch.float32, torch.bfloat16):
        assert difference(expected, dtype) == ""
        assert "2 of 5 values differ, by up to 1" in difference(expected + torch.tensor([0, 0, 0, 1.0, 1.0]), dtype)
        assert "1 of 5 values differ" in difference(torch.tensor([torch.inf, torch.inf, torch.nan, 1.0, 2.0]), dtype)
    assert "1 of 5 values differ" in difference(expected + torch.tensor([0, 0, 0, 0, 2.0**-6]), torch.bfloat16)
    assert difference(expected, torch.bfloat16, "stochastic") == ""
    assert "1 of 5 values differ" in difference(expected + torch.tensor([0, 0, 0, 0, 2.0**-6]), torch.bfloat16, "stochastic"), "a fifth of all"


def test_copies_equal_bit_by_bit() -> None:
    zeros = torch.zeros(4)
    assert copy_difference(-zeros, zeros) == "zeros of another sign, or NaN of other bits"
    assert copy_difference(zeros + 1e-30, zeros) == "4 of 4 values differ, by up to 1e-30"
    assert copy_difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == "1 of 2 values differ"


def test_codes_may_be_neighbours_here_and_there() -> None:
    codes = torch.zeros(100, dtype=torch.int8)
    near, far = codes.clone(), codes.clone()
    near[3], far[3] = 1, 2
    assert code_difference(near, codes) == ""
    assert code_difference(far, codes) == "1 of 100 codes differ, by up to 2 steps"
    near[:5] = 1
    assert code_difference(near, codes) == "5 of 100 codes differ, by up to 1 steps"
    numbers = torch.tensor([1.0, -1.0] * 50).to(torch.float8_e4m3fn)
    assert code_difference(numbers, numbers) == ""
    assert "50 of 100 codes differ" in code_difference(numbers.float().abs().to(torch.float8_e4m3fn), numbers)
