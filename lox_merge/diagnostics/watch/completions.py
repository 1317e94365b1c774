"""The safe completions that a watch looks at, as token numbers with labels on the replies."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lox_merge.diagnostics.curvature.walk import Example, check_examples
from lox_merge.diagnostics.watch.settings import WatchSettings
from lox_merge.errors import RequestError
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import Conversations, tokenised


def chosen_examples(given: Conversations | Sequence[Example], settings: WatchSettings, tokenizer: Any, rendering: Rendering) -> list[Example]:
    """At most `limit` of them (of conversations a seeded sample, of token rows the first), cut after `max_length` tokens.

    Raises RequestError: none, one without a token of a reply, or conversations without a tokenizer.
    """
    if not isinstance(given, Conversations):
        rows = [{name: list(row[name])[: settings.max_length] for name in ("input_ids", "labels")} for row in given][: settings.limit]
        check_examples(rows)
        return rows
    if tokenizer is None:
        raise RequestError("the trainer has no tokenizer for the completions. Give AlignmentWatch one: tokenizer=…")
    kept = given.conversations
    if len(kept) > settings.limit:
        kept = tuple(random.Random(settings.seed).sample(kept, settings.limit))
    return tokenised(replace(given, conversations=kept), tokenizer, rendering, settings.max_length)
