"""What the models are given to read: responses to prompts, plain texts, and beginnings of replies, as token numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lox_merge.errors import PlanError, RequestError
from lox_merge.safety.chat import Rendering, check_rendering, continued, encoded, render
from lox_merge.safety.conversations import PROMPT_COLUMNS, Conversations, Message, shared_beginning
from lox_merge.safety.outline import Outline
from lox_merge.safety.prompts import numbers, read_rows


@dataclass(frozen=True)
class Text:
    """tokens: prompt and response. start: the first token that is scored, at least 1; those before it are given."""

    tokens: tuple[int, ...]
    start: int

    @property
    def scored(self) -> tuple[int, ...]:
        return self.tokens[self.start :]


@dataclass(frozen=True)
class Prefix:
    """A user's prompt, and how the reply begins. plain: `prompt` is a bare text that goes on, without a chat template."""

    prompt: str
    prefill: str | None = None
    plain: bool = False

    def rendering(self, rendering: Rendering) -> Rendering:
        if self.plain:
            return Rendering(chat_template=False, prefill=self.prefill)
        return replace(rendering, prefill=self.prefill)


def load_prefixes(path: str | Path) -> list[Prefix]:
    """A CSV, JSONL or JSON file with a column of prompts (PROMPT_COLUMNS) and perhaps `prefill`, or a column `text` of bare beginnings.

    Plain text files hold one prompt a line. Raises RequestError.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise RequestError(f"the file of beginnings {path} is not a file. Give a .jsonl, .json or .csv file with prompt and prefill, or .txt.")
    rows = read_rows(path)
    if not rows:
        raise RequestError(f"{path.name} holds no beginnings. Give a file with at least one.")
    table = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    columns = {str(name).lower(): str(name) for row in reversed(table) for name in row}
    named = next((name for name in (*PROMPT_COLUMNS, "text") if name in columns), None)
    if named is None:
        raise RequestError(f"{path.name} has no column of prompts ({', '.join(PROMPT_COLUMNS)}) or `text`. It has: {', '.join(columns.values())}.")
    found = [(row.get(columns[named]), row.get(columns.get("prefill", "prefill")) or None) for row in table]
    bad = [row for row, (text, prefill) in enumerate(found, 1) if not _is_text(text) or not (prefill is None or isinstance(prefill, str))]
    if bad:
        raise RequestError(f"{path.name}: an empty or malformed beginning in row(s) {numbers(bad)}. Prompts are texts and must not be empty.")
    return [Prefix(str(text), prefill, named == "text") for text, prefill in found]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


@dataclass(frozen=True)
class Reading:
    """All that every model reads, rendered once: the texts of each set, and the prefixes. sources: of the sets, for messages."""

    sources: tuple[str, ...]
    sets: tuple[tuple[Text, ...], ...]
    prefixes: tuple[tuple[int, ...], ...]

    @property
    def texts(self) -> list[Text]:
        return [text for texts in self.sets for text in texts]

    def where(self, number: int) -> str:
        """What a message calls the text of this number, counted from 0 over all sets."""
        for source, texts in zip(self.sources, self.sets, strict=True):
            if number < len(texts):
                return f"row {number + 1} of {source}"
            number -= len(texts)
        raise IndexError(number)


def prepare(
    sets: Sequence[Conversations], prefixes: Sequence[Prefix], rendering: Rendering, outlines: Mapping[str, Outline], tokenizer: Any, size: int
) -> Reading:
    """Renders everything with one tokenizer. Of a conversation the last response is scored, and what comes before it is given.

    Only the response's own words are scored: what the template writes before and after them (a header, the end of the turn) says more
    of the format than of the answer, and a base model has never seen it. Of a plain text all is scored but its first token.
    size: token numbers that all models share. Raises RequestError for what the template cannot render, PlanError with every row that
    is longer than a model's context, that has no response, or whose tokens not all models know: nothing is cut silently.
    """
    if any(not _plain(turns) for data in sets for turns in data.conversations) or any(not prefix.plain for prefix in prefixes):
        check_rendering(tokenizer, rendering)
    rooms = {label: known.context for label, known in outlines.items() if known.context is not None}
    narrowest = min(rooms, key=lambda label: rooms[label], default="")
    limits = _Limits(narrowest, rooms.get(narrowest), size)
    problems: list[str] = []
    read = []
    for data in sets:
        texts = [_read(turns, tokenizer, rendering) for turns in data.conversations]
        empty = [row for row, text in enumerate(texts, 1) if text is None or not text.scored]
        if empty:
            problems.append(
                f"{data.source}: no token of a response to score in row(s) {numbers(empty)}. Give each at least one word, or leave it out."
            )
        problems += limits.problems(f"{data.source}: row(s)", [text.tokens if text else () for text in texts])
        read.append(tuple(text for text in texts if text))
    begun = tuple(tuple(render(tokenizer, prefix.prompt, prefix.rendering(rendering))) for prefix in prefixes)
    problems += limits.problems("the beginnings: number(s)", begun)
    if problems:
        raise PlanError(problems)
    return Reading(tuple(data.source for data in sets), tuple(read), begun)


def _plain(turns: Sequence[Message]) -> bool:
    return turns[0]["role"] == "text"


def _read(turns: Sequence[Message], tokenizer: Any, rendering: Rendering) -> Text | None:
    """None where there is no response with a word in it."""
    last = max((place for place, turn in enumerate(turns) if turn["role"] in ("assistant", "text")), default=None)
    if last is None or not turns[last]["content"].strip():
        return None
    before, words = list(turns[:last]), turns[last]["content"]
    if _plain(turns) or rendering.chat_template is False:
        bare = Rendering(chat_template=False)
        given = "".join(turn["content"] for turn in before)
        tokens, context = render(tokenizer, given + words, bare), render(tokenizer, given, bare) if given else []
    else:
        if rendering.system is not None and turns[0]["role"] != "system":
            before.insert(0, {"role": "system", "content": rendering.system})
        text = continued(tokenizer, [*before, turns[last]])
        tokens, context = encoded(tokenizer, text), encoded(tokenizer, text[: text.rindex(words.strip())])
    # Without a beginning-of-text token the first token of a plain text has no context, so nothing expects it.
    return Text(tuple(tokens), max(1, shared_beginning(tokens, context)))


@dataclass(frozen=True)
class _Limits:
    """What every text must keep to: the smallest context, and whose it is; token numbers that all models know."""

    narrowest: str
    room: int | None
    size: int

    def problems(self, where: str, rows: Sequence[Sequence[int]]) -> list[str]:
        found = []
        long = [row for row, tokens in enumerate(rows, 1) if self.room is not None and len(tokens) > self.room]
        if long:
            longest = max(map(len, rows))
            found.append(
                f"{where} {numbers(long)}: up to {longest:,} tokens, more than the {self.room:,} that {self.narrowest} can see. "
                "Shorten or leave them out; nothing is cut."
            )
        unknown = [row for row, tokens in enumerate(rows, 1) if max(tokens, default=0) >= self.size]
        if unknown:
            found.append(f"{where} {numbers(unknown)}: tokens beyond the {self.size:,} that all models know. Leave them out.")
        return found
