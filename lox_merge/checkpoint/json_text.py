"""JSON of files that others wrote: whatever is wrong with it is one kind of error."""

from __future__ import annotations

import json
from typing import Any

# What reads a value calls itself level by level; nothing that is read here has more than ten.
_DEEPEST = 200
_CONTAINERS = frozenset((dict, list))  # json makes no subclasses of them


def parse_json(data: bytes | str, *, unique: bool = False) -> Any:
    """The value of JSON text (bytes: UTF-8 without a byte order mark).

    unique: a name that an object holds twice is an error too, since parsers disagree on which of them counts. Raises ValueError for
    everything that cannot be read: no UTF-8, no JSON, nested deeper or numbers longer than Python takes, and halves of surrogate pairs,
    which could not be written or printed again.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
        if "\\ud" in text.lower():  # an escape is the only way in: UTF-8 itself has no surrogates
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        if isinstance(value, (dict, list)) and _deeper(value, _DEEPEST):
            raise RecursionError
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("a text in it holds half a surrogate pair") from None
    return value


def _deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        # A header of 100,000 tensors has half a million values: `type` and a set take half of the time that isinstance does.
        level = [inner for part in level for inner in (part.values() if type(part) is dict else part) if type(inner) in _CONTAINERS]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it holds {next(name for name in names if names.count(name) > 1)!r} twice")
    return found
