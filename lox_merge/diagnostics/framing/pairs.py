"""Rows of two data sets that share their completions, and the tokens that both framings have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lox_merge.errors import RequestError
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import IGNORED, Conversations, tokenised
from lox_merge.safety.prompts import numbers

Matching = Literal["order", "completion"]
MATCHINGS: tuple[Matching, ...] = ("order", "completion")
_ADVICE = "Both files must hold the same completions, under two framings of the request."


@dataclass(frozen=True)
class Framed:
    """One completion under one framing. tokens: of the whole text. positions: of the shared completion tokens in it, ascending, above 0."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """One completion under both framings. rows: in each file, from 1. excluded: completion tokens that differ and are left out."""

    rows: tuple[int, int]
    first: Framed
    second: Framed
    excluded: int

    @property
    def completion(self) -> tuple[int, ...]:
        """The shared tokens."""
        return tuple(self.first.tokens[position] for position in self.first.positions)


def matched_rows(first: Conversations, second: Conversations, matching: Matching = "order") -> list[tuple[int, int]]:
    """Places of the rows that belong together, from 0.

    matching: 'order' takes row i with row i; 'completion' takes rows whose completions are the same text, repeated ones in their
    order. Raises RequestError that names the rows without a partner, rows of plain text, and an unknown matching.
    """
    if matching not in MATCHINGS:
        raise RequestError(f"matching {matching!r} is not known; use {' or '.join(MATCHINGS)}.")
    texts = [[_completion(turns) for turns in data.conversations] for data in (first, second)]
    for data, found in zip((first, second), texts, strict=True):
        if bad := [row for row, text in enumerate(found, 1) if text is None]:
            raise RequestError(f"{data.source}: plain text in row(s) {numbers(bad)} has no prompt and completion. Give messages, or both columns.")
    if matching == "order":
        return _by_order(first, second, texts)
    return _by_completion(first, second, texts)


def framed_pairs(
    first: Conversations, second: Conversations, rows: Sequence[tuple[int, int]], tokenizer: Any, rendering: Rendering, context: int | None
) -> list[Pair]:
    """Both framings of every pair as tokens.

    A token may span the border of prompt and completion, so that the same text begins with other tokens; what both end on alike is
    kept. context: tokens that the model can read. Raises RequestError for rows that are longer or have no completion token in common.
    """
    examples = [tokenised(data, tokenizer, rendering, 2**62) for data in (first, second)]
    for data, found in zip((first, second), examples, strict=True):
        if long := [row for row, example in enumerate(found, 1) if context is not None and len(example["input_ids"]) > context]:
            raise RequestError(f"{data.source}: row(s) {numbers(long)} have more than the {context:,} tokens that the model reads. Shorten them.")
    pairs = [_pair(examples[0][one], examples[1][other], (one + 1, other + 1)) for one, other in rows]
    if bad := [pair.rows[0] for pair in pairs if not pair.first.positions]:
        raise RequestError(
            f"{first.source}: in row(s) {numbers(bad)} no token of the completion is the same under both framings. "
            "Begin completions with a space or a new line."
        )
    return pairs


def _completion(turns: Sequence[dict[str, str]]) -> tuple[str, ...] | None:
    return tuple(turn["content"] for turn in turns if turn["role"] == "assistant") or None


def _by_order(first: Conversations, second: Conversations, texts: Sequence[Sequence[Any]]) -> list[tuple[int, int]]:
    if len(texts[0]) != len(texts[1]):
        raise RequestError(
            f"{first.source} has {len(texts[0])} rows and {second.source} has {len(texts[1])}. {_ADVICE} "
            "--match completion pairs rows by their completions, whatever their order."
        )
    if bad := [row for row, (one, other) in enumerate(zip(*texts, strict=True), 1) if one != other]:
        raise RequestError(
            f"{first.source} and {second.source} have different completions in row(s) {numbers(bad)}. {_ADVICE} "
            "--match completion pairs rows by their completions, whatever their order."
        )
    return [(row, row) for row in range(len(texts[0]))]


def _by_completion(first: Conversations, second: Conversations, texts: Sequence[Sequence[Any]]) -> list[tuple[int, int]]:
    places: dict[Any, list[int]] = defaultdict(list)
    for place, text in reversed(list(enumerate(texts[1]))):
        places[text].append(place)
    rows, alone = [], []
    for place, text in enumerate(texts[0]):
        if places[text]:
            rows.append((place, places[text].pop()))
        else:
            alone.append(place + 1)
    left = sorted(place + 1 for found in places.values() for place in found)
    if alone or left:
        without = [f"{data.source}: row(s) {numbers(bad)}" for data, bad in ((first, alone), (second, left)) if bad]
        raise RequestError(f"these rows have a completion that the other file lacks: {'; '.join(without)}. {_ADVICE}")
    return rows


def _pair(one: dict[str, list[int]], other: dict[str, list[int]], rows: tuple[int, int]) -> Pair:
    # The first token of a text is never predicted.
    targets = [[place for place, label in enumerate(example["labels"]) if label != IGNORED and place > 0] for example in (one, other)]
    tokens = [[example["input_ids"][place] for place in found] for example, found in zip((one, other), targets, strict=True)]
    shared = next((n for n, (a, b) in enumerate(zip(tokens[0][::-1], tokens[1][::-1], strict=False)) if a != b), min(map(len, tokens)))
    framed = [Framed(tuple(example["input_ids"]), tuple(found[len(found) - shared :])) for example, found in zip((one, other), targets, strict=True)]
    return Pair(rows, framed[0], framed[1], max(map(len, tokens)) - shared)
