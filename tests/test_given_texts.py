"""Texts of a request: paths that are empty or at home, patterns for tied models, terminals that know few letters, settings without use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RunCli
from tiny_models import make_pair

from lox_merge import FilterRecipe, Recipe, harden, project
from lox_merge.errors import OutputError, PlanError, RecipeError
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.verify import verify

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("tied"), "qwen3")


@pytest.fixture(scope="module")
def output(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harden(*pair, tmp_path_factory.mktemp("output") / "out", recipe=Recipe(dtype="float32")).out


def test_a_home_folder_is_found_where_no_shell_does_it(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plan_hardening(*pair, "~/out").out == tmp_path / "out"
    # Nobody's home: the name itself, which nothing is found under.
    with pytest.raises(PlanError, match="base: there is no folder ~nobody-of-this-name/base"):
        plan_hardening("~nobody-of-this-name/base", pair[1], tmp_path / "out")


def test_an_empty_text_is_not_the_current_folder(pair: Pair, run_cli: RunCli, tmp_path: Path) -> None:
    base, aligned = pair
    with pytest.raises(PlanError, match=r"base is empty\. Give a local folder"):
        harden("", aligned, tmp_path / "out")
    with pytest.raises(OutputError, match="the output is empty"):
        harden(base, aligned, "")
    with pytest.raises(OutputError, match="the output is empty"):
        project(base, aligned, base, " ", recipe=FilterRecipe(rank=1))
    for given in (["harden", base, aligned, ""], ["decompose", base, aligned, ""], ["harden", base, "", "out"], ["verify", ""]):
        done = run_cli(*given, cwd=tmp_path)
        assert done.returncode == 2 and "is empty" in done.stderr, given
    assert not list(tmp_path.iterdir())


def test_patterns_for_the_output_head_serve_tied_models_too(tied: Pair, tmp_path: Path) -> None:
    excluded = harden(*tied, tmp_path / "out", recipe=Recipe(exclude=("lm_head",), dtype="float32"))
    assert {tensor["name"] for tensor in excluded.manifest["tensors"] if tensor["action"] == "edited"} >= {"model.embed_tokens.weight"}
    with pytest.raises(PlanError, match="edits no tensor at all"):
        plan_hardening(*tied, tmp_path / "none", recipe=Recipe(include=("lm_head",)))
    with pytest.raises(PlanError, match="'lm_haed' matches no tensor"):
        plan_hardening(*tied, tmp_path / "none", recipe=Recipe(exclude=("lm_haed",)))


def test_the_example_ends_in_the_error_s_own_words(tied: Pair, tmp_path: Path) -> None:
    example = Path(__file__).parent.parent / "examples" / "harden_from_python.py"
    done = subprocess.run(
        [sys.executable, str(example), str(tied[0]), str(tied[0]), str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stderr.startswith("error: base and aligned are the same checkpoint"), done.stderr


def test_a_terminal_that_knows_few_letters(pair: Pair, run_cli: RunCli, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    done = run_cli("harden", *pair, tmp_path / "out", "--dtype", "float32", "--json", result, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "sin angle ? " in done.stdout and json.loads(result.read_text())["command"] == "harden"
    letters = ["--include", "lm_head|é*", "--dry-run", "--json", "-"]
    shown = run_cli("harden", *pair, tmp_path / "new", *letters, PYTHONIOENCODING="ascii")
    assert json.loads(shown.stdout)["recipe"]["include"] == ["lm_head|é*"], shown.stderr


def test_the_result_is_on_disk_before_it_is_shown(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lox_merge.cli import show
    from lox_merge.cli.harden import harden_command

    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(show, "print_result", closed)
    arguments = [*map(str, pair), str(tmp_path / "out"), "--dtype", "float32", "--json", str(tmp_path / "result.json")]
    with pytest.raises(BrokenPipeError):
        harden_command.main(arguments, standalone_mode=False)
    assert json.loads((tmp_path / "result.json").read_text())["command"] == "harden"


def test_help_says_whose_dtypes_are_kept(run_cli: RunCli) -> None:
    assert "(default: as in ALIGNED)" in " ".join(run_cli("harden", "--help").stdout.split())
    assert "(default: as in FINETUNED)" in " ".join(run_cli("project", "--help").stdout.split())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--offline", "--sample", 2], "--sample is about making its weights again"),
        (["--offline", "--base", "base", "--aligned", "aligned"], "--base, --aligned are about making"),
        (["--finetuned", "finetuned"], "was made from base and aligned: it has no finetuned checkpoint"),
    ],
)
def test_settings_of_verify_without_use(output: Path, run_cli: RunCli, given: list[object], says: str) -> None:
    done = run_cli("verify", output, *given)
    assert done.returncode == 2 and says in done.stderr
    assert run_cli("verify", output, "--offline").returncode == 0


def test_a_judge_without_a_search(pair: Pair, run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("harden", *pair, tmp_path / "out", "--judge", "keyword")
    assert done.returncode == 2 and "--judge is about choosing the rank: it goes with --rank search" in done.stderr


def test_verify_needs_no_name_of_its_own_in_the_temporary_folder(pair: Pair, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lox-merge-verify").write_text("somebody else's")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert verify(output, base=pair[0], aligned=pair[1]).ok
    assert [path.name for path in tmp_path.iterdir()] == ["lox-merge-verify"]


@pytest.mark.parametrize("alpha", ["1e155", "1e200"])
def test_an_edit_beyond_every_number_is_said_to_overflow(pair: Pair, run_cli: RunCli, tmp_path: Path, alpha: str) -> None:
    done = run_cli("harden", *pair, tmp_path / "out", "--rank", "full", "--alpha", alpha)
    assert done.returncode == 1 and "overflows bfloat16; use a smaller alpha" in done.stderr


def test_an_alpha_that_is_nothing_in_float32() -> None:
    with pytest.raises(RecipeError, match="alpha is 1e-45: in float32 it is no more than 0"):
        Recipe(alpha=1e-45)
    with pytest.raises(RecipeError, match="alpha for 'mlp' is 1e-60"):
        Recipe(alpha_pattern=(("mlp", 1e-60),))
