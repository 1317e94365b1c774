"""The command in a card: pasted, it makes the same output again."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from adapters import make_adapter
from click.testing import CliRunner
from quantised_models import pair_in_forms
from tiny_models import make_pair

from lox_merge import Recipe, harden
from lox_merge.cli.main import cli
from lox_merge.errors import RequestError
from lox_merge.maths.rank import parse_rank
from lox_merge.publish.command import harden_command, shortest

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
from check_commands import problem


def pasted(out: Path, again: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The command, run where folders of the sources' names are: its output has the manifest of `out`, byte for byte."""
    command = harden_command(json.loads((out / "lox_merge.json").read_text()), again.name)
    words = shlex.split(command)
    assert words[:2] == ["lox-merge", "harden"] and problem(command) is None
    monkeypatch.chdir(again.parent)
    done = CliRunner().invoke(cli, words[1:])
    assert done.exit_code == 0, done.output
    assert (again / "lox_merge.json").read_bytes() == (out / "lox_merge.json").read_bytes()
    return command


def test_the_command_makes_the_same_output_again(card_pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((card_pair[2] / "lox_merge.json").read_text())
    for role in (0, 1):
        shutil.copytree(card_pair[role], tmp_path / card_pair[role].name)
    pasted(card_pair[2], tmp_path / "hardened", monkeypatch)
    lines = harden_command({**manifest, "job": {**manifest["job"], "factors": {"rank": "8", "tolerance": 0.001, "seed": 0}}}, "o").splitlines()
    assert lines[0] == "lox-merge decompose base aligned factors.safetensors --rank 8 --tolerance 0.001 --seed 0"
    assert lines[1].endswith("--factors factors.safetensors") and not any(map(problem, lines))
    every = Recipe(rank="full", include=("a b",), linear_only=True, dtype="float32", tolerance=1e-4, seed=3, fused="whole", skip_non_finite=True)
    text = harden_command({**manifest, "job": {**manifest["job"], "recipe": every.to_json()}}, "o")
    for option in (
        "--rank full",
        "--include 'a b'",
        "--linear-only",
        "--skip-non-finite",
        "--dtype float32",
        "--tolerance 0.0001",
        "--seed 3",
        "--fused whole",
    ):
        assert option in text


def test_numbers_with_many_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make_pair(tmp_path, "llama")
    recipe = Recipe(rank="energy:0.123456789", alpha=1.23456789, rank_pattern=(("k_proj", "12.3456789%"),), alpha_pattern=(("v_proj", 0.123456789),))
    harden(*pair, tmp_path / "out", recipe=recipe)
    command = pasted(tmp_path / "out", tmp_path / "again", monkeypatch)
    for words in ("energy:0.123456789", "--alpha 1.23456789", "k_proj=12.3456789%", "v_proj=0.123456789"):
        assert words in command
    assert [shortest(value) for value in (2.0, 1.25, 0.1, 1e-7, 1 / 3)] == ["2", "1.25", "0.1", "1e-07", "0.3333333333333333"]
    for rule in ("6", "full", "10%", "0.1%", "energy:0.9", "33.33333333333%", "noise-floor"):
        assert str(parse_rank(rule)) == rule


@pytest.mark.filterwarnings("ignore::lox_merge.errors.LoxMergeWarning")
@pytest.mark.parametrize("rounding", ["feedback", "nearest"])
def test_a_quantised_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounding: str) -> None:
    models = pair_in_forms(tmp_path, ["fp8"])
    harden(models["base-fp8"], models["aligned-fp8"], tmp_path / "out", recipe=Recipe(requantise=True, rounding=rounding))  # type: ignore[arg-type]
    assert "--requantise" in pasted(tmp_path / "out", tmp_path / "again", monkeypatch)


def test_a_pair_that_looks_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (aligned / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((aligned / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (aligned / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(RequestError, match="--order-is-right"):
        harden(base, aligned, tmp_path / "out")
    harden(base, aligned, tmp_path / "out", order_is_right=True, base_is_right=True)
    command = pasted(tmp_path / "out", tmp_path / "again", monkeypatch)
    assert "--order-is-right" in command and "--base-is-right" not in command


def test_an_adapter_over_a_base_of_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    copy = shutil.copytree(base, tmp_path / "copy")
    with pytest.raises(RequestError, match="--base-is-right"):
        harden(copy, adapter, tmp_path / "out")
    harden(copy, adapter, tmp_path / "out", order_is_right=True, base_is_right=True)
    command = pasted(tmp_path / "out", tmp_path / "again", monkeypatch)
    assert "--base-is-right" in command and "--order-is-right" not in command
    # Said where it is not needed, neither is anything that decides the output.
    harden(base, aligned, tmp_path / "plain")
    harden(base, aligned, tmp_path / "said", order_is_right=True, base_is_right=True)
    assert (tmp_path / "plain" / "lox_merge.json").read_bytes() == (tmp_path / "said" / "lox_merge.json").read_bytes()
