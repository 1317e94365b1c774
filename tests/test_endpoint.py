"""Replies of a model served at an OpenAI-compatible endpoint, by the real client against a server on loopback."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from openai_server import OpenAIServer

from lox_merge.errors import LoxMergeError, RequestError
from lox_merge.safety.chat import Rendering
from lox_merge.safety.decoding import Decoding
from lox_merge.safety.endpoint import EndpointModel
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.types import Prompt, PromptSet


def ask(*texts: str) -> PromptSet:
    return prompt_set([Prompt(str(i), text) for i, text in enumerate(texts)], "tests")


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TOY_KEY", "secret")
    return "TOY_KEY"


def test_an_endpoint_is_asked_at_once_and_answers_in_order(key: str) -> None:
    prompts = ask(*(f"v{i}" for i in range(30)))
    with OpenAIServer(delay=0.05, key="secret") as server:
        source = EndpointModel(server.url, "toy", Decoding(7), Rendering(system="be brief"), key_variable=key, concurrency=6)
        replies = source.replies(prompts)
        assert [reply.text for reply in replies] == [f"reply to v{i}" for i in range(30)]
        assert all(reply.finished and reply.tokens == 3 for reply in replies)
        assert 4 <= server.most_at_once <= 6
        body = server.requests[0].body
        server.finish_reason = "length"
        assert not source.replies(ask("x"))[0].finished
    assert (body["model"], body["max_tokens"], body["temperature"], body["messages"][0]) == ("toy", 7, 0.0, {"role": "system", "content": "be brief"})


def test_an_endpoint_in_trouble_is_asked_again(key: str) -> None:
    with OpenAIServer() as server:
        server.fail(1, status=429, headers={"Retry-After": "1"})
        server.fail(1, status=503)
        server.fail(1, status=200, raw_body=b"<html>")
        server.fail(1, status=200, raw_body=b"{}")
        server.fail(1, disconnect=True)
        server.fail(1, delay=1.0, status=200, raw_body=b"{}")
        source = EndpointModel(server.url, "toy", key_variable=key, concurrency=1, timeout=0.6)
        assert [reply.text for reply in source.replies(ask("a", "b", "c"))] == ["reply to a", "reply to b", "reply to c"]
        times = [request.time for request in server.requests]
        assert len(times) == 9 and times[1] - times[0] >= 1.0


def test_a_prompt_that_fails_for_good_is_named_and_the_others_are_kept(key: str, tmp_path: Path) -> None:
    store = tmp_path / "replies.jsonl"
    prompts = ask("a", "b", "c", "d")
    with OpenAIServer() as server:
        source = EndpointModel(server.url, "toy", key_variable=key, concurrency=1, retries=0, store=store)
        server.fail(9, status=500, only=lambda body: body["messages"][-1]["content"] == "c")
        with pytest.raises(LoxMergeError, match=r"prompt 2 of model toy.*500"):
            source.replies(prompts)
        assert [request.prompt for request in server.requests] in (["a", "b", "c"], ["a", "b", "c", "d"])
        server._faults.clear()
        server.requests.clear()
        assert [reply.text for reply in source.replies(prompts)] == [f"reply to {name}" for name in "abcd"]
        assert {request.prompt for request in server.requests} <= {"c", "d"}
        server.fail(9, status=200, raw_body=b"nonsense")
        with pytest.raises(LoxMergeError, match="not a chat completion"):
            EndpointModel(server.url, "toy", key_variable=key).replies(ask("x"))
        server.key = "other"
        server._faults.clear()
        with pytest.raises(LoxMergeError, match="401"):
            EndpointModel(server.url, "toy", key_variable=key).replies(ask("x"))
    assert "secret" not in store.read_text()


def test_endpoint_requests_that_cannot_be_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(RequestError, match="OPENAI_API_KEY"):
        EndpointModel("http://localhost:1/v1", "toy")
    with OpenAIServer(key="none") as server:
        assert EndpointModel(server.url, "toy", no_key=True).replies(ask("x"))[0].text == "reply to x"
    with pytest.raises(RequestError, match="--prefill"):
        EndpointModel("http://localhost:1/v1", "toy", None, Rendering(prefill="sure"), key_variable=key)
    with pytest.raises(RequestError, match="not a URL"):
        EndpointModel("localhost", "toy", key_variable=key)
    identity = EndpointModel("http://user:password@localhost:1/v1?token=9", "toy", key_variable=key).identity()
    assert identity["endpoint"] == "http://localhost:1/v1"
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(RequestError, match=r"pip install 'lox-merge\[openai\]'"):
        EndpointModel("http://localhost:1/v1", "toy", key_variable=key)
