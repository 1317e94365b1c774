"""Regular expressions that may stand in files of others: matched with a limit, since some would take longer than anybody waits."""

from __future__ import annotations

from typing import Any

import regex  # type: ignore[import-untyped]

# A name takes microseconds; only a pattern that is made to take for ever gets here.
_SECONDS = 1.0
_SHOWN = 200


def compile_pattern(pattern: str) -> Any:
    """The pattern in the dialect of `re`. Raises ValueError for what is no regular expression."""
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:_SHOWN]!r} is not a regular expression: {error}") from None


def found(compiled: Any, name: str, *, at_start: bool = False) -> bool:
    """Whether the pattern is found in `name` (at_start: there). Raises ValueError where that takes more than a second."""
    try:
        search = compiled.match if at_start else compiled.search
        return search(name, timeout=_SECONDS) is not None
    except TimeoutError:
        raise ValueError(
            f"the regular expression {compiled.pattern[:_SHOWN]!r} takes too long on the name {name[:_SHOWN]!r}; write it without nested repetitions"
        ) from None
