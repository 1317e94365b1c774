"""What all documents share: how they are checked, and the words that several of them use."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, AllowInfNan, BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from lox_merge.diagnostics.matrix_results import Interval
from lox_merge.diagnostics.results import source_title
from lox_merge.errors import RequestError

__all__ = [
    "AttackRate",
    "Count",
    "Interval",
    "Number",
    "PairedChange",
    "Prompts",
    "Shape",
    "Share",
    "judge_title",
    "judge_words",
    "read_as",
    "source_title",
]


def _in_order(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise PydanticCustomError("interval", f"an interval goes from {ends[0]:g} down to {ends[1]:g}")
    return ends


Count = Annotated[int, Strict(), Field(ge=0)]
Number = Annotated[float, Strict(), AllowInfNan(False)]  # not '0.25'
Share = Annotated[Number, Field(ge=0, le=1)]  # not 25, which is meant in percent


class Shape(BaseModel):
    """A part of a document. Fields that are not named here are left alone: a newer version may write more."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False, protected_namespaces=())


class AttackRate(Shape):
    """ASR = successes / judged of one model and judge, with its Wilson 95 % interval; None where nothing was judged."""

    n: Count
    judged: Count
    successes: Count
    undecided: Count
    rate: Share | None
    interval: Annotated[tuple[Share, Share], AfterValidator(_in_order)] | None
    mean_score: Number | None = None


class PairedChange(Shape):
    """The second model's ASR minus the first one's on the same prompts, Tango 95 % interval, exact McNemar p-value."""

    first: str
    second: str
    judge: str
    n: Count
    only_first: Count
    only_second: Count
    difference: Annotated[Number, Field(ge=-1, le=1)] | None
    interval: Annotated[tuple[Number, Number], AfterValidator(_in_order)] | None
    p_value: Share | None


class Prompts(Shape):
    """Which prompts were asked."""

    source: str
    sha256: str
    n: Count

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
