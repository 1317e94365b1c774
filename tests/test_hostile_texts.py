"""What the fuzz campaign found in texts of users, answers of servers and stores: each once."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from openai_server import OpenAIServer
from tiny_judges import sequence_classifier

from lox_merge.errors import LoxMergeError, RequestError, SourceError
from lox_merge.mergekit.config import read_configuration
from lox_merge.safety.cache import VerdictCache
from lox_merge.safety.conversations import load_conversations
from lox_merge.safety.decoding import end_tokens, padding_token
from lox_merge.safety.endpoint import EndpointModel
from lox_merge.safety.judges.classifier import classifier_judge
from lox_merge.safety.judges.openai_judge import OpenAIJudge
from lox_merge.safety.prompts import load_prompts
from lox_merge.safety.reply_store import ReplyStore
from lox_merge.safety.types import Exchange, Prompt, PromptSet, Reply, Verdict

ASKED = PromptSet((Prompt("0", "how"),), "0" * 64, "prompts")


@pytest.mark.parametrize("text", ["[" * 100_000, '[{"goal": ' + "9" * 5000 + "}]", '[{"goal": "\\ud800"}]'])
def test_prompts_and_conversations(tmp_path: Path, text: str) -> None:
    for suffix in (".json", ".jsonl"):
        file = tmp_path / f"texts{suffix}"
        file.write_text(text)
        for load in (load_prompts, load_conversations):
            with pytest.raises(RequestError, match="is not JSON"):
                load(file)
    table = tmp_path / "chats.csv"
    table.write_text('messages\n"' + "[" * 100_000 + '"\n')
    with pytest.raises(RequestError, match=r"malformed example|field larger than field limit"):
        load_conversations(table)


@pytest.mark.parametrize(
    "text", ["2024-13-45", "[" * 10_000, "{" * 2_000, "- " * 20_000, "a: 0o777:9", "\x00", "!!python/object/apply:os.system [id]"]
)
def test_yaml(tmp_path: Path, text: str) -> None:
    file = tmp_path / "merge.yml"
    file.write_text(text)
    with pytest.raises(RequestError, match=r"merge\.yml"):
        read_configuration(file)


@pytest.mark.parametrize("changes", [{"id": [1]}, {"id": {}}, {"text": 5}, {"finished": "yes"}, {"tokens": "3"}, {"tokens": [1]}])
def test_reply_stores(tmp_path: Path, changes: dict[str, object]) -> None:
    file = tmp_path / "replies.jsonl"
    ReplyStore(file, {}, ASKED).keep([("0", Reply("how", "no", True, 3))])
    header, line = file.read_text().splitlines()
    file.write_text(f"{header}\n{json.dumps(json.loads(line) | changes)}\n")
    with pytest.raises(RequestError, match="line 2, is not a reply"):
        ReplyStore(file, {}, ASKED)
    file.write_text(f"{header}\n{'[' * 100_000}\n")
    with pytest.raises(RequestError, match="line 2, is not a reply"):
        ReplyStore(file, {}, ASKED)


def test_a_cache_gives_verdicts_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.sqlite"
    cache = VerdictCache(file)
    cache.put({"sound": Verdict(True, 0.5, "yes")})
    rows = [
        ("a", "x", 0.5, None),
        ("b", 1, b"\xff", None),
        ("c", 1, 0.5, b"\xff"),
        ("d", 2, None, None),
        ("e", 0, float("inf"), None),
        ("f", 1, 1, ""),
    ]
    connection = sqlite3.connect(file)
    connection.executemany("INSERT INTO verdicts VALUES (?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    assert VerdictCache(file).get(["sound", *"abcdef"]) == {"sound": Verdict(True, 0.5, "yes"), "f": Verdict(True, 1.0, "")}


ANSWER = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000 + b"]" * 100_000,
        json.dumps(ANSWER | {"choices": "text"}).encode(),
        json.dumps(ANSWER | {"choices": [None]}).encode(),
        json.dumps(ANSWER | {"choices": [{"index": 0, "message": {"role": "assistant", "content": ["score: 5"]}}]}).encode(),
    ],
)
def test_answers_of_another_shape(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The openai client takes whatever JSON comes."""
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    with OpenAIServer() as server:
        server.fail(times=9, status=200, raw_body=body)
        (verdict,) = OpenAIJudge("m", endpoint=server.url, retries=0).judge([Exchange("how", "no")])
        assert verdict.success is None and verdict.explanation
        with pytest.raises(LoxMergeError, match="not a chat completion"):
            EndpointModel(server.url, "m", retries=0).replies(ASKED)


def test_halves_of_surrogate_pairs_go_no_further(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's JSON may hold what no file and no database takes."""
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    with OpenAIServer(reply_with=lambda _: "score: 5 \ud800") as server:
        (verdict,) = OpenAIJudge("m", endpoint=server.url, retries=0).judge([Exchange("how", "no")])
        assert verdict == Verdict(True, 5.0, "score: 5 ?")
        VerdictCache(tmp_path / "verdicts.sqlite").put({"key": verdict})
        (reply,) = EndpointModel(server.url, "m", retries=0, store=tmp_path / "replies.jsonl").replies(ASKED)
        (again,) = EndpointModel(server.url, "m", retries=0, store=tmp_path / "replies.jsonl").replies(ASKED)
        assert reply == again and reply.text == "score: 5 ?"


@pytest.mark.parametrize("value", [{}, "", ["x"], float("inf"), -2.95e212, [1, 2**63]])
def test_end_tokens_that_are_no_tokens(value: object) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=value), config=SimpleNamespace())
    with pytest.raises(RequestError, match="which is no number"):
        end_tokens(model, SimpleNamespace(eos_token_id=None))


@pytest.mark.parametrize(("said", "taken"), [((None, -1, None), 0), ((64, -1, 5), 5), ((63, 2, 5), 63), ((None, 64, [70, 7]), 7), ((0, 2, 5), 0)])
def test_batches_are_filled_with_a_token_that_the_model_has(said: tuple[Any, Any, Any], taken: int) -> None:
    """Some configurations say -1, or a token that was added to the tokenizer alone."""
    pad, other_pad, end = said
    config = SimpleNamespace(eos_token_id=end, pad_token_id=other_pad)
    model = SimpleNamespace(generation_config=config, config=SimpleNamespace(), get_input_embeddings=lambda: torch.nn.Embedding(64, 2))
    assert padding_token(model, SimpleNamespace(eos_token_id=None, pad_token_id=pad)) == taken


@pytest.mark.parametrize("config", ["{", "[]", '{"architectures": 5}', '{"architectures": [5]}', "[" * 100_000])
def test_config_of_a_judge(tmp_path: Path, config: str) -> None:
    folder = sequence_classifier(tmp_path / "judge")
    (folder / "config.json").write_text(config)
    with pytest.raises(SourceError, match=r"its config\.json cannot be read"):
        classifier_judge(str(folder), "harmful")
