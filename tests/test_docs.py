"""What README, docs and examples show runs as it stands."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import RunCli
from forked_cli import run_forked
from lab_fixtures import TOY_CACHE
from tiny_models import make_pair

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "docs"))

from check_commands import commands, pages, problem  # noqa: E402

DOCUMENTED = list(dict.fromkeys(command for page in pages() for command in commands(page.read_text(encoding="utf-8"))))
# Prompts, judges and files of one's own are not at hand here, nor is the Hub.
HARDENINGS = [line for line in DOCUMENTED if line.startswith("lox-merge harden BASE ALIGNED OUT")]
ON_BASE_AND_ALIGNED = [line for line in HARDENINGS if not any(option in line for option in ("--prompts", "--factors", "--push", "--requantise"))]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    for path, name in zip(make_pair(folder / "pair", "llama"), ("BASE", "ALIGNED"), strict=True):
        path.rename(folder / name)
    return folder


def test_every_documented_command_is_known() -> None:
    assert len(DOCUMENTED) > 12
    assert {command: problem(command) for command in DOCUMENTED if problem(command)} == {}


def test_the_check_sees_wrong_commands() -> None:
    assert "No such option" in (problem("lox-merge harden A B C --no-such") or "")
    assert problem("lox-merge no-such-command") == "no such command"
    assert problem("make nothing") == "no such make target"
    assert problem("python examples/nothing.py") == "no such file"


@pytest.mark.parametrize("command", ON_BASE_AND_ALIGNED)
def test_documented_hardenings_run(pair: Path, run_cli: RunCli, tmp_path: Path, command: str) -> None:
    for name in ("BASE", "ALIGNED"):
        shutil.copytree(pair / name, tmp_path / name)
    done = run_cli(*shlex.split(command)[1:], cwd=tmp_path)
    if "--device cuda" in command and not torch.cuda.is_available():
        assert done.returncode == 2 and "device cuda is not there" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "OUT" / "lox_merge.json").exists() == ("--dry-run" not in command)


def test_the_python_example_runs(pair: Path, toy_pair_seed0: object, tmp_path: Path) -> None:
    script = (ROOT / "examples" / "harden_from_python.py").read_text(encoding="utf-8")
    toy = run_forked([], {**os.environ, "LOX_MERGE_CACHE": str(TOY_CACHE.parent)}, program=script)
    assert toy.returncode == 0, toy.stderr
    assert "tensors edited, mean R_align" in toy.stdout
    own = run_forked([pair / "BASE", pair / "ALIGNED", tmp_path / "out"], os.environ, program=script)
    assert own.returncode == 0, own.stderr
    assert (tmp_path / "out" / "lox_merge.json").exists()
