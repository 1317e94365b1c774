"""The claims of docs/claims.md on the toy pair: those cheap enough to ask here, and the page's commands on the files that it names."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import RunCli
from lab_fixtures import TOY_CACHE

from lox_merge.lab.checkpoints import ToyPair

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "docs")]

import toy_claims  # noqa: E402
from check_commands import commands  # noqa: E402

BY_HAND = [command for command in commands((ROOT / "docs" / "claims.md").read_text(encoding="utf-8")) if command.startswith("lox-merge")]
# What the first command of the page leaves beside the files, by its whole run.
RUNS = ("behaviour", "brittleness", "landscape-aligned", "landscape-line", "activations")


@pytest.fixture(scope="module")
def folder(toy_pair_seed0: ToyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("claims")
    setting = toy_claims.make_setting(0, TOY_CACHE, out)
    toy_claims.write_files(setting, out)
    held = {claim.name: claim for claim in toy_claims.of_behaviour(setting, lambda _name, _found: None)}
    assert held["alignment is a few tokens deep"].held
    assert held["fine-tuned models go back towards base"].held
    return out


def test_no_attacked_model_is_written(folder: Path) -> None:
    with_weights = {file.parent.name for file in folder.rglob("*.safetensors")}
    assert with_weights == {"base", "aligned", "hardened"}


@pytest.mark.parametrize("command", [command for command in BY_HAND if " report " not in command], ids=lambda text: " ".join(text.split()[1:4]))
def test_commands_by_hand_run_as_they_stand(folder: Path, run_cli: RunCli, command: str) -> None:
    """On fewer of the texts and prompts, which is faster."""
    done = run_cli(*shlex.split(command)[1:], "--limit", 10, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d\.\d", done.stdout)


def test_the_page_reports_what_the_program_writes(folder: Path) -> None:
    (report,) = (command for command in BY_HAND if " report " in command)
    assert [Path(word).stem for word in report.split() if word.endswith(".json")] == list(RUNS)
    source = (ROOT / "examples" / "toy_claims.py").read_text(encoding="utf-8")
    assert all(f'save("{name}"' in source or f'save(f"{name.partition("-")[0]}-' in source for name in RUNS)
