"""The figures of `behaviour`, as its JSON holds them and pages read them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lox_merge.diagnostics.matrix_results import Interval


@dataclass(frozen=True)
class Position:
    """The t-th token of the response, t from 1. kl: mean of δ_t over the n texts that have one. entropy: of the model there, mean. Nats."""

    t: int
    n: int
    kl: float
    interval: Interval | None
    entropy: float


@dataclass(frozen=True)
class Share:
    """Which part of the KL budget lies in the first `first` tokens; None where there is no KL at all.

    share: Σ_{t ≤ first} δ̄_t / Σ_t δ̄_t of the means over texts. even: what it would be, were δ̄_t the same everywhere.
    per_text: mean of the same share of every text on its own. per_text_even: its expectation, mean of min(first, T)/T.
    """

    first: int
    share: float | None
    interval: Interval | None
    even: float
    per_text: float | None
    per_text_interval: Interval | None
    per_text_even: float


@dataclass(frozen=True)
class Shift:
    """KL(model ‖ base) on one set. budget: Σ_t δ̄_t, nats. per_token: mean over all tokens.

    largest: the t of the largest δ̄_t among those that at least half of the texts have.
    """

    positions: tuple[Position, ...]
    shares: tuple[Share, ...]
    budget: float
    per_token: float
    largest: int | None


@dataclass(frozen=True)
class Likelihood:
    """log p of all texts of a set under one model, nats. joint: mean over texts of the sum over tokens. per_token: over all tokens."""

    joint: float
    interval: Interval | None
    per_token: float


@dataclass(frozen=True)
class TextReversion:
    """One text. interval: 95 %, over its tokens, as if each stood for itself.

    None for one token, and where resamples leave open whether aligned or base finds the text more probable.
    """

    index: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Reversion:
    """A set. index: ratio of the sums over texts; median: of the texts' own. Intervals: 95 %, bootstrap over texts.

    n: texts with an index of their own; undefined: those without. outside: how many lie below 0 or above 1.
    moved: mean of log p_aligned − log p_model, and gap: of log p_aligned − log p_base, nats a text. A model that only changed its
    style moves too: compare `moved` on harmless texts.
    identical: every token has exactly the log-probability it has under aligned.
    """

    moved: float
    moved_interval: Interval | None
    gap: float
    index: float | None
    interval: Interval | None
    median: float | None
    median_interval: Interval | None
    n: int
    undefined: int
    outside: int
    identical: bool


@dataclass(frozen=True)
class Candidate:
    """One token: its number, its text, and its probability under every model."""

    token: int
    text: str
    probabilities: Mapping[str, float]


@dataclass(frozen=True)
class Between:
    """Jensen–Shannon distances of a model to aligned and to base. index: the first over their sum, 0 as aligned, 1 as base.

    detour: their sum over the distance of aligned and base; 1 on the straight way between the two (the distance is a metric), more for
    a model that went elsewhere, whose index then says little. None where aligned and base are closer than 0.1.
    """

    to_aligned: float
    to_base: float
    index: float | None
    detour: float | None
