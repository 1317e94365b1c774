"""Bootstrap intervals of means over prompts, by scipy; what one prompt cannot tell is None."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy
from scipy.stats import DegenerateDataWarning, bootstrap

Interval = tuple[float, float]
RESAMPLES = 9999


def bootstrap_interval(
    values: Sequence[float],
    *others: Sequence[float],
    statistic: Callable[..., Any] | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval | None:
    """Two-sided percentile interval (Efron & Tibshirani 1993, ch. 13) of a statistic of `values`, resampled over their items.

    values, others: (n,) each; others are resampled with the same items, for a ratio of means and the like. statistic: of arrays
    (…, n) with `axis`, default the mean. None below two items, which have no spread, and where a resample leaves the statistic
    undefined (NaN). Seeded: the same values give the same interval.
    """
    if len(values) < 2:
        return None
    data = tuple(numpy.asarray(sample, dtype=numpy.float64) for sample in (values, *others))
    if statistic is None and not others and bool((data[0] == data[0][0]).all()):
        return float(data[0][0]), float(data[0][0])  # scipy warns of such data and gives rounded ends
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            data,
            statistic or numpy.mean,
            paired=True,
            vectorized=True,
            confidence_level=confidence,
            n_resamples=resamples,
            method="percentile",
            rng=numpy.random.default_rng(seed),
            # Indices of all resamples at once take 8 bytes each: n = 10,000 would need 800 MB.
            batch=max(1, 2**22 // len(values)),
        ).confidence_interval
    low, high = float(found.low), float(found.high)
    return None if numpy.isnan([low, high]).any() else (low, high)
