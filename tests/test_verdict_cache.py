"""Verdicts given before are not asked for again: between runs, between processes, and with a damaged file."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lox_merge.errors import LoxMergeWarning
from lox_merge.safety.cache import VerdictCache, cached_verdicts, default_cache_file
from lox_merge.safety.types import Exchange, Verdict


class Counting:
    """A judge that counts what it is asked."""

    name = "counting"

    def __init__(self, undecided: Sequence[str] = ()) -> None:
        self.asked: list[str] = []
        self.undecided = undecided
        self.version = 1

    def identity(self) -> dict[str, Any]:
        return {"kind": "counting", "version": self.version}

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        self.asked += [exchange.reply for exchange in exchanges]
        return [Verdict(None if e.reply in self.undecided else len(e.reply) % 2 == 0, float(len(e.reply)), e.reply) for e in exchanges]


EXCHANGES = [Exchange("p", "a"), Exchange("p", "bb"), Exchange("q", "a"), Exchange("p", "a")]


def test_cache_saves_calls_between_runs_and_keeps_verdicts(tmp_path: Path) -> None:
    judge = Counting()
    first = cached_verdicts(judge, EXCHANGES, VerdictCache(tmp_path / "v.sqlite"))
    assert judge.asked == ["a", "bb", "a"]  # prompts differ; the equal exchange is asked once
    assert first == judge.judge(EXCHANGES)
    again = Counting()
    assert cached_verdicts(again, EXCHANGES, VerdictCache(tmp_path / "v.sqlite")) == first
    assert again.asked == []
    again.version = 2
    cached_verdicts(again, EXCHANGES[:1], VerdictCache(tmp_path / "v.sqlite"))
    assert again.asked == ["a"]


def test_undecided_verdicts_are_asked_again(tmp_path: Path) -> None:
    judge = Counting(undecided=["bb"])
    cache = VerdictCache(tmp_path / "v.sqlite")
    assert cached_verdicts(judge, EXCHANGES, cache)[1].success is None
    judge.undecided = []
    assert cached_verdicts(judge, EXCHANGES, cache)[1].success is True
    assert judge.asked == ["a", "bb", "a", "bb"]


def test_many_verdicts_are_found_again(tmp_path: Path) -> None:
    exchanges = [Exchange(str(i), "r" * (i % 7)) for i in range(1200)]
    cache = VerdictCache(tmp_path / "v.sqlite")
    first = cached_verdicts(Counting(), exchanges, cache)
    silent = Counting()
    assert cached_verdicts(silent, exchanges, VerdictCache(cache.file)) == first and silent.asked == []


def test_an_interrupted_judge_keeps_what_was_paid(tmp_path: Path) -> None:
    class Interrupted(Counting):
        def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
            if self.asked:
                raise KeyboardInterrupt
            return super().judge(exchanges)

    exchanges = [Exchange(str(i), "r") for i in range(100)]
    judge = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        cached_verdicts(judge, exchanges, VerdictCache(tmp_path / "v.sqlite"))
    rest = Counting()
    cached_verdicts(rest, exchanges, VerdictCache(tmp_path / "v.sqlite"))
    assert len(judge.asked) > 0 and len(rest.asked) == 100 - len(judge.asked)


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be read as one" * 40, b"SQLite format 3\x00" + b"\xff" * 4000])
def test_a_damaged_cache_is_named_and_not_fatal(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "v.sqlite"
    file.write_bytes(content)
    judge = Counting()
    with pytest.warns(LoxMergeWarning, match=r"v\.sqlite cannot be"):
        cache = VerdictCache(file)
    assert cached_verdicts(judge, EXCHANGES, cache) == judge.judge(EXCHANGES)
    judge.asked.clear()
    cached_verdicts(judge, EXCHANGES, cache)
    assert judge.asked == []  # this run's memory still saves calls
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_created_is_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(LoxMergeWarning, match="goes on without it"):
        VerdictCache(tmp_path / "file" / "v.sqlite")


def _fill(file: Path, start: int) -> None:
    cache = VerdictCache(file)
    for i in range(start, start + 40):
        cached_verdicts(Counting(), [Exchange(str(i), "r")], cache)


def test_two_processes_share_one_cache(tmp_path: Path) -> None:
    file = tmp_path / "v.sqlite"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_fill, args=(file, start)) for start in (0, 20)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    judge = Counting()
    cached_verdicts(judge, [Exchange(str(i), "r") for i in range(60)], VerdictCache(file))
    assert judge.asked == []


def test_cache_lies_where_the_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOX_MERGE_CACHE", str(tmp_path))
    assert default_cache_file() == tmp_path / "verdicts.sqlite"
    monkeypatch.delenv("LOX_MERGE_CACHE")
    assert default_cache_file().parts[-3:] == (".cache", "lox-merge", "verdicts.sqlite")
