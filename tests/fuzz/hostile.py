"""Strategies for hostile files: a sound JSON document with a few places spoilt, and the bytes of it spoilt once more."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

# Stand for what json.dumps cannot write: nesting deeper than any stack, and a number of more digits than Python converts.
_DEEP, _DIGITS = "\ue000deep\ue000", "\ue000digits\ue000"
_TEXTS = {f'"{_DEEP}"': "[" * 100_000 + "]" * 100_000, f'"{_DIGITS}"': "9" * 5_000}

SCRIPT = "<script>alert(1)</script>"
TEXTS = (
    *("", " ", "\x00", "a\x00b", "\ud800", "\udfff.weight", "\u202egnp", "\ufeff", "é" * 300, "x" * 5_000),
    *("../../etc/passwd", "/etc/passwd", "..\\..\\x", "C:\\x", "file:///etc/passwd", "~/.ssh/id_rsa", "a/../../b", "."),
    *(
        SCRIPT,
        '"><img src=x onerror=alert(1)>',
        "' onclick='alert(1)",
        "javascript:alert(1)",
        "</title><script>",
        "{{7*7}}",
        "%s%n",
        "$(id)",
        "[red]x[/]",
        "[/]",
    ),
    *("(a+)+$", "(.|.)+[A-Z]", "(", "[", "*", "(?P<x>"),
    *("nan", "inf", "-1", "1e999", "full", "energy:2", "٣", "0x10", "10%", _DEEP, _DIGITS),
)
NUMBERS = (0, -1, 1, 2, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, -(2**63), 0.5, -0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf)
OTHERS = (None, True, False, [], {}, [[]], [None], [{}], {"": None}, {"a": {"a": {}}}, [1, 2], ["a"], {"weight_map": {}})

values = st.one_of(
    st.sampled_from(TEXTS),
    st.sampled_from(NUMBERS),
    st.sampled_from(OTHERS).map(copy.deepcopy),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
)


@st.composite
def spoilt(draw: Callable[..., Any], document: Any, places: int = 3) -> Any:
    """`document` with one to `places` places replaced, removed, renamed, doubled or added."""
    root = [copy.deepcopy(document)]
    for _ in range(draw(st.integers(1, places))):
        if not root:
            return None  # the whole document was removed
        holder, key = root, 0
        for _ in range(draw(st.integers(0, 7))):
            inner = holder[key]  # type: ignore[call-overload]
            if not isinstance(inner, (dict, list)) or not inner:
                break
            names = list(inner) if isinstance(inner, dict) else range(len(inner))
            holder, key = inner, names[draw(st.integers(0, len(names) - 1))]  # type: ignore[assignment]
        _spoil(draw, holder, key)
    return root[0] if root else None


def _spoil(draw: Callable[..., Any], holder: Any, key: Any) -> None:
    what = draw(st.sampled_from(("replace", "replace", "replace", "remove", "rename", "double", "add")))
    if what == "remove":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        name = draw(st.one_of(st.sampled_from(TEXTS), st.sampled_from(list(map(str, holder)))))
        holder[name] = holder.pop(key)
    elif what == "double":
        value = copy.deepcopy(holder[key])
        if isinstance(holder, list):
            holder.append(value)
        else:
            holder[f"{key}{draw(st.sampled_from(('', '.', '2', SCRIPT)))}"] = value
    elif what == "add" and isinstance(holder[key], (dict, list)):
        if isinstance(holder[key], list):
            holder[key].append(draw(values))
        else:
            holder[key][draw(st.sampled_from(TEXTS))] = draw(values)
    else:
        holder[key] = draw(values)


@st.composite
def with_hostile_texts(draw: Callable[..., Any], document: Any) -> Any:
    """`document` with a few of its texts replaced by others, so that every shape stays sound."""
    changed = copy.deepcopy(document)
    holders: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, str):
                holders.append((value, key))
            elif isinstance(inner, (dict, list)):
                collect(inner)

    collect(changed)
    for _ in range(draw(st.integers(1, 6)) if holders else 0):
        holder, key = holders[draw(st.integers(0, len(holders) - 1))]
        holder[key] = draw(st.one_of(st.sampled_from([text for text in TEXTS if text not in (_DEEP, _DIGITS)]), st.text(max_size=20)))
    return changed


@st.composite
def json_bytes(draw: Callable[..., Any], document: Any, places: int = 3) -> bytes:
    """A spoilt document as bytes, which now and then are no UTF-8, no JSON, or JSON that parsers read in different ways."""
    return draw(tampered(written(draw(spoilt(document, places)))))


def written(value: Any) -> bytes:
    """A document with marks for deep nesting and long numbers as bytes."""
    text = json.dumps(value)
    for mark, meant in _TEXTS.items():
        text = text.replace(json.dumps(mark[1:-1]), meant)
    return text.encode()


@st.composite
def tampered(draw: Callable[..., Any], data: bytes) -> bytes:
    """The same bytes four times out of five; else cut, flipped, doubled, in another encoding, or with a byte order mark."""
    how = draw(st.integers(0, 39))
    place = draw(st.integers(0, len(data))) if how < 8 else 0
    if how == 0:
        return data[:place]
    if how == 1:
        return data[:place] + draw(st.binary(min_size=1, max_size=4)) + data[place + 1 :]
    if how == 2:
        return data[:place] + b"\xff\xfe" + data[place:]
    if how == 3:
        return b"\xef\xbb\xbf" + data
    if how == 4:
        return data.decode("utf-8", "replace").encode("utf-16")
    if how == 5 and data.startswith(b"{"):
        return b'{"__metadata__":{"format":"pt"},"weight_map":{},"format":1,"id":"0",' + data[1:]
    if how == 6:
        return data + data
    if how == 7:
        return b""
    return data
