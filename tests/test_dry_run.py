"""A dry run refuses what the command itself would refuse before it writes, in the same words, and writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCli
from project_fixtures import Three


def both(run_cli: RunCli, *arguments: object) -> str:
    """What the dry run says, which is what the command says."""
    planned = run_cli(*arguments, "--dry-run")
    done = run_cli(*arguments)
    assert planned.returncode == done.returncode == 2, planned.stderr + done.stderr
    assert planned.stderr == done.stderr and not planned.stdout
    return str(planned.stderr)


def command(name: str, three: Three, out: Path, *options: object) -> list[Any]:
    models = three if name == "project" else three[:2]
    settings = {"project": ["--fraction", "0.25"], "adapter": ["--as-adapter"]}.get(name, [])
    return ["harden" if name == "adapter" else name, *models, out, *settings, *options]


def target(name: str, folder: Path) -> Path:
    return folder / ("factors.safetensors" if name == "decompose" else "out")


@pytest.mark.parametrize("name", ["harden", "adapter", "project", "decompose"])
def test_another_job_in_the_output(three: Three, run_cli: RunCli, tmp_path: Path, name: str) -> None:
    out = target(name, tmp_path)
    first = run_cli(*command(name, three, out, "--seed", 1))
    assert first.returncode == 0, first.stderr
    assert "another job" in both(run_cli, *command(name, three, out, "--seed", 2))
    assert run_cli(*command(name, three, out, "--seed", 1, "--dry-run")).returncode == 0
    assert run_cli(*command(name, three, out, "--seed", 2, "--overwrite", "--dry-run")).returncode == 0


@pytest.mark.parametrize("name", ["harden", "adapter", "project", "decompose"])
def test_a_device_that_is_not_there(three: Three, run_cli: RunCli, tmp_path: Path, name: str) -> None:
    assert "device 'foo' is not known" in both(run_cli, *command(name, three, target(name, tmp_path), "--device", "foo"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["harden", "adapter", "decompose"])
def test_two_models_of_the_same_weights(three: Three, run_cli: RunCli, tmp_path: Path, name: str) -> None:
    base, _, finetuned = three
    twin = shutil.copytree(base, tmp_path / "twin")
    assert "deltas are zero" in both(run_cli, *command(name, (base, twin, finetuned), target(name, tmp_path / "new")))


def test_a_file_in_the_place_of_the_factors(three: Three, run_cli: RunCli, tmp_path: Path) -> None:
    out = target("decompose", tmp_path)
    out.write_text("mine")
    assert "holds no factors of lox-merge" in both(run_cli, *command("decompose", three, out))
    assert out.read_text() == "mine"


@pytest.mark.parametrize("name", ["harden", "adapter", "project"])
def test_an_output_that_is_a_link_to_nothing(three: Three, run_cli: RunCli, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    assert "is a link to a folder that is not there" in both(run_cli, *command(name, three, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tensors_that_were_skipped_are_named(three: Three, run_cli: RunCli, tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from tiny_models import read_tensors

    base, aligned, finetuned = three
    spoilt = shutil.copytree(aligned, tmp_path / "spoilt")
    tensors = read_tensors(spoilt)
    for path in spoilt.glob("*.safetensors*"):
        path.unlink()
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, spoilt / "model.safetensors", metadata={"format": "pt"})
    for name in ("harden", "adapter", "project", "decompose"):
        out, result = target(name, tmp_path / name), tmp_path / f"{name}.json"
        out.parent.mkdir()
        done = run_cli(*command(name, (base, spoilt, finetuned), out, "--skip-non-finite", "--json", result))
        assert done.returncode == 0, done.stderr
        assert "NaN or Inf" in done.stdout and "lm_head.weight" in done.stdout, name
        assert json.loads(result.read_text())["command"]
