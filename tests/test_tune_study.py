"""The file of a study: what a crash left of it is gone on from, and what is damaged in it is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RunCli, run_program
from test_tune import IDENTITY as ASKED
from test_tune import Measured, arguments, files

from lox_merge.errors import RequestError
from lox_merge.jobs.recipe import Recipe
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.safety.attack import AttackSettings
from lox_merge.safety.conversations import load_conversations
from lox_merge.safety.judges.keyword import KeywordJudge
from lox_merge.safety.prompts import load_prompts
from lox_merge.safety.tune_job import tune
from lox_merge.safety.tune_study import held_study, open_study, read_study
from lox_merge.safety.tuner import run_trials
from lox_merge.safety.tuning import TuneSpace, Tuning

__all__ = ["files"]  # a fixture

SOURCE = {"kind": "folder", "name": "model", "files": {}}
IDENTITY = {**ASKED, "sources": {"base": SOURCE, "aligned": SOURCE}}
SPACE = TuneSpace((1, 4), (0.5, 2.0), ("mlp",))


def go_on(file: Path, trials: int) -> Tuning:
    tuner: Any = Measured()
    return run_trials(open_study(file, IDENTITY, 0), SPACE, tuner, Recipe(), trials)


def test_a_study_is_gone_on_from_wherever_its_last_line_was_cut(tmp_path: Path) -> None:
    file = tmp_path / "s.log"
    go_on(file, 2)
    whole = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for begin, end in zip([0, *ends], ends, strict=False):
        for length in {begin + 1, (begin + end) // 2, end - 1}:
            file.write_bytes(whole[:length])
            open_study(file, IDENTITY, 0)
            assert file.read_bytes().startswith(whole[:begin])
            assert len(go_on(file, 2).trials) == 2
            assert go_on(file, 2) == read_study(file), f"cut to {length} bytes"


def test_reading_a_study_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "s.log"
    go_on(file, 2)
    file.write_bytes(file.read_bytes()[:-40])
    before = file.read_bytes()
    assert len(read_study(file).trials) == 1 and file.read_bytes() == before


def test_a_tear_in_the_middle_is_said_and_nothing_is_changed(tmp_path: Path) -> None:
    file = tmp_path / "s.log"
    go_on(file, 1)
    lines = file.read_bytes().splitlines(keepends=True)
    for number, torn in ((4, lines[3][:-40] + lines[4]), (len(lines), lines[-1][:30] + lines[-1]), (5, b"[]\n"), (5, b"\xff\n")):
        damaged = b"".join([*lines[: number - 1], torn, *lines[number:]])
        file.write_bytes(damaged)
        for opened in (lambda: open_study(file, IDENTITY, 0), lambda: read_study(file)):
            with pytest.raises(RequestError, match=rf"s\.log, line {number}, is not a record of a study\. Remove that line and those after it"):
                opened()
        assert file.read_bytes() == damaged
        file.write_bytes(b"".join(lines[: number - 1]))
        assert len(go_on(file, 1).trials) == 1, "as the message says"


@pytest.mark.parametrize("data", [b"{}\n", b"mine", b'{"op_code":0}\n', b'["op_code"]\n'])
def test_files_of_others_are_left_as_they_are(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "mine.txt"
    file.write_bytes(data)
    with pytest.raises(RequestError, match=r"mine\.txt is not a study"):
        open_study(file, IDENTITY, 0)
    assert file.read_bytes() == data


def edited(file: Path, key: str, change: Callable[[Any], Any]) -> None:
    """Changes what the first record with this user attribute has of it."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    record = next(record for record in records if key in record.get("user_attr", {}))
    record["user_attr"][key] = change(record["user_attr"][key])
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def without(*keys: str) -> Callable[[Any], Any]:
    """Takes out what lies at the end of these keys."""

    def change(values: Any) -> Any:
        copy = json.loads(json.dumps(values))
        inner = copy
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return copy

    return change


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("identity", lambda _: ["mine"], "identity: it is no object"),
        ("identity", without("space", "groups"), r"identity\.space\.groups: missing"),
        ("identity", lambda values: {**values, "recipe": {"rank": []}}, "rank"),
        ("identity", without("sources", "base"), r"identity\.sources: base: missing"),
        ("aligned", without("interval"), r"aligned\.interval: missing"),
        ("attack", without("interval"), r"trial 0: attack\.interval: missing"),
        ("attack", lambda _: "mine", "trial 0: attack: it is no object"),
        ("attack", lambda values: {**values, "rate": float("nan")}, r"trial 0: attack\.rate: .* finite"),
        ("seconds", lambda _: "soon", "trial 0: seconds: "),
    ],
)
def test_figures_that_were_changed_are_said_before_anything_is_measured(tmp_path: Path, key: str, change: Any, message: str) -> None:
    file = tmp_path / "s.log"
    go_on(file, 1)
    edited(file, key, change)
    damaged = file.read_bytes()
    with pytest.raises(RequestError, match=rf"s\.log is not as it was kept \(.*{message}"):
        read_study(file)
    # An object in the place of what was asked is another request first of all.
    with pytest.raises(RequestError, match=rf"s\.log is (not as it was kept \(.*{message}|of another request \(different: (space|recipe|sources)\))"):
        open_study(file, IDENTITY, 0)
    assert file.read_bytes() == damaged


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"param_name":"alpha mlp"', b'"param_name":"beta"', "trial 0: alpha mlp: missing"),
        (b'"state":1,"values":[', b'"state":1,"values":[0.5,', "trial 0: values: "),
        (b'"directions":[1,1]', b'"directions":[1,2]', "directions: "),
        (b'"directions":[1,1]', b'"directions":[0,1]', "directions: "),
        (b'"system_attrs":{', b'"system_attrs":"mine","other":{', "'str' object"),
    ],
)
def test_the_same_of_what_optuna_keeps(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    file = tmp_path / "s.log"
    go_on(file, 2)
    assert old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new))
    for opened in (lambda: open_study(file, IDENTITY, 0), lambda: read_study(file)):
        with pytest.raises(RequestError, match=rf"s\.log is not as it was kept \(.*{message}"):
            opened()


def test_a_study_that_was_just_begun_is_gone_on_from(tmp_path: Path) -> None:
    file = tmp_path / "s.log"
    go_on(file, 1)
    file.write_bytes(file.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(RequestError, match="interrupted before the aligned model was measured"):
        read_study(file)
    assert len(go_on(file, 1).trials) == 1


def test_one_process_at_a_time_goes_on_with_a_study(toy_pair_seed0: ToyPair, files: Path, tmp_path: Path, run_cli: RunCli) -> None:
    file, link = tmp_path / "s.log", tmp_path / "link.log"
    link.symlink_to(file)
    with held_study(file):
        tuning = go_on(file, 2)
        assert read_study(file) == tuning, "reading it is free"
        before = file.read_bytes()
        refused = run_cli(*arguments(toy_pair_seed0, files, "--study", file, "--trials", 3))
        assert refused.returncode == 2 and "another process is writing s.log. Wait for it" in refused.stderr, refused.stderr
        other_name = run_cli(*arguments(toy_pair_seed0, files, "--study", link))
        assert other_name.returncode == 2 and "another process is writing" in other_name.stderr, other_name.stderr
        assert file.read_bytes() == before
    with held_study(file):  # given back
        pass
    code = """
import os, signal, sys
from pathlib import Path
from lox_merge.safety.tune_study import held_study
with held_study(Path(sys.argv[1])):
    print("held", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = run_program(code, file)
    assert killed.returncode == -9 and "held" in killed.stdout
    with held_study(file):
        assert len(go_on(file, 3).trials) == 3


class Decomposing:
    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def advance(self, _count: int) -> None:
        self._say("decomposing")


def test_a_search_holds_its_study_from_before_it_decomposes_to_its_end(toy_pair_seed0: ToyPair, files: Path, tmp_path: Path) -> None:
    file, told = tmp_path / "s.log", list[str]()

    def refused(work: str) -> None:
        with pytest.raises(RequestError, match="another process is writing"), held_study(file):
            pass
        told.append(work)

    data = (load_prompts(files / "prompts.txt"), KeywordJudge("both"), load_prompts(files / "harmless.txt"))
    attack, settings = load_conversations(files / "attack.jsonl"), AttackSettings(steps=(1,))
    shared: dict[str, Any] = {"trials": 1, "settings": settings, "study": file, "device": "cpu"}
    tune(toy_pair_seed0.base, toy_pair_seed0.aligned, *data, attack, **shared, decomposing=Decomposing(refused), report=refused)
    assert told[0] == "decomposing" and [text.split(":")[0] for text in told[-2:]] == ["aligned, attacked", "trial 0"]
    with held_study(file):
        assert len(read_study(file).trials) == 1
