"""What each model would say next after the same beginning, and how far apart the models are in that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy
from torch import Tensor

from lox_merge.diagnostics.behaviour.measures import Between, Candidate
from lox_merge.diagnostics.behaviour.texts import Prefix

# Where aligned and base are closer than this (0.01 nats of divergence), what lies between them means nothing.
LEAST_DISTANCE = 0.1


@dataclass(frozen=True)
class NextTokens:
    """After one prefix. candidates: the union of the models' most probable tokens, the most probable first. entropies: nats.

    distances: by pairs in the order of the models; square root of the Jensen–Shannon divergence in nats, 0 to √ln 2 = 0.833.
    """

    prefix: Prefix
    tokens: int
    candidates: tuple[Candidate, ...]
    entropies: Mapping[str, float]
    distances: tuple[tuple[float, ...], ...]
    between: Mapping[str, Between]


def next_tokens(prefix: Prefix, tokens: int, found: Mapping[str, Tensor], tokenizer: Any, *, top: int) -> NextTokens:
    """found: (vocabulary,) float32 log-probabilities by model: base, aligned, then the others. tokens: length of the prefix."""
    distributions = {label: _distribution(values) for label, values in found.items()}
    labels = list(distributions)
    chosen = {int(token) for values in distributions.values() for token in numpy.argsort(-values, kind="stable")[:top]}
    # Float32 scores decide no more digits.
    likely = {token: {label: float(f"{values[token]:.7g}") for label, values in distributions.items()} for token in chosen}
    ordered = sorted(chosen, key=lambda token: (-max(likely[token].values()), token))
    distances = tuple(tuple(_distance(distributions[one], distributions[other]) for other in labels) for one in labels)
    base, aligned = 0, 1
    return NextTokens(
        prefix,
        tokens,
        tuple(Candidate(token, _text(tokenizer, token), likely[token]) for token in ordered),
        {label: float(entropy(values)) for label, values in distributions.items()},
        distances,
        {label: _between(row[aligned], row[base], distances[aligned][base]) for label, row in list(zip(labels, distances, strict=True))[2:]},
    )


def _distribution(log_probabilities: Tensor) -> Any:
    values = log_probabilities.double().exp()
    return (values / values.sum()).numpy()


def _distance(one: Any, other: Any) -> float:
    # Rounding of equal distributions can leave 1e-9, or the root of a negative number.
    return 0.0 if bool((one == other).all()) else float(numpy.nan_to_num(jensenshannon(one, other)))


def _between(to_aligned: float, to_base: float, whole: float) -> Between:
    both = to_aligned + to_base
    clear = whole >= LEAST_DISTANCE
    return Between(to_aligned, to_base, to_aligned / both if clear else None, both / whole if clear else None)


def _text(tokenizer: Any, token: int) -> str:
    """As the vocabulary names it where decoding shows nothing: a special token, or part of a character."""
    shown = tokenizer.decode([token])
    if shown.strip() and "\N{REPLACEMENT CHARACTER}" not in shown:
        return str(shown)
    return str(tokenizer.convert_ids_to_tokens(token) or f"token {token}")
