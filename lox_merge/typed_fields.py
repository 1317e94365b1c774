"""Settings that are dataclasses: each value is of the type that its field says, and is put into one form.

Python takes anything for any field. A pattern given as a bare text would be read letter by letter, and a number given as a text would
fail in the middle of the work, or not at all.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lox_merge.errors import RecipeError

_SHOWN = 80


class FieldError(RecipeError):
    """A value is of another type than its field."""


def check_fields(settings: Any) -> None:
    """Checks every field of a dataclass against its annotation and puts the value in the field's own form: sequences become tuples, a
    single text where several may stand becomes a tuple of one.
    Raises FieldError with field, value and what may stand there."""
    kind: Any = type(settings)
    for name, wanted in _fields(kind):
        object.__setattr__(settings, name, _checked(getattr(settings, name), wanted, name))  # also where it is frozen


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raises RecipeError where `value` is none of the allowed texts."""
    if value not in allowed:
        raise RecipeError(f"{name} {value!r} is not known; use one of {', '.join(allowed)}.")


@cache
def _fields(kind: Any) -> tuple[tuple[str, Any], ...]:
    hints = get_type_hints(kind)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(kind) if field.init)


def _checked(value: Any, wanted: Any, name: str) -> Any:
    """`value` as `wanted`, an annotation, has it."""
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        for part in parts:
            with suppress(FieldError):
                return _checked(value, part, name)
        raise _wrong(value, wanted if len(parts) > 2 else parts[0], name)
    if origin is tuple:
        return _checked_tuple(value, wanted, name)
    if origin is Mapping and isinstance(value, Mapping):
        return {_checked(key, parts[0], name): _checked(entry, parts[1], f"{name}[{key!r}]") for key, entry in value.items()}
    if wanted in (int, float):
        return _checked_number(value, wanted, name)
    kind = str if origin is Literal else origin or wanted
    if not isinstance(value, kind):
        raise _wrong(value, wanted, name)
    return value


def _checked_tuple(value: Any, wanted: Any, name: str) -> tuple[Any, ...]:
    parts = get_args(wanted)
    several = parts[-1] is Ellipsis
    if isinstance(value, str) and several and parts[0] is str:
        return (value,)
    # A text would be taken apart, and of a mapping only the keys be seen.
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise _wrong(value, wanted, name)
    found = tuple(value)
    if several:
        return tuple(_checked(entry, parts[0], f"an entry of {name}") for entry in found)
    if len(found) != len(parts):
        raise _wrong(value, wanted, name)
    return tuple(_checked(entry, part, name) for entry, part in zip(found, parts, strict=True))


def _checked_number(value: Any, wanted: type[int] | type[float], name: str) -> int | float:
    """Numbers of other libraries are numbers too; a truth value is none."""
    if isinstance(value, bool) or not isinstance(value, Real) or (wanted is int and not (isinstance(value, Integral) or float(value).is_integer())):
        raise _wrong(value, wanted, name)
    try:
        return int(value) if wanted is int and isinstance(value, Integral) else wanted(float(value))
    except OverflowError:
        raise _wrong(value, wanted, name) from None


def _wrong(value: Any, wanted: Any, name: str) -> FieldError:
    try:
        shown = repr(value)
    except ValueError:  # Python writes no whole numbers of thousands of digits
        shown = "too large"
    return FieldError(f"{name} is {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '…'}; use {_described(wanted)}.")


def _described(wanted: Any) -> str:
    origin, parts = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is tuple and parts[-1] is not Ellipsis:
        return f"a pair of {' and '.join(map(_described, parts))}"
    if origin is tuple and get_origin(parts[0]) is tuple:
        return "a tuple of pairs, such as (('mlp', 4),)"
    if origin is tuple:
        return "a text or a tuple of texts, such as ('lm_head',)" if parts[0] is str else f"a tuple, each entry {_described(parts[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(_described(part) for part in parts)
    plain = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    return plain.get(wanted) or f"a {getattr(origin or wanted, '__name__', wanted)}"
