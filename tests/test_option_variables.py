"""Every option of every command is set by the environment variable that its long name gives, as --help says."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import click
import pytest
from conftest import RunCli
from tiny_models import make_pair

from lox_merge.cli.main import cli

ROOT = click.Context(cli, info_name="lox-merge", auto_envvar_prefix="LOX_MERGE")
COMMANDS = cli.list_commands(ROOT)


def opened(name: str) -> tuple[click.Context, list[click.Option]]:
    """A command as the group gives it, and its options."""
    command = cli.get_command(ROOT, name)
    assert command is not None
    return click.Context(command, parent=ROOT, info_name=name), [option for option in command.params if isinstance(option, click.Option)]


def long_names(option: click.Option) -> list[str]:
    return [name.removeprefix("--") for name in option.opts if name.startswith("--")]


def variables(context: click.Context, option: click.Option) -> set[str]:
    """All names that click looks up."""
    return {*(option.envvar or ()), f"{context.auto_envvar_prefix}_{str(option.name).upper()}"}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_has_the_variable_of_its_long_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context, options = opened(name)
    assert options
    for variable in [variable for variable in os.environ if variable.startswith("LOX_MERGE_")]:
        monkeypatch.delenv(variable)
    for option in filter(long_names, options):  # mergekit has options of one letter alone, seen here once its module is loaded
        for long in long_names(option):
            variable = f"LOX_MERGE_{name}_{long}".upper().replace("-", "_")
            monkeypatch.setenv(variable, "given")
            assert option.resolve_envvar_value(context) == "given", variable
            monkeypatch.delenv(variable)
            assert option.resolve_envvar_value(context) is None


@pytest.mark.parametrize("name", COMMANDS)
def test_no_variable_sets_two_options(name: str) -> None:
    context, options = opened(name)
    counts = Counter(variable for option in options for variable in variables(context, option))
    assert [variable for variable, count in counts.items() if count > 1] == []


def test_a_repeatable_option_takes_several_values(monkeypatch: pytest.MonkeyPatch) -> None:
    context, options = opened("asr")
    judge = next(option for option in options if "--judge" in option.opts)
    monkeypatch.setenv("LOX_MERGE_ASR_JUDGES", "keyword")  # by the name of the parameter, as click has it
    assert judge.value_from_envvar(context) == ["keyword"]
    monkeypatch.setenv("LOX_MERGE_ASR_JUDGE", "keyword openai:gpt-4.1")
    assert judge.value_from_envvar(context) == ["keyword", "openai:gpt-4.1"]


def test_a_process_reads_them(run_cli: RunCli, tmp_path: Path) -> None:
    asked = (*make_pair(tmp_path, "llama"), tmp_path / "out", "--dry-run")
    assert run_cli("harden", *asked, LOX_MERGE_HARDEN_JSON=str(tmp_path / "plan.json")).returncode == 0
    assert (tmp_path / "plan.json").exists()
    done = run_cli("harden", *asked, LOX_MERGE_HARDEN_LICENSE="mit")
    assert done.returncode == 2 and "go with --push REPO" in done.stderr
