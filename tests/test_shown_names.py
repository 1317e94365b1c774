"""Names and texts of others in tables and bars: square brackets, braces and colons are shown as they are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from conftest import RunCli
from openai_server import OpenAIServer

import lox_merge.cli
from lox_merge.cli.console import plain_console
from lox_merge.cli.progress import byte_progress
from lox_merge.cli.show import print_pairs, print_utility
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.lab.measure import forbidden_prompts
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import draw_requests
from lox_merge.safety.progress import terminal_progress

NAMES = ("m[v1]", "[/INST]", "[bold]y", ":key:", "{x}")


def test_tables_and_their_titles_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_pairs(f"Title {' '.join(NAMES)}", [(name, name) for name in NAMES])
    print_utility("model", [(name, {"[/T] exact": 0.5}) for name in NAMES])
    shown = capsys.readouterr().out
    assert all(shown.count(name) == 4 for name in NAMES), shown
    assert "[/T] exact" in shown and "\x1b" not in shown


def test_a_style_of_our_own_still_works(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_pairs("", [("name", "m[v1]")])
    shown = capsys.readouterr().out
    assert "\x1b[1mname\x1b[0m" in shown and shown.endswith(" m[v1]\n")


@pytest.mark.parametrize("bar", [terminal_progress, byte_progress])
@pytest.mark.parametrize("name", NAMES)
def test_bars_show_names_as_they_are(bar: object, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with bar(3, f"{name}: replies") as shown:  # type: ignore[operator]
        shown.advance(1)
    assert f"{name}: replies" in capsys.readouterr().err


def test_no_command_makes_a_console_of_its_own() -> None:
    """A table printed elsewhere would read names as markup again."""
    folder = Path(lox_merge.cli.__file__).parent
    made = {file.name for file in folder.glob("*.py") if re.search(r"\bConsole\(|\brich import print\b", file.read_text(encoding="utf-8"))}
    assert made == {"console.py", "progress.py"}
    console = plain_console()
    with console.capture() as captured:
        console.print("[/INST] :key: 12")
    assert captured.get() == "[/INST] :key: 12\n"


def test_categories_and_models_named_like_markup_do_not_cost_the_work(tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "p.csv").write_text("goal,category\none,[/INST]\ntwo,[red]\nthree,:key:\n")
    with OpenAIServer(reply_with=lambda body: "Here it is") as served:
        arguments = ["asr", "m[v1]", "m[/v2]", "--endpoint", served.url, "--no-key", "--prompts", "p.csv", "--no-cache"]
        done = run_cli(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("m[v1]", "m[/v2]", "Against m[v1]", "[/INST]", "[red]", ":key:")), done.stdout


def test_a_folder_named_like_markup_heads_its_column(toy_pair_seed0: ToyPair, tmp_path: Path, run_cli: RunCli) -> None:
    shutil.copytree(toy_pair_seed0.aligned, tmp_path / "m[v1]")
    prompt = forbidden_prompts(draw_requests(ToyRecipe(seed=0)).tests).prompts[0].text
    done = run_cli("behaviour", toy_pair_seed0.base, toy_pair_seed0.aligned, "m[v1]", "--next", prompt, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("m[v1]") == 3
