"""Requests to servers that answer late or never: what came is kept, and nobody waits for the rest."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from openai_server import OpenAIServer

from lox_merge.errors import LoxMergeError
from lox_merge.safety.cache import VerdictCache, cached_verdicts
from lox_merge.safety.judges.openai_judge import OpenAIJudge
from lox_merge.safety.requests import answers
from lox_merge.safety.types import Exchange

# A hung request would be given up after this many seconds, and asked again six times.
TIMEOUT = 120.0


def test_answers_come_with_their_places_and_no_more_at_once_than_asked_for() -> None:
    under_way, most, lock = [0], [0], threading.Lock()

    def ask(number: int) -> int:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        time.sleep(0.01 * (number % 3))
        with lock:
            under_way[0] -= 1
        return number * number

    assert sorted(answers(ask, range(20), 4)) == [(number, number**2) for number in range(20)]
    assert 2 <= most[0] <= 4
    assert list(answers(ask, [], 4)) == []


def test_after_a_failure_nothing_is_begun_and_what_is_under_way_is_given() -> None:
    begun: list[int] = []
    all_three = threading.Barrier(3)

    def ask(number: int) -> int:
        begun.append(number)
        all_three.wait(TIMEOUT)
        if number == 1:
            raise ValueError("no")
        time.sleep(0.2)
        return number

    found = []
    with pytest.raises(ValueError, match="no"):
        for place, _ in answers(ask, range(100), 3):
            found.append(place)
    assert sorted(found) == [0, 2] and sorted(begun) == [0, 1, 2]


def test_verdicts_that_were_paid_before_the_credit_was_used_up_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    exchanges = [Exchange(f"prompt {number}", "reply") for number in range(20)]
    with OpenAIServer(reply_with=lambda body: "#thescore: 5") as server:
        server.fail(1, status=402, only=lambda body: "prompt 7" in body["messages"][-1]["content"])
        judge = OpenAIJudge("judge", endpoint=server.url, concurrency=1)
        with pytest.raises(LoxMergeError, match="Verdicts so far are cached"):
            cached_verdicts(judge, exchanges, VerdictCache(tmp_path / "verdicts.sqlite"))
        paid = len(server.requests)
        assert paid == 8
        verdicts = cached_verdicts(judge, exchanges, VerdictCache(tmp_path / "verdicts.sqlite"))
        assert len(verdicts) == 20 and len(server.requests) - paid == 13, "seven were paid"


@pytest.mark.parametrize("hung", ["model", "judge"])
def test_ctrl_c_waits_for_no_answer_and_keeps_what_came(hung: str, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"v{number}\n" for number in range(9)))
    over = threading.Event()

    asked = itertools.count()

    def reply(body: dict[str, object]) -> str:
        if body["model"] == hung and next(asked) >= 4:
            over.wait(TIMEOUT)
        return "#thescore: 5"

    with OpenAIServer(reply_with=reply) as server:
        environment = {**os.environ, "OPENAI_API_KEY": "secret", "LOX_MERGE_CACHE": str(tmp_path / "cache")}
        words = ["asr", "model", "--endpoint", server.url, "--prompts", prompts, "--replies", tmp_path / "replies"]
        words += ["--judge", "openai:judge", "--judge-endpoint", server.url]
        command = [sys.executable, "-m", "lox_merge.cli.main", *map(str, words)]
        running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            until = time.monotonic() + 60
            while sum(request.body["model"] == hung for request in server.requests) < 9 and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(0.5)  # what was answered arrives
            running.send_signal(signal.SIGINT)
            _, errors = running.communicate(timeout=20)
        finally:
            over.set()
            running.kill()
    assert running.returncode == 1 and "interrupted" in errors and "Traceback" not in errors
    if hung == "model":
        (file,) = (tmp_path / "replies").rglob("*.jsonl")
        assert len(file.read_text().splitlines()) == 1 + 4
    else:
        with sqlite3.connect(tmp_path / "cache" / "verdicts.sqlite") as connection:
            assert connection.execute("SELECT COUNT(*) FROM verdicts").fetchone() == (4,)
