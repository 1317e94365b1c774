"""What the models read: the first tokens of responses, and prompts up to where the reply begins; which layers are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lox_merge.diagnostics.behaviour.texts import Text, prepare
from lox_merge.errors import PlanError, RequestError
from lox_merge.safety.chat import Rendering, check_rendering, render
from lox_merge.safety.conversations import Conversations
from lox_merge.safety.outline import Outline
from lox_merge.safety.prompts import numbers
from lox_merge.safety.types import PromptSet


@dataclass(frozen=True)
class Reading:
    """All that every model reads, rendered once. domains: tokens up to the last that is read, and the positions whose states are kept.

    lengths: of each domain, how many tokens each whole response has. prompts: token numbers, by set; the last one's state is kept.
    """

    domains: tuple[tuple[Text, ...], ...]
    tokens: int
    prompts: tuple[tuple[tuple[int, ...], ...], ...]

    def rows(self, domain: int) -> list[tuple[int, ...]]:
        """Later tokens cannot change the states of earlier ones, so they are not read."""
        return [text.tokens[: text.start + self.tokens] for text in self.domains[domain]]

    def positions(self, domain: int) -> list[range]:
        return [range(text.start, min(len(text.tokens), text.start + self.tokens)) for text in self.domains[domain]]


def read(
    domains: Sequence[Conversations],
    prompts: Mapping[str, PromptSet],
    tokens: int,
    rendering: Rendering,
    outlines: Mapping[str, Outline],
    tokenizer: Any,
    vocabulary: int,
) -> Reading:
    """Renders everything with one tokenizer. Raises RequestError for what the template cannot render, PlanError as `prepare` does:
    empty responses, texts or prompts longer than a model's context, tokens that not all models know."""
    texts = prepare(domains, (), rendering, outlines, tokenizer, vocabulary).sets
    if prompts:
        check_rendering(tokenizer, rendering)
    room = min((known.context for known in outlines.values() if known.context is not None), default=None)
    rows, problems = [], []
    for name, found in prompts.items():
        rows.append(tuple(tuple(render(tokenizer, prompt.text, rendering)) for prompt in found.prompts))
        if long := [row for row, text in enumerate(rows[-1], 1) if room is not None and len(text) > room]:
            problems.append(
                f"{name}: prompt(s) {numbers(long)} of up to {max(map(len, rows[-1])):,} tokens are longer than the {room:,} that all models can "
                "see. Shorten or leave them out; nothing is cut."
            )
        if unknown := [row for row, text in enumerate(rows[-1], 1) if max(text) >= vocabulary]:
            problems.append(f"{name}: prompt(s) {numbers(unknown)}: tokens beyond the {vocabulary:,} that all models know. Leave them out.")
    if problems:
        raise PlanError(problems)
    return Reading(texts, tokens, tuple(rows))


def chosen_layers(wanted: Sequence[int] | None, outlines: Mapping[str, Outline]) -> tuple[list[int], int, int]:
    """Layers from 0 (what the first block reads) to L, L itself, and the width of a state, which all models must share.

    wanted: None for all; negative ones count from the end, −1 is L. Raises RequestError.
    """
    (first, known), *rest = outlines.items()
    for label, other in rest:
        if (other.layers, other.width) != (known.layers, known.width):
            raise RequestError(
                f"{first} has {known.layers} layers of width {known.width}, {label} {other.layers} of width {other.width}: their hidden "
                "states cannot be compared. Give models of one architecture."
            )
    depth = known.layers
    if wanted is None:
        return list(range(depth + 1)), depth, known.width
    if not wanted:
        raise RequestError("no layer is named. Give some, or leave --layers out for all.")
    if unknown := [layer for layer in wanted if not -depth - 1 <= layer <= depth]:
        raise RequestError(
            f"layer {unknown[0]} does not exist: the models have 0 (embeddings) to {depth}, what block {depth} gives after the final normalisation; "
            "-1 is the last."
        )
    return sorted({layer % (depth + 1) for layer in wanted}), depth, known.width
