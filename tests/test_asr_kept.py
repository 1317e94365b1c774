"""What `lox-merge asr` leaves when it fails late, and what it refuses at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lox_merge.cli.asr import _run, asr_command
from lox_merge.cli.main import cli
from lox_merge.errors import RequestError
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.safety.judges.factory import make_judge
from lox_merge.safety.prompts import load_prompts


def test_transcripts_are_there_when_a_utility_fails(toy_pair_seed0: ToyPair, attack_files: Path, tmp_path: Path) -> None:
    prompts, model = attack_files / "prompts.csv", str(toy_pair_seed0.aligned)
    asked = ["--prompts", str(prompts), "--max-new-tokens", "2", "--device", "cpu", "--no-cache"]
    options = asr_command.make_context("asr", [model, *asked]).params | {"adapter_base": None, "decode": False}

    def failing(_source: Any) -> dict[str, float | None]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _run((model,), load_prompts(prompts, limit=3), [make_judge("keyword")], failing, options, tmp_path / "t.jsonl")  # type: ignore[arg-type]
    assert len((tmp_path / "t.jsonl").read_text().splitlines()) == 3


def test_a_seed_that_nothing_is_drawn_by_is_refused(attack_files: Path) -> None:
    with pytest.raises(RequestError, match="--seed draws the --limit prompts"):
        cli.main(["asr", "model", "--prompts", str(attack_files / "prompts.csv"), "--seed", "1"], standalone_mode=False)
