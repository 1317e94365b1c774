"""The result of `behaviour`, and its JSON: numbers only, no text of the sets, no path of this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lox_merge._version import __version__
from lox_merge.diagnostics.behaviour.measures import Likelihood, Reversion, Shift, TextReversion
from lox_merge.diagnostics.behaviour.next_tokens import NextTokens
from lox_merge.diagnostics.behaviour.passes import Scores
from lox_merge.safety.conversations import Conversations

BASE, ALIGNED = "base", "aligned"
# Scores are float32: later digits are noise, and cost half of the file.
_DIGITS = 7


@dataclass(frozen=True)
class SetBehaviour:
    """One set of texts. scores: by model, one a text. shifts: from base, of every model but base. reversions: of every model beyond aligned, and
    text_reversions of each text.
    """

    data: Conversations
    scores: Mapping[str, tuple[Scores, ...]] = field(repr=False)
    shifts: Mapping[str, Shift]
    likelihoods: Mapping[str, Likelihood]
    reversions: Mapping[str, Reversion]
    text_reversions: Mapping[str, tuple[TextReversion, ...]] = field(repr=False)

    @property
    def tokens(self) -> list[int]:
        """Scored tokens of each text."""
        return [len(found.log_probabilities) for found in self.scores[BASE]]

    def joint(self, model: str) -> list[float]:
        """log p of each text under a model, nats."""
        return [float(found.log_probabilities.sum()) for found in self.scores[model]]

    def to_json(self) -> dict[str, Any]:
        return {
            **self.data.identity(),
            "plain": self.data.conversations[0][0]["role"] == "text",
            "tokens": sum(self.tokens),
            "kl_from_base": {label: asdict(found) for label, found in self.shifts.items()},
            "log_probabilities": {label: asdict(found) for label, found in self.likelihoods.items()},
            "reversion": {label: asdict(found) for label, found in self.reversions.items()},
            "texts": [self._text_json(number) for number in range(len(self.tokens))],
        }

    def _text_json(self, number: int) -> dict[str, Any]:
        models = {}
        for label, scores in self.scores.items():
            found = scores[number]
            models[label] = {
                "joint": float(found.log_probabilities.sum()),
                "per_token": float(found.log_probabilities.mean()),
                "tokens": _rounded(found.log_probabilities),
                "entropy": _rounded(found.entropy),
                "kl_from_base": None if found.divergence is None else _rounded(found.divergence),
            }
        return {
            "row": number + 1,
            "tokens": self.tokens[number],
            "models": models,
            "reversion": {label: asdict(found[number]) for label, found in self.text_reversions.items()},
        }


@dataclass(frozen=True)
class Behaviour:
    """The result of `behaviour`. models: labels, base and aligned first. sources: identities. settings: all that decides the numbers.

    notes: what was done in another way than asked, or limits what the numbers say.
    """

    models: tuple[str, ...]
    sources: Mapping[str, Any]
    settings: Mapping[str, Any]
    sets: tuple[SetBehaviour, ...]
    next_tokens: tuple[NextTokens, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is undefined is null. Log-probabilities, entropies and KL in nats."""
        return {
            "lox_merge": __version__,
            "models": list(self.models),
            "sources": dict(self.sources),
            "settings": dict(self.settings),
            "sets": [found.to_json() for found in self.sets],
            "next_tokens": [asdict(found) for found in self.next_tokens],
            "notes": list(self.notes),
        }


def _rounded(values: Sequence[float] | Any) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]
