"""Conversations of a user's file (to fine-tune on, or to measure on) as token numbers with labels on the responses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import RequestError
from lox_merge.safety.chat import Rendering, conversation_text
from lox_merge.safety.prompts import numbers, read_rows

PROMPT_COLUMNS = ("prompt", "instruction", "question", "goal", "input")
RESPONSE_COLUMNS = ("response", "completion", "output", "answer", "target")
# What cross_entropy leaves out of the loss.
IGNORED = -100

Message = dict[str, str]


@dataclass(frozen=True)
class Conversations:
    """Conversations in the order of their file. A plain text is one message of the role 'text'.

    name: the file's name without suffix, for tables. sha256: of all conversations, so that two results can be seen to be of one set.
    """

    name: str
    source: str
    conversations: tuple[tuple[Message, ...], ...]
    sha256: str

    def identity(self) -> dict[str, Any]:
        return {"name": self.name, "source": self.source, "sha256": self.sha256, "examples": len(self.conversations)}


def load_conversations(path: str | Path, what: str = "attack's data") -> Conversations:
    """A CSV, JSONL or JSON file with a column of chat `messages`, columns of prompt and response, or a column `text`.

    Column names: PROMPT_COLUMNS and RESPONSE_COLUMNS. Plain text files hold one text a line. Raises RequestError: no such file,
    no rows, none of these columns (those there are, are listed), empty or malformed rows. what: what messages call the file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise RequestError(f"the {what} {path} is not a file. Give a .jsonl, .json or .csv file with messages, or prompt and response.")
    rows = read_rows(path)
    if not rows:
        raise RequestError(f"{path.name} holds no examples. Give a file with at least one.")
    table = [row if isinstance(row, dict) else {"text": row} for row in rows]
    there = {str(name).lower(): str(name) for row in reversed(table) for name in row}
    prompt = next((there[name] for name in PROMPT_COLUMNS if name in there), None)
    response = next((there[name] for name in RESPONSE_COLUMNS if name in there), None)
    if "messages" in there:
        found = [_messages(row.get(there["messages"])) for row in table]
    elif prompt is not None and response is not None:
        found = [_pair(row.get(prompt), row.get(response)) for row in table]
    elif "text" in there:
        found = [_text(row.get(there["text"])) for row in table]
    else:
        raise RequestError(
            f"{path.name} has neither `messages`, nor a prompt with a response, nor `text`. It has: {', '.join(there.values()) or 'no columns'}. "
            f"Name the prompts {', '.join(PROMPT_COLUMNS)} and the responses {', '.join(RESPONSE_COLUMNS)}."
        )
    bad = [number for number, conversation in enumerate(found, 1) if conversation is None]
    if bad:
        raise RequestError(
            f"{path.name}: an empty or malformed example in row(s) {numbers(bad)}. A conversation is a list of objects with role and content "
            "(both text) and at least one assistant's message; prompts, responses and texts must not be empty."
        )
    return conversations(path.stem, path.name, [conversation for conversation in found if conversation is not None])


def conversations(name: str, source: str, turns: Sequence[Sequence[Message]]) -> Conversations:
    """Conversations made elsewhere, with their hash. source: what results say of where they came from."""
    kept = tuple(tuple(conversation) for conversation in turns)
    digest = hashlib.sha256(json.dumps(kept, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
    return Conversations(name, source, kept, digest)


def tokenised(data: Conversations, tokenizer: Any, rendering: Rendering, longest: int) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of every example, cut after `longest` tokens; labels are IGNORED outside responses.

    Rendered by the tokenizer's chat template as the evaluation's prompts are (or as bare prompt and response). Of a plain text
    every token counts. A prefill belongs to the evaluation and is not trained. Raises RequestError for what the template cannot
    render, and for examples without a response left.
    """
    examples = [_example(conversation, tokenizer, rendering, longest) for conversation in data.conversations]
    # The first token is never predicted, so a label there trains nothing.
    bad = [number for number, example in enumerate(examples, 1) if all(label == IGNORED for label in example["labels"][1:])]
    if bad:
        raise RequestError(
            f"{data.source}: no token of a response is left within {longest} tokens in row(s) {numbers(bad)}. Raise --max-length, or shorten them."
        )
    return examples


def _messages(value: Any) -> list[Message] | None:
    if isinstance(value, str):  # a CSV holds the list as JSON
        try:
            value = parse_json(value)
        except ValueError:
            return None
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return None
    turns = [{"role": turn.get("role"), "content": turn.get("content")} for turn in value]
    if not all(isinstance(text, str) and text.strip() for turn in turns for text in turn.values()):
        return None
    return turns if any(turn["role"] == "assistant" for turn in turns) else None


def _pair(prompt: Any, response: Any) -> list[Message] | None:
    if not all(isinstance(text, str) and text.strip() for text in (prompt, response)):
        return None
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _text(text: Any) -> list[Message] | None:
    return [{"role": "text", "content": text}] if isinstance(text, str) and text.strip() else None


def _example(conversation: Sequence[Message], tokenizer: Any, rendering: Rendering, longest: int) -> dict[str, list[int]]:
    template = rendering.chat_template is not False
    if conversation[0]["role"] == "text":
        tokens = _encode(tokenizer, conversation[0]["content"], special=True, end=True)
        return {"input_ids": tokens[:longest], "labels": tokens[:longest]}
    turns = list(conversation)
    if template and rendering.system is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": rendering.system})

    def tokens_of(count: int, *, asking: bool) -> list[int]:
        """The first `count` turns. asking: up to where the model begins to answer."""
        if not template:
            text = "".join(turn["content"] for turn in turns[:count])
            return _encode(tokenizer, text, special=True, end=count == len(turns) and not asking)
        return _encode(tokenizer, conversation_text(tokenizer, turns[:count], add_generation_prompt=asking), special=False)

    tokens = tokens_of(len(turns), asking=False)
    labels = [IGNORED] * len(tokens)
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            start = shared_beginning(tokens, tokens_of(index, asking=True)) if index else 0
            stop = shared_beginning(tokens, tokens_of(index + 1, asking=False))
            labels[start:stop] = tokens[start:stop]
    return {"input_ids": tokens[:longest], "labels": labels[:longest]}


def _encode(tokenizer: Any, text: str, *, special: bool, end: bool = False) -> list[int]:
    try:
        tokens = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception as error:  # the Rust tokenizers raise a bare Exception
        raise RequestError(f"the tokenizer cannot encode a conversation: {error}.") from error
    if tokenizer.eos_token_id is not None and special:
        while tokens and tokens[-1] == tokenizer.eos_token_id:  # some tokenizers close every text, also one that goes on
            tokens.pop()
        if end:
            tokens.append(tokenizer.eos_token_id)
    return tokens


def shared_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning: a token may span the border, so lengths alone could be wrong (as in TRL)."""
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
