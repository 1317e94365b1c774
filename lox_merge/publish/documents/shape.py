"""What all documents share: how they are checked, and the words that several of them use."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lox_merge.diagnostics.matrix_results import Interval
from lox_merge.diagnostics.results import source_title
from lox_merge.errors import RequestError

__all__ = ["AttackRate", "Interval", "PairedChange", "Prompts", "Shape", "judge_title", "judge_words", "read_as", "source_title"]


class Shape(BaseModel):
    """A part of a document. Fields that are not named here are left alone: a newer version may write more."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


class AttackRate(Shape):
    """ASR = successes / judged of one model and judge, with its Wilson 95 % interval; None where nothing was judged."""

    n: int
    judged: int
    successes: int
    undecided: int
    rate: float | None
    interval: Interval | None
    mean_score: float | None = None


class PairedChange(Shape):
    """The second model's ASR minus the first one's on the same prompts, Tango 95 % interval, exact McNemar p-value."""

    first: str
    second: str
    judge: str
    n: int
    only_first: int
    only_second: int
    difference: float | None
    interval: Interval | None
    p_value: float | None


class Prompts(Shape):
    """Which prompts were asked."""

    source: str
    sha256: str
    n: int

    @property
    def words(self) -> str:
        return f"{self.n} prompt{'' if self.n == 1 else 's'} of {self.source} (sha256 {self.sha256[:12]})"


_Document = TypeVar("_Document")


@cache
def _adapter(shape: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def read_as(shape: type[_Document], document: Mapping[str, Any], name: str) -> _Document:
    """`document` as `shape`, a Shape or a dataclass. Raises RequestError that names `name` and the first fields missing or of another kind."""
    adapter: TypeAdapter[_Document] = _adapter(shape)  # type: ignore[arg-type]  # a class can be hashed
    try:
        return adapter.validate_python(document)
    except ValidationError as error:
        found = [_words(problem) for problem in error.errors()]
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise RequestError(
            f"{name} does not hold what this version writes ({'; '.join(found[:3])}{more}). Run the command again with this version of lox-merge."
        ) from error


def _words(problem: Any) -> str:
    """Where and what, as in 'curve.1.attack.rate: missing'."""
    if problem["type"] == "value_error":  # one of our own checks, which says where
        return str(problem["ctx"]["error"])
    return f"{'.'.join(map(str, problem['loc']))}: {'missing' if problem['type'] == 'missing' else problem['msg']}"


def judge_words(name: str, identity: Mapping[str, Any]) -> str:
    """A judge's name with the label that its identity carries ('smoke test')."""
    return f"{name} ({identity['label']})" if identity.get("kind") == "keyword" and identity.get("label") else name


def judge_title(identity: Mapping[str, Any]) -> str:
    """How a judge was named on the command line, as far as its identity tells."""
    return str(identity.get("function") or identity.get("model") or identity.get("rule") or identity.get("kind") or "unnamed")
