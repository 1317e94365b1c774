"""The file of a study: what a crash left of it is gone on from, and what is damaged in it is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_tune import IDENTITY, Measured

from lox_merge.errors import RequestError
from lox_merge.jobs.recipe import Recipe
from lox_merge.safety.tune_study import open_study, read_study
from lox_merge.safety.tuner import run_trials
from lox_merge.safety.tuning import TuneSpace, Tuning

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
