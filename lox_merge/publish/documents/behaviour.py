"""What `lox-merge behaviour --json` writes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import Field, model_validator

from lox_merge.diagnostics.behaviour.measures import Between, Candidate, Likelihood, Reversion, Shift, TextReversion
from lox_merge.publish.documents.shape import Shape

BASE, ALIGNED = "base", "aligned"

# Its name for messages, the models it should speak of, and what it holds by model.
_Part = tuple[str, Iterable[str], Mapping[str, Any]]


class Joint(Shape):
    """One text under one model. joint: log-probability of all its scored tokens, nats."""

    joint: float
    per_token: float


class Text(Shape):
    """One text, by its row in the file."""

    row: int
    tokens: int
    models: dict[str, Joint]
    reversion: dict[str, TextReversion]


class TextSet(Shape):
    """One file of texts."""

    name: str
    source: str
    sha256: str
    examples: int
    tokens: int
    kl_from_base: dict[str, Shift]
    log_probabilities: dict[str, Likelihood]
    reversion: dict[str, Reversion]
    texts: tuple[Text, ...] = Field(min_length=1)


class Prefix(Shape):
    """What the models were to go on from."""

    prompt: str
    prefill: str | None

    @property
    def words(self) -> str:
        return f"{self.prompt} … {self.prefill}" if self.prefill else self.prompt


class NextTokens(Shape):
    """After one prefix. distances: in the order of the models."""

    prefix: Prefix
    candidates: tuple[Candidate, ...] = Field(min_length=1)
    entropies: dict[str, float]
    distances: tuple[tuple[float, ...], ...]
    between: dict[str, Between]


class Behaviour(Shape):
    """A comparison of expectations. models: base and aligned first."""

    models: tuple[str, ...] = Field(min_length=2)
    sources: dict[str, dict[str, Any]]
    settings: dict[str, Any]
    sets: tuple[TextSet, ...]
    next_tokens: tuple[NextTokens, ...]
    notes: tuple[str, ...]

    @model_validator(mode="after")
    def _every_model_everywhere(self) -> Behaviour:
        for found in self.sets:
            if empty := [label for label, shift in found.kl_from_base.items() if not shift.positions]:
                raise ValueError(f"sets.{found.name}: kl_from_base of {empty[0]} has no positions")
            parts: list[_Part] = [
                ("log_probabilities", self.models, found.log_probabilities),
                ("kl_from_base", self.models[1:], found.kl_from_base),
                ("reversion", self.others, found.reversion),
                *((f"texts of row {text.row}", self.models, text.models) for text in found.texts),
            ]
            _check_models(f"sets.{found.name}", parts)
        for number, after in enumerate(self.next_tokens):
            own: list[_Part] = [("between", self.others, after.between), ("entropies", self.models, after.entropies)]
            own += [("candidates", self.models, one.probabilities) for one in after.candidates]
            _check_models(f"next_tokens.{number}", own)
        return self

    @property
    def others(self) -> tuple[str, ...]:
        """The models beyond base and aligned."""
        return self.models[2:]


def _check_models(where: str, parts: Iterable[_Part]) -> None:
    """Raises ValueError where a part does not speak of just the models it should."""
    for part, expected, found in parts:
        if different := sorted(set(expected) ^ found.keys()):
            raise ValueError(f"{where}: {part} of {', '.join(different)} missing or not expected")
