"""--json: refused before any work where it cannot be written, and never at the cost of the table."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import pytest
from conftest import RunCli
from openai_server import OpenAIServer
from tiny_models import make_pair

from lox_merge.cli.json_file import check_json_file, give_result, write_json
from lox_merge.cli.main import _COMMANDS, cli
from lox_merge.errors import OutputError, WriteError


@pytest.mark.parametrize("name", sorted(_COMMANDS))
def test_every_command_looks_at_its_json_file_before_it_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With arguments that no command could work with: the file is what is complained about."""
    monkeypatch.chdir(tmp_path)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    arguments = {"demo": ["--out", "no-model"], "yaml": ["no-model", "out"]}.get(name, [])
    for one in command.params:
        if isinstance(one, click.Argument):
            if name != "yaml":  # whose arguments come with mergekit, here or in a test before
                arguments.append("no-model")
        elif one.required:
            arguments += [one.opts[0], "nothing"]
    for file, words in ((tmp_path / "no" / "r.json", "there is no folder"), (tmp_path, "is a folder")):
        with pytest.raises(OutputError, match=f"--json .*{words}"):
            cli.main([name, *arguments, "--json", str(file)], standalone_mode=False)
    with pytest.raises(OutputError, match="names this file too"):
        cli.main([name, *arguments, "--json", "no-model"], standalone_mode=False)


def test_inputs_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text("goal\none\n")
    Path("link.csv").symlink_to("p.csv")
    for others in (["p.csv"], [Path("p.csv")], [("a.csv", "x=p.csv")], ["python:p.csv:judge"], [tmp_path / "p.csv"], ["link.csv"]):
        with pytest.raises(OutputError, match="another option or argument names this file too"):
            check_json_file(Path("p.csv"), others)
    check_json_file(Path("other.json"), ["p.csv", 3, None, (4, 5)])
    check_json_file(Path(os.devnull), [Path(os.devnull)])
    check_json_file(Path("out/result.json"), [Path("out")])  # a command's own folder is yet to be made
    with pytest.raises(OutputError, match="there is no folder"):
        check_json_file(Path("out/more/result.json"), [Path("out")])


def test_json_is_whole_or_not_there_and_devices_stay_devices(tmp_path: Path) -> None:
    file, link = tmp_path / "r.json", tmp_path / "link.json"
    write_json(str(file), {"ä": None})
    link.symlink_to(file)
    before = file.stat().st_ino
    write_json(str(file), {"b": 1})
    assert file.stat().st_ino != before and json.loads(file.read_text()) == {"b": 1}  # another file took its place at once
    write_json(str(link), {"c": 1})
    assert link.is_symlink() and json.loads(file.read_text()) == {"c": 1}
    write_json(os.devnull, {"c": 1})
    assert not Path(os.devnull).is_file() and {path.name for path in tmp_path.iterdir()} == {"r.json", "link.json"}


def test_a_json_file_that_fails_takes_no_figures_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "no" / "r.json")
    (tmp_path / "no").write_text("a file where a folder was")
    with pytest.raises(WriteError, match=r"can't be written: .*\. The figures are in the table above") as refused:
        give_result(file, {"x": 1}, lambda: click.echo("the table"))
    assert capsys.readouterr().out == "the table\n" and "complete" not in str(refused.value)
    with pytest.raises(WriteError, match="The output itself is complete"):
        write_json(file, {})
    with pytest.raises(BrokenPipeError):
        give_result(str(tmp_path / "r.json"), {"x": 1}, lambda: (_ for _ in ()).throw(BrokenPipeError()))
    assert json.loads((tmp_path / "r.json").read_text()) == {"x": 1}
    give_result("-", {"x": 1}, lambda: click.echo("the table"))
    assert json.loads(capsys.readouterr().out) == {"x": 1}


def test_the_table_comes_before_a_file_that_fails(tmp_path: Path, run_cli: RunCli) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    (tmp_path / "p.txt").write_text("one\ntwo\n")

    def answer(body: object) -> str:
        if folder.is_dir():
            folder.rmdir()
        return "Here it is"

    with OpenAIServer(reply_with=answer) as served:
        arguments = ["asr", "served", "--endpoint", served.url, "--no-key", "--prompts", tmp_path / "p.txt", "--no-cache"]
        (tmp_path / "blocked").touch()
        refused = run_cli(*arguments, "--json", tmp_path / "blocked" / "r.json")
        assert refused.returncode == 2 and not served.requests
        # The folder goes while the model answers, and a file takes its name.
        served.reply_with = lambda body: (answer(body), folder.exists() or folder.touch(), "Here it is")[-1]
        done = run_cli(*arguments, "--json", folder / "r.json")
    assert done.returncode == 1 and "100.0 %" in done.stdout
    assert "can't be written" in done.stderr and "complete" not in done.stderr and "Traceback" not in done.stderr


def test_standard_output_by_its_name_is_standard_output(tmp_path: Path, run_cli: RunCli) -> None:
    """Opened anew it would be written to from its beginning, and the table over it."""
    base, aligned = make_pair(tmp_path, "llama")
    (by_sign, by_name) = (run_cli("inspect", base, aligned, "--json", file) for file in ("-", "/dev/stdout"))
    assert by_sign.returncode == by_name.returncode == 0, by_name.stderr
    assert json.loads(by_name.stdout)["command"] == json.loads(by_sign.stdout)["command"] == "inspect"
