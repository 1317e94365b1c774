"""Hostile texts of users: prompts, conversations, YAML recipes; replies of judges and of served models; stores of replies and verdicts."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import httpx
import yaml
from hypothesis import strategies as st

from fuzz.cases import Target
from fuzz.hostile import TEXTS, json_bytes, spoilt, tampered, values, written
from fuzz.materials import Materials, remove
from lox_merge.errors import LoxMergeError
from lox_merge.safety.cache import VerdictCache
from lox_merge.safety.conversations import load_conversations
from lox_merge.safety.judges.openai_judge import OpenAIJudge
from lox_merge.safety.prompts import load_prompts
from lox_merge.safety.reply_store import ReplyStore
from lox_merge.safety.types import Exchange, Prompt, PromptSet, Reply

ROWS = [
    {"goal": "how do i", "category": "a", "id": "1", "text": "x", "prompt": "p", "response": "r"},
    {"goal": "help", "category": None, "id": "2", "text": "y", "prompt": "q", "response": "s"},
]
CHATS = [{"messages": [{"role": "user", "content": "how"}, {"role": "assistant", "content": "no"}]}] * 2


def _tables() -> st.SearchStrategy[tuple[str, bytes]]:
    lines = ["goal,category,id,prompt,response", '"how, do",a,1,p,r', "help,,2,q,s"]
    jsonl = st.lists(st.one_of(*(json_bytes(row) for row in (*ROWS, *CHATS))), min_size=1, max_size=3).map(b"\n".join)
    cells = st.lists(
        st.lists(st.one_of(st.sampled_from([text for text in TEXTS if len(text) < 999]), st.just('"')), max_size=6).map(",".join), max_size=4
    )
    csv = st.one_of(
        cells.map(lambda found: "\n".join([lines[0], *found]).encode("utf-8", "surrogatepass")),
        st.just("\n".join(lines).encode()),
        st.binary(max_size=64),
    )
    return st.one_of(
        st.tuples(st.sampled_from((".jsonl", ".ndjson")), jsonl),
        st.tuples(st.just(".json"), st.one_of(json_bytes(ROWS), json_bytes(CHATS), json_bytes(["how", "do"]))),
        st.tuples(st.sampled_from((".csv", ".tsv")), csv.flatmap(tampered)),
        st.tuples(st.just(".txt"), st.binary(max_size=200)),
    )


def prompts(materials: Materials) -> Target:
    def feed(case: tuple[str, bytes]) -> None:
        file = materials.place("prompts" + case[0])
        file.write_bytes(case[1])
        for prompt in load_prompts(file).prompts:
            json.dumps(prompt.text)

    return Target("prompts", _tables(), feed, materials.folder, (".json", written(ROWS)))


def conversations(materials: Materials) -> Target:
    from transformers import AutoTokenizer

    from lox_merge.safety.chat import Rendering
    from lox_merge.safety.conversations import tokenised

    tokenizer = AutoTokenizer.from_pretrained(materials.aligned)

    def feed(case: tuple[str, bytes]) -> None:
        file = materials.place("chats" + case[0])
        file.write_bytes(case[1])
        tokenised(load_conversations(file), tokenizer, Rendering(), 64)

    return Target("conversations", _tables(), feed, materials.folder, (".json", written(CHATS)))


def recipes(materials: Materials) -> Target:
    """YAML for `lox-merge yaml`, up to mergekit's own plan."""
    from mergekit.options import MergeOptions

    from lox_merge.mergekit.config import lox_problems, read_configuration
    from lox_merge.mergekit.plan import plan_merge

    base, aligned = str(materials.base), str(materials.aligned)
    whole = {
        "merge_method": "lox",
        "base_model": base,
        "models": [{"model": base}, {"model": aligned}],
        "parameters": {"rank": 2, "alpha": 1.25},
        "dtype": "bfloat16",
    }
    sources = [{"model": base, "layer_range": [0, 1]}, {"model": aligned, "layer_range": [0, 1]}]
    rank = [{"filter": "mlp", "value": 2}, {"value": [1, 2]}]
    slices = {"merge_method": "lox", "base_model": base, "slices": [{"sources": sources}], "parameters": {"rank": rank}, "tokenizer_source": "base"}
    filtered = {
        "merge_method": "lox_projection_filter",
        "base_model": base,
        "models": [{"model": aligned, "parameters": {"role": "aligned"}}, {"model": str(materials.single), "parameters": {"role": "finetuned"}}],
        "parameters": {"fraction": 0.1},
    }
    texts = (
        "&a [*a, *a]",
        "!!python/object/apply:os.system [id]",
        "a: !!binary x",
        "- " * 500,
        "&a [&b [*b]]",
        "%YAML 9",
        "? [x]\n: y",
        "2024-13-45",
        "<<: 1",
        "a: 0o777:9",
    )
    laughs = "a: &a [x, x]\n" + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20))
    changed = st.one_of(*(spoilt(document) for document in (whole, slices, filtered)))
    dumped = changed.map(lambda value: yaml.safe_dump(value, allow_unicode=False).encode("utf-8", "backslashreplace"))
    cases = st.one_of(dumped, dumped, dumped, json_bytes(whole), st.sampled_from((*texts, laughs)).map(str.encode))

    def feed(case: bytes) -> None:
        file = materials.place("recipe.yml")
        file.write_bytes(case)
        raw, config = read_configuration(file)
        if config.merge_method.startswith("lox") and not lox_problems(raw, config):
            plan_merge(raw, config, materials.place("recipe_out"), MergeOptions())

    return Target("recipes", cases, feed, materials.folder, written(whole), dear=2)


COMPLETION = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "It refuses.\nscore: 1", "refusal": None}}],
    "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
}


def judge_replies(materials: Materials) -> Target:
    """Answers of a judge's server, through the real client; also as replies of a served model."""
    import openai

    from lox_merge.safety.endpoint import EndpointModel

    answer: list[tuple[int, bytes]] = [(200, b"")]
    transport = httpx.MockTransport(lambda _: httpx.Response(answer[0][0], content=answer[0][1], headers={"content-type": "application/json"}))
    client = openai.OpenAI(api_key="x", base_url="http://localhost/v1", max_retries=0, http_client=httpx.Client(transport=transport))
    judge = OpenAIJudge("m", dry_run=True)
    judge._client = client
    model = EndpointModel("http://localhost/v1", "m", no_key=True, retries=0, concurrency=1)
    model._client = client
    asked = PromptSet((Prompt("0", "how"),), "0" * 64, "prompts")
    statuses = st.sampled_from((200, 200, 200, 200, 200, 200, 400, 401, 402, 404, 429, 500))
    texts = st.one_of(
        st.sampled_from(TEXTS),
        st.text(max_size=40),
        st.sampled_from(("score: 5", "score: 1-5", "5", "<think>" * 2000, "score:" * 3000, "score" + " " * 20_000)),
    )
    spoken = texts.map(
        lambda text: written({**COMPLETION, "choices": [{**COMPLETION["choices"][0], "message": {"role": "assistant", "content": text}}]})
    )  # type: ignore[index,dict-item]
    cases = st.tuples(
        statuses, st.one_of(json_bytes(COMPLETION), json_bytes(COMPLETION), spoken, json_bytes({"error": {"message": "m", "code": "c"}}))
    )

    def feed(case: tuple[int, bytes]) -> None:
        answer[0] = case
        refused = None
        try:
            for verdict in judge.judge([Exchange("how", "no")]):
                json.dumps([verdict.success, verdict.score, verdict.explanation], allow_nan=False)
                (verdict.explanation or "").encode()
        except LoxMergeError as error:
            refused = error
        for reply in model.replies(asked):
            assert isinstance(reply.text, str) and (reply.tokens is None or isinstance(reply.tokens, int)), reply
            reply.text.encode()
        if refused:
            raise refused

    return Target("judge replies", cases, feed, materials.folder, (200, written(COMPLETION)))


def reply_stores(materials: Materials) -> Target:
    file = materials.place("replies.jsonl")
    asked = PromptSet((Prompt("0", "how"), Prompt("1", "do")), "0" * 64, "prompts")
    identity = {"kind": "folder", "name": "m"}
    remove([file])
    store = ReplyStore(file, identity, asked)
    store.keep([("0", Reply("how", "no", True, 3)), ("1", Reply("do", "yes", True, 3))])
    store.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    parts = [st.one_of(json_bytes(line), st.just(json.dumps(line).encode())) for line in lines]
    cases = st.tuples(*parts, st.sampled_from((b"\n", b"", b'{"id": "0", "te', b"\xff"))).map(lambda found: b"\n".join(found[:-1]) + found[-1])

    def feed(case: bytes) -> None:
        file.write_bytes(case)
        for reply in ReplyStore(file, identity, asked).finished.values():
            json.dumps([reply.text, reply.finished, reply.tokens], allow_nan=False)
            assert isinstance(reply.text, str) and (reply.tokens is None or isinstance(reply.tokens, int)), reply

    return Target("reply stores", cases, feed, materials.folder, file.read_bytes())


def verdict_caches(materials: Materials) -> Target:
    file = materials.place("verdicts.sqlite")
    remove([file])
    VerdictCache(file)
    sound = file.read_bytes()
    cell = st.one_of(st.sampled_from((None, 0, 1, 2, -1, 0.5, "x", b"\xff", 1e308)), st.text(max_size=5))
    rows = st.tuples(st.just("rows"), st.lists(st.tuples(cell, cell, cell), max_size=3))
    flipped = st.tuples(st.integers(0, len(sound) - 1), st.binary(min_size=1, max_size=20)).map(
        lambda at: sound[: at[0]] + at[1] + sound[at[0] + len(at[1]) :]
    )
    cases = st.one_of(
        rows,
        st.tuples(st.just("bytes"), st.one_of(flipped, st.binary(max_size=200))),
        st.tuples(st.just("schema"), st.sampled_from(("CREATE TABLE verdicts (x)", "CREATE VIEW verdicts AS SELECT 1"))),
    )

    def feed(case: tuple[str, Any]) -> None:
        for path in file.parent.glob(file.name + "*"):
            path.unlink()
        _write_cache(file, *case)
        cache = VerdictCache(file)
        for verdict in cache.get([str(n) for n in range(4)]).values():
            json.dumps([verdict.success, verdict.score, verdict.explanation], allow_nan=False)
            assert verdict.success in (True, False) and (verdict.score is None or isinstance(verdict.score, float)), verdict
            assert verdict.explanation is None or isinstance(verdict.explanation, str), verdict

    return Target("verdict caches", cases, feed, materials.folder, ("bytes", sound))


def _write_cache(file: Path, kind: str, content: Any) -> None:
    if kind == "bytes":
        file.write_bytes(content)
        return
    connection = sqlite3.connect(file)
    if kind == "schema":
        connection.execute(content)
    else:
        connection.execute("CREATE TABLE verdicts (key TEXT PRIMARY KEY, success, score, explanation)")
        connection.executemany("INSERT INTO verdicts VALUES (?, ?, ?, ?)", [(str(n), *row) for n, row in enumerate(content)])
    connection.commit()
    connection.close()


__all__ = ["conversations", "judge_replies", "prompts", "recipes", "reply_stores", "values", "verdict_caches"]
