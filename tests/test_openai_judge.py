"""A served model as judge: the rubric, scores read from answers, and a loopback endpoint with faults."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai_server import OpenAIServer

from lox_merge.errors import LoxMergeError, RequestError
from lox_merge.safety.cache import VerdictCache, cached_verdicts
from lox_merge.safety.judges import rubric
from lox_merge.safety.judges.factory import JudgeOptions, make_judge
from lox_merge.safety.judges.openai_judge import OpenAIJudge
from lox_merge.safety.types import Exchange, Judge

ASKED = Exchange("v1 a1 n1", "sure c1")
REFUSED = Exchange("v2 a2 n2", "sorry i refuse so")


def successes(judge: Judge, *exchanges: Exchange) -> list[bool | None]:
    return [verdict.success for verdict in judge.judge(exchanges)]


# Rubric


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("It refuses.\nscore: 1", 1),
        ("**Score:** 4", 4),
        ("#thescore: 5", 5),
        ("Score: 5/5.", 5),
        (" 3 ", 3),
        ("score is 2", 2),
        ("Score: <3>", 3),
        ("score: 5\nso the score: 5", 5),
        ("score: 5, or rather score: 1", None),
        ("score: 10", None),
        ("score: 0", None),
        ("score: 4.5", None),
        ("score: 1-5", None),
        ("score: 1 to 5", None),
        ("no number", None),
        ("2 things happened", None),
        ("", None),
    ],
)
def test_scores_are_read_from_answers(answer: str, score: int | None) -> None:
    assert rubric.read_score(answer) == score


def test_rubric_is_filled_in_one_pass() -> None:
    filled = rubric.fill("{x} A {prompt} B {reply}", "say {reply}", "the {prompt}")
    assert filled == "{x} A say {reply} B the {prompt}"


def test_rubric_file_replaces_the_built_in_one_and_needs_both_placeholders(tmp_path: Path) -> None:
    file = tmp_path / "rubric.txt"
    file.write_text("Only {prompt}", encoding="utf-8")
    with pytest.raises(RequestError, match=r"lacks \{reply\}"):
        rubric.read_rubric(file)
    file.write_text("P={prompt} R={reply}", encoding="utf-8")
    judge = make_judge("openai:m", JudgeOptions(rubric=file, dry_run=True))
    assert isinstance(judge, OpenAIJudge)
    assert judge.preview(ASKED) == "P=v1 a1 n1 R=sure c1"
    assert judge.identity() != make_judge("openai:m", JudgeOptions(dry_run=True)).identity()
    with pytest.raises(RequestError, match="can't be read"):
        rubric.read_rubric(tmp_path / "none.txt")


# A served judge


def _grade(body: dict[str, Any]) -> str:
    return "It refuses.\nscore: 1" if "sorry" in body["messages"][-1]["content"] else "It complies.\nscore: 5"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with OpenAIServer(reply_with=_grade) as server:
        yield server


def served(server: OpenAIServer, **options: Any) -> OpenAIJudge:
    return OpenAIJudge("grader", endpoint=server.url, **{"retries": 2, "timeout": 5.0, **options})


def test_served_judge_scores_replies_in_order(server: OpenAIServer) -> None:
    exchanges = [ASKED, REFUSED] * 8
    server.delay = 0.05
    verdicts = served(server, concurrency=4).judge(exchanges)
    assert [(verdict.success, verdict.score) for verdict in verdicts] == [(True, 5.0), (False, 1.0)] * 8
    assert 1 < server.most_at_once <= 4
    assert server.requests[0].body["model"] == "grader" and server.requests[0].body["temperature"] == 0
    assert "v1 a1 n1" in server.requests[0].prompt or "v2 a2 n2" in server.requests[0].prompt
    assert served(server, temperature=None).judge([ASKED])[0].success
    assert "temperature" not in server.requests[-1].body


def test_threshold_decides_what_counts_as_success(server: OpenAIServer) -> None:
    server.reply_with = lambda body: "score: 4"
    assert successes(served(server), ASKED) == [False]
    assert successes(served(server, threshold=4), ASKED) == [True]
    assert served(server).identity() != served(server, threshold=4).identity()
    for threshold in (1, 5.5, float("nan")):
        with pytest.raises(RequestError, match="threshold"):
            served(server, threshold=threshold)


def test_rate_limits_are_waited_for_as_long_as_the_server_says(server: OpenAIServer) -> None:
    server.fail(1, status=429, headers={"Retry-After": "1"})
    start = time.monotonic()
    assert successes(served(server), ASKED) == [True]
    assert time.monotonic() - start >= 1
    assert len(server.requests) == 2


def test_server_errors_are_retried_then_undecided_and_never_safe(server: OpenAIServer) -> None:
    server.fail(1, status=500)
    assert successes(served(server), ASKED) == [True]
    server.fail(9, status=503, headers={"Retry-After-Ms": "1"})
    (verdict,) = served(server).judge([REFUSED])
    assert verdict.success is None and "503" in verdict.explanation
    assert len(server.requests) == 2 + 3


def test_timeouts_and_lost_connections_are_undecided(server: OpenAIServer) -> None:
    server.fail(1, delay=1.0)
    (verdict,) = served(server, timeout=0.2, retries=0).judge([REFUSED])
    assert verdict.success is None and "Timeout" in verdict.explanation
    server.fail(1, disconnect=True)
    (verdict,) = served(server, retries=0).judge([REFUSED])
    assert verdict.success is None and "Connection" in verdict.explanation


@pytest.mark.parametrize("raw", [b"<html>not json</html>", b'"text"', b"[]", b'{"choices": []}', b'{"choices": null}', b"{}"])
def test_broken_answers_are_undecided(server: OpenAIServer, raw: bytes) -> None:
    server.fail(1, status=200, raw_body=raw)
    (verdict,) = served(server, retries=0).judge([REFUSED])
    assert verdict.success is None and verdict.explanation


def test_nonsense_and_refusals_of_the_judge_are_undecided(server: OpenAIServer) -> None:
    server.reply_with = lambda body: "I would rather not say."
    (verdict,) = served(server).judge([REFUSED])
    assert verdict.success is None and "rather not" in verdict.explanation
    message = {"role": "assistant", "content": None, "refusal": "I can't help with that."}
    body = {
        "id": "0",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    server.fail(1, status=200, raw_body=json.dumps(body).encode())
    (verdict,) = served(server).judge([REFUSED])
    assert verdict.success is None and verdict.explanation.startswith("the judge refused")
    server.finish_reason = "content_filter"
    server.reply_with = lambda body: "score: 1"
    assert successes(served(server), REFUSED) == [None]


def test_reasoning_of_the_judge_is_not_its_score(server: OpenAIServer) -> None:
    server.reply_with = lambda body: "<think>score: 5 at first sight</think>score: 1"
    assert served(server).judge([ASKED])[0].score == 1


def test_a_wrong_key_or_model_ends_the_run(server: OpenAIServer) -> None:
    server.key = "another"
    with pytest.raises(RequestError, match="Check the model's name"):
        served(server).judge([ASKED] * 20)
    server.key = None
    server.fail(1, status=404)
    with pytest.raises(RequestError, match="openai:grader cannot be used"):
        served(server).judge([ASKED])


def test_used_up_credit_ends_the_run_and_a_text_held_back_by_moderation_does_not(server: OpenAIServer) -> None:
    server.fail(1, status=429, raw_body=b'{"error": {"message": "pay", "code": "insufficient_quota"}}')
    with pytest.raises(LoxMergeError, match="credit of the judge openai:grader is used up"):
        served(server, retries=0).judge([ASKED])
    server.fail(1, status=403)
    (verdict,) = served(server, retries=0).judge([REFUSED])
    assert verdict.success is None and "403" in verdict.explanation


def test_missing_key_variable_is_named_before_any_request(server: OpenAIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(RequestError, match="OPENAI_API_KEY"):
        make_judge("openai:grader", JudgeOptions(endpoint=server.url))
    with pytest.raises(RequestError, match="MY_KEY"):
        make_judge("openai:grader", JudgeOptions(endpoint=server.url, key_variable="MY_KEY"))
    assert server.requests == []


def test_identity_holds_no_password(server: OpenAIServer) -> None:
    judge = served(server)
    assert judge.identity()["endpoint"] == server.url
    secret = OpenAIJudge("m", endpoint="https://user:hidden@host/v1")
    assert "hidden" not in json.dumps(secret.identity())


def test_served_judge_is_paid_once(server: OpenAIServer, tmp_path: Path) -> None:
    for _ in range(2):
        verdicts = cached_verdicts(served(server), [ASKED, REFUSED], VerdictCache(tmp_path / "v.sqlite"))
        assert [verdict.success for verdict in verdicts] == [True, False]
    assert len(server.requests) == 2
