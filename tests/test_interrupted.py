"""Ctrl-C and a scheduler's SIGTERM in the middle of a measurement: one line, and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import RunCli

from lox_merge.lab.checkpoints import ToyPair

JUDGE = """
import os, signal, time

def judge(prompt, reply):
    os.kill(os.getpid(), signal.{sent})
    time.sleep(30)
    return True
"""


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_a_command_that_measures(toy_pair_seed0: ToyPair, tmp_path: Path, run_cli: RunCli, sent: str) -> None:
    (tmp_path / "prompts.txt").write_text("v1 a1 n1\n")
    (tmp_path / "own.py").write_text(JUDGE.format(sent=sent))
    asked = ("--prompts", tmp_path / "prompts.txt", "--judge", f"python:{tmp_path / 'own.py'}:judge", "--max-new-tokens", 2, "--no-cache")
    done = run_cli("asr", toy_pair_seed0.aligned, *asked, "--device", "cpu")
    assert done.returncode == 1 and done.stderr.rstrip().endswith("error: interrupted") and "Traceback" not in done.stderr, done.stderr
