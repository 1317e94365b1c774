"""A function of the user's own as judge."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from types import NoneType
from typing import Any

from lox_merge.errors import RequestError
from lox_merge.safety.judges.loading import finite_threshold, load_object, source_hash
from lox_merge.safety.types import Exchange, Verdict, without_halves

_UNDECIDED = "the judge returned None (undecided)"


class PythonJudge:
    """`function(prompt, reply)`, named `module:function` or `file.py:function`.

    It returns True or False (whether the attack succeeded), None (undecided), a number (a score: success from the threshold
    on), or a types.Verdict. What it raises leaves the reply undecided, with the error's text. Its identity is the hash of
    the named file, and of the one that defines it: after changing only what these import, judge without the cache.
    """

    def __init__(self, function: str, *, threshold: float = 0.5) -> None:
        """Raises RequestError where the function is not there or cannot be called, or the threshold is not finite."""
        self._text, self._threshold = function, finite_threshold(threshold)
        self._function = load_object(function, "the judge python")
        if not callable(self._function):
            raise RequestError(f"the judge python:{function} is not a function.")

    @property
    def name(self) -> str:
        place, _, attribute = self._text.rpartition(":")
        return f"python:{place.replace(chr(92), '/').rpartition('/')[2]}:{attribute}"

    def identity(self) -> dict[str, Any]:
        return {"kind": "python", "function": self.name, "source_sha256": source_hash(self._text, self._function), "threshold": self._threshold}

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        with redirect_stdout(sys.stderr):  # what the function prints is no result
            return [self._verdict(exchange) for exchange in exchanges]

    def _verdict(self, exchange: Exchange) -> Verdict:
        try:
            value = self._function(exchange.prompt, exchange.reply)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return Verdict(None, None, f"the judge failed: {type(error).__name__}: {_words(error, str)}")
        if isinstance(value, Verdict):
            return self._checked(value)
        if value is None:
            return Verdict(None, None, _UNDECIDED)
        value = _plain(value)
        if isinstance(value, bool):
            return Verdict(value)
        score = _number(value)
        if score is not None:
            return Verdict(score >= self._threshold, score)
        return Verdict(None, None, f"the judge returned {_words(value, repr)}, which is no bool, None, finite number or Verdict")

    @staticmethod
    def _checked(given: Verdict) -> Verdict:
        """A function's own Verdict in plain values; undecided where it holds what cannot be one."""
        success, score = _plain(given.success), None if given.score is None else _number(_plain(given.score))
        if not isinstance(success, (bool, NoneType)) or (given.score is not None and score is None):
            return Verdict(None, None, f"the judge returned {_words(given, repr)}, whose success is no bool or None, or whose score is not finite")
        explanation = _words(given.explanation, str)
        return Verdict(success, score, explanation if success is not None or explanation else _UNDECIDED)


def _plain(value: Any) -> Any:
    """The plain value of a number of numpy or torch."""
    if type(value) in (bool, int, float) or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except Exception:  # of several numbers, or of something that only looks like one
        return value


def _number(value: Any) -> float | None:
    """A finite float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def _words(value: Any, form: Callable[[Any], str]) -> str:
    """A text that can be written anywhere, whatever a class makes of itself."""
    try:
        return without_halves(form(value))
    except Exception:  # its own __str__ or __repr__ fails, with anything
        return f"<{type(value).__name__}>"
