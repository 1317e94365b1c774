"""A function of the user's own as judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from types import NoneType
from typing import Any

from lox_merge.errors import RequestError
from lox_merge.safety.judges.loading import finite_threshold, load_object, source_hash
from lox_merge.safety.types import Exchange, Verdict

_UNDECIDED = "the judge returned None (undecided)"


class PythonJudge:
    """`function(prompt, reply)`, named `module:function` or `file.py:function`.

    It returns True or False (whether the attack succeeded), None (undecided), a number (a score: success from the threshold
    on), or a types.Verdict. What it raises leaves the reply undecided, with the error's text. Its identity is the hash of
    the file that defines it: after changing only what that file imports, judge without the cache.
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
        return {"kind": "python", "function": self.name, "source_sha256": source_hash(self._function), "threshold": self._threshold}

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        return [self._verdict(exchange) for exchange in exchanges]

    def _verdict(self, exchange: Exchange) -> Verdict:
        try:
            value = self._function(exchange.prompt, exchange.reply)
        except Exception as error:
            return Verdict(None, None, f"the judge failed: {type(error).__name__}: {error}")
        if isinstance(value, Verdict):
            if not isinstance(value.success, (bool, NoneType)) or (value.score is not None and not math.isfinite(value.score)):
                return Verdict(None, None, f"the judge returned {value!r}, whose success is no bool or None, or whose score is not finite")
            return value if value.success is not None or value.explanation else replace(value, explanation=_UNDECIDED)
        if value is None:
            return Verdict(None, None, _UNDECIDED)
        if isinstance(value, bool):
            return Verdict(value)
        if isinstance(value, (int, float)) and math.isfinite(value):
            return Verdict(value >= self._threshold, float(value))
        return Verdict(None, None, f"the judge returned {value!r}, which is no bool, None, finite number or Verdict")
