"""What a comparison of two framings gives: cosines per pair and their means, beside what chance gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lox_merge.diagnostics.matrix_results import Interval


@dataclass(frozen=True)
class PairCosines:
    """One completion under both framings. rows: in each file, from 1. tokens: that are compared; excluded: that differ, and are not.

    loss, centred, shuffled: `maths.loss_vectors.LossCosines`. mean_losses: nats a token under each framing. gradient: of the two
    gradients of the mean loss. None where a vector is zero.
    """

    rows: tuple[int, int]
    tokens: int
    excluded: int
    mean_losses: tuple[float, float]
    loss: float | None
    centred: float | None
    shuffled: float | None
    gradient: float | None


@dataclass(frozen=True)
class Mean:
    """Mean of a cosine over the pairs that define it, with its percentile bootstrap 95 % interval over pairs (None for one pair)."""

    mean: float | None
    interval: Interval | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float | None], seed: int) -> Mean:
        from lox_merge.safety.bootstrap import bootstrap_interval

        known = [value for value in values if value is not None]
        return cls(sum(known) / len(known) if known else None, bootstrap_interval(known, seed=seed), len(known))


@dataclass(frozen=True)
class ModelCosines:
    """One model. loss … gradient: means over pairs of the figures of `PairCosines`.

    mean_gradient: cosine of the two data sets' mean gradients. same_framing: per-pair cosines of gradients of different completions
    under one framing, both framings together; other_completion: of a completion's gradient with the other framing's of the
    next, different one. other_loss, other_centred: cosines of the losses with those of the next, different completion under the
    other framing, both cut to the shorter one: what first and last tokens of completions have in common.
    entries: of the weights, n; band: ±1.96/√n, which holds 95 % of the cosines of independent random directions.
    """

    model: str
    loss: Mean
    centred: Mean
    shuffled: Mean
    other_loss: Mean
    other_centred: Mean
    gradient: Mean
    mean_gradient: float | None
    same_framing: Mean
    other_completion: Mean
    weights: tuple[str, ...]
    entries: int
    band: float
    pairs: tuple[PairCosines, ...] = field(repr=False)


@dataclass(frozen=True)
class Framing:
    """Two data sets that share their completions, seen by every model. identity: of data and models, settings, versions."""

    models: tuple[ModelCosines, ...]
    identity: dict[str, Any]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; undefined ones are null."""
        return {**self.identity, "models": [asdict(model) for model in self.models], "notes": list(self.notes)}
