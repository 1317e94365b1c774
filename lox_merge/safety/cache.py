"""Verdicts given before, kept on disk so that no judgement is paid twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sqlite3
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from lox_merge.errors import LoxMergeWarning
from lox_merge.safety.types import Exchange, Judge, StreamingJudge, Verdict

# Judged in portions, each stored at once: an interrupted run loses at most one portion of a judge that does not give verdicts as they come.
_PORTION = 64
# Longer than any other process holds the file: it writes one portion.
_PATIENCE_SECONDS = 30.0
_QUERY_LIMIT = 500  # below SQLite's smallest usual limit of 999 variables in one statement


def default_cache_file() -> Path:
    """$LOX_MERGE_CACHE/verdicts.sqlite, else ~/.cache/lox-merge/verdicts.sqlite."""
    chosen = os.environ.get("LOX_MERGE_CACHE")
    return (Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "lox-merge") / "verdicts.sqlite"


def verdict_key(judge: Judge, exchange: Exchange) -> str:
    """sha256 of prompt, reply and everything that decides the judge's verdicts."""
    document = [judge.identity(), exchange.prompt, exchange.reply]
    return hashlib.sha256(json.dumps(document, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


class VerdictCache:
    """Decided verdicts by key, in an SQLite file. Several processes may share it.

    Trouble with the file is never fatal: a LoxMergeWarning names it once, and this run goes on with its memory alone.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.file = file or default_cache_file()
        self._memory: dict[str, Verdict] = {}
        self._usable = True
        with self._trouble("opened"):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self._connect() as connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, success INTEGER NOT NULL, score REAL, explanation TEXT)"
                )

    def get(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """The verdicts known for these keys."""
        wanted = list(dict.fromkeys(keys))
        found = {key: self._memory[key] for key in wanted if key in self._memory}
        missing = [key for key in wanted if key not in found] if self._usable else []
        if not missing:
            return found
        with self._trouble("read"), self._connect() as connection:
            for start in range(0, len(missing), _QUERY_LIMIT):
                some = missing[start : start + _QUERY_LIMIT]
                query = f"SELECT key, success, score, explanation FROM verdicts WHERE key IN ({','.join('?' * len(some))})"
                found |= {row[0]: verdict for row in connection.execute(query, some) if (verdict := _verdict(*row[1:])) is not None}
        return found

    def put(self, verdicts: Mapping[str, Verdict]) -> None:
        """Keeps the decided ones; an undecided reply may be decided next time."""
        decided = {key: verdict for key, verdict in verdicts.items() if verdict.success is not None}
        self._memory.update(decided)
        if not decided or not self._usable:
            return
        rows = [(key, int(bool(verdict.success)), verdict.score, verdict.explanation) for key, verdict in decided.items()]
        with self._trouble("written"), self._connect() as connection:
            connection.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?)", rows)

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        """One transaction; a connection is not kept, so that forks and threads share nothing."""
        connection = sqlite3.connect(self.file, timeout=_PATIENCE_SECONDS)
        try:
            with connection:
                yield connection
        finally:
            connection.close()

    @contextlib.contextmanager
    def _trouble(self, doing: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            self._usable = False
            warnings.warn(
                f"the cache of verdicts {self.file} cannot be {doing} ({error}). This run goes on without it, so judgements may be "
                "paid again. Move the file away, or name another folder by the environment variable LOX_MERGE_CACHE.",
                LoxMergeWarning,
                stacklevel=3,
            )


def _verdict(success: Any, score: Any, explanation: Any) -> Verdict | None:
    """One row; None for what no judge decided: SQLite keeps any kind of value in any column, so a file may hold anything."""
    sound = success in (0, 1) and isinstance(score, (float, int, NoneType)) and isinstance(explanation, (str, NoneType))
    if not sound or (score is not None and not math.isfinite(score)):
        return None
    return Verdict(bool(success), None if score is None else float(score), explanation)


def cached_verdicts(judge: Judge, exchanges: Sequence[Exchange], cache: VerdictCache | None) -> list[Verdict]:
    """One verdict per exchange, in order; the judge is asked for those the cache does not hold.

    A judge with `worth_caching = False` is always asked: it is faster than the cache.
    """
    if cache is None or not getattr(judge, "worth_caching", True):
        return _checked(judge, exchanges)
    keys = [verdict_key(judge, exchange) for exchange in exchanges]
    known = cache.get(keys)
    # By key, so that equal replies to equal prompts are judged once.
    missing = {key: exchange for key, exchange in zip(keys, exchanges, strict=True) if key not in known}
    open_keys = list(missing)
    for start in range(0, len(open_keys), _PORTION):
        portion = open_keys[start : start + _PORTION]
        given: dict[str, Verdict] = {}
        try:
            for place, verdict in _as_they_come(judge, [missing[key] for key in portion]):
                given[portion[place]] = verdict
        finally:  # what was paid is kept, whatever ended it
            cache.put(given)
        known.update(given)
    return [known[key] for key in keys]


def _as_they_come(judge: Judge, exchanges: Sequence[Exchange]) -> Iterator[tuple[int, Verdict]]:
    """Verdicts with the places of their replies. A judge may give each when it has it; others give them all at the end."""
    if isinstance(judge, StreamingJudge):
        return judge.judge_as_they_come(exchanges)
    return iter(enumerate(_checked(judge, exchanges)))


def _checked(judge: Judge, exchanges: Sequence[Exchange]) -> list[Verdict]:
    verdicts = judge.judge(exchanges) if exchanges else []
    if len(verdicts) != len(exchanges):
        raise ValueError(f"the judge {judge.name} gave {len(verdicts)} verdicts on {len(exchanges)} replies")
    return verdicts
