"""Functions of the user's own as judges: whose file decides, and what else it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lox_merge.errors import RequestError
from lox_merge.safety.judges.python_judge import PythonJudge
from lox_merge.safety.types import Exchange

ASKED = Exchange("how", "sure")

WRAPPED = {
    "no_grad": "import torch\n@torch.no_grad()\ndef judge(prompt, reply):\n    return {}\n",
    "lru_cache": "import functools\n@functools.lru_cache(None)\ndef judge(prompt, reply):\n    return {}\n",
    "partial": "import functools\ndef decide(answer, prompt, reply):\n    return answer\njudge = functools.partial(decide, {})\n",
    "bare": "import functools\njudge = functools.partial(max, {}, key=str)\n",
    "instance": "class Judge:\n    def __call__(self, prompt, reply):\n        return {}\njudge = Judge()\n",
    "built in": "verdicts = {{'how': {}}}\njudge = verdicts.get\n",
}


@pytest.mark.parametrize("source", WRAPPED.values(), ids=list(WRAPPED))
def test_another_file_is_another_judge_whatever_wraps_the_function(source: str, tmp_path: Path) -> None:
    """Or verdicts that the old file gave would be taken from the cache."""
    file = tmp_path / "mine.py"
    identities = []
    for answer in ("True", "False", "True"):
        file.write_text(source.format(answer))
        identities.append(PythonJudge(f"{file}:judge").identity())
    assert identities[0] == identities[2] != identities[1] and identities[0]["source_sha256"]


def test_the_file_that_defines_an_imported_function_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    named = tmp_path / "named_judges.py"
    (tmp_path / "defining_judges.py").write_text("def judge(prompt, reply):\n    return True\n")
    named.write_text("from defining_judges import judge\n")

    def hashes() -> list[Any]:
        return [PythonJudge(text).identity()["source_sha256"] for text in (f"{named}:judge", "named_judges:judge")]

    first = hashes()
    (tmp_path / "defining_judges.py").write_text("def judge(prompt, reply):\n    return False\n")
    second = hashes()
    named.write_text("from defining_judges import judge  # another line\n")
    third = hashes()
    assert all(len({*three}) == 3 for three in zip(first, second, third, strict=True))


@pytest.mark.parametrize("ending", ["raise SystemExit(0)", "raise ValueError('no')", "import sys; sys.exit()"])
def test_a_file_that_ends_the_program_is_refused(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "ending_judge.py").write_text(ending + "\n")
    for text in (f"{tmp_path / 'ending_judge.py'}:judge", "ending_judge:judge"):
        with pytest.raises(RequestError, match=r"ending_judge.* fails when it is (run|imported): (SystemExit|ValueError)"):
            PythonJudge(text)


def test_what_a_judge_prints_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loud.py").write_text("print('loading')\ndef judge(prompt, reply):\n    print('judging')\n    return True\n")
    assert PythonJudge(f"{tmp_path / 'loud.py'}:judge").judge([ASKED])[0].success
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.splitlines() == ["loading", "judging"]


def test_whatever_a_judge_raises_leaves_the_reply_undecided_but_ctrl_c(tmp_path: Path) -> None:
    own = "class Own(BaseException):\n    pass\ndef judge(prompt, reply):\n    raise Own('mine')\n"
    (tmp_path / "own.py").write_text(own + "def stop(prompt, reply):\n    raise KeyboardInterrupt\n")
    (verdict,) = PythonJudge(f"{tmp_path / 'own.py'}:judge").judge([ASKED])
    assert verdict.success is None and verdict.explanation == "the judge failed: Own: mine"
    with pytest.raises(KeyboardInterrupt):
        PythonJudge(f"{tmp_path / 'own.py'}:stop").judge([ASKED])
