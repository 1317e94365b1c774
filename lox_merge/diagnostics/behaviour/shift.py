"""How far a model's expectations are from the base model's, by the place in the response: is the difference a few tokens deep?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from lox_merge.diagnostics.behaviour.measures import Position, Share, Shift
from lox_merge.diagnostics.behaviour.passes import Scores, Vector
from lox_merge.safety.bootstrap import bootstrap_interval

FIRST = (1, 3, 5)
# Intervals are for the first tokens, where the question is; later ones have fewer and fewer texts.
_WITH_INTERVAL = 20
# Resamples at a time: each takes 8 bytes a token of the longest text.
_DRAWS = 500

Table = numpy.ndarray[tuple[int, int], numpy.dtype[numpy.float64]]


def shift(scores: Sequence[Scores], *, seed: int) -> Shift:
    """δ_t of Qi et al. 2024 (arXiv 2406.05946): KL(model ‖ base) at every token of given responses, mean over texts at each t.

    Intervals: 95 %, bootstrap over texts; None for one text.
    """
    divergences = _table([_given(found.divergence) for found in scores])
    entropies = _table([found.entropy for found in scores])
    present = ~numpy.isnan(divergences)
    counts, means = present.sum(0), numpy.nanmean(divergences, 0)
    positions = tuple(
        Position(
            t + 1,
            int(counts[t]),
            float(means[t]),
            bootstrap_interval(divergences[present[:, t], t], seed=seed) if t < _WITH_INTERVAL else None,
            float(numpy.nanmean(entropies[:, t])),
        )
        for t in range(divergences.shape[1])
    )
    common = means[: int((2 * counts >= len(scores)).sum())]
    return Shift(
        positions,
        tuple(_share(divergences, first, seed) for first in FIRST),
        float(means.sum()),
        float(divergences[present].mean()),
        int(common.argmax()) + 1 if common.any() else None,
    )


def _share(divergences: Table, first: int, seed: int) -> Share:
    present = ~numpy.isnan(divergences)
    filled = numpy.where(present, divergences, 0.0)
    lengths, totals = present.sum(1), filled.sum(1)

    def of_means(rows: Any, axis: int = -1) -> Any:
        """rows: (n,) or (draws, n) numbers of texts, drawn with repetition. A place that none of them has adds nothing."""
        if numpy.ndim(rows) > 1 and len(rows) > _DRAWS:
            return numpy.concatenate([of_means(rows[start : start + _DRAWS]) for start in range(0, len(rows), _DRAWS)])
        drawn = _counts(numpy.asarray(rows, dtype=int), len(filled))
        means = (drawn @ filled) / numpy.maximum(drawn @ present, 1.0)
        with numpy.errstate(invalid="ignore"):
            return means[..., :first].sum(-1) / means.sum(-1)

    everything = numpy.arange(len(filled))
    known = totals > 0
    own = filled[known, :first].sum(1) / totals[known]
    some = bool(known.any())
    return Share(
        first,
        float(of_means(everything)) if some else None,
        bootstrap_interval(list(everything), statistic=of_means, seed=seed) if some else None,
        min(first, divergences.shape[1]) / divergences.shape[1],
        float(own.mean()) if some else None,
        bootstrap_interval(own, seed=seed) if some else None,
        float((numpy.minimum(first, lengths) / lengths).mean()),
    )


def _counts(rows: numpy.ndarray[Any, numpy.dtype[numpy.int64]], n: int) -> Any:
    """(…, n): how often each number from 0 to n − 1 is among the last axis of `rows`."""
    draws = rows.reshape(-1, rows.shape[-1])
    places = draws + n * numpy.arange(len(draws))[:, None]
    return numpy.bincount(places.ravel(), minlength=n * len(draws)).reshape(*rows.shape[:-1], n).astype(float)


def _table(rows: Sequence[Vector]) -> Table:
    """(texts, longest), NaN after the end of each."""
    table = numpy.full((len(rows), max(map(len, rows))), numpy.nan)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


def _given(divergence: Vector | None) -> Vector:
    if divergence is None:
        raise ValueError("the base model has no divergence from itself")
    return divergence
