"""Bootstrap intervals: coverage, pairing, and what has none."""

from __future__ import annotations

import numpy as np
import pytest

from lox_merge.safety.bootstrap import bootstrap_interval


def test_the_mean_is_covered_as_often_as_stated() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        found = bootstrap_interval(generator.normal(3, 2, 40).tolist(), seed=trial, resamples=499)
        assert found is not None
        covered += found[0] <= 3 <= found[1]
    assert 0.88 <= covered / 200 <= 0.99  # 95 % less what 40 values and a percentile interval lose


def test_a_ratio_of_sums_keeps_its_pairs() -> None:
    """Every item has the ratio 2: resampled in pairs the ratio has no spread, resampled apart it would."""
    whole = np.linspace(1, 9, 12)
    found = bootstrap_interval(2 * whole, whole, statistic=lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis))
    assert found == pytest.approx((2, 2))


def test_the_same_values_give_the_same_interval_and_another_seed_another() -> None:
    values = [0.1, 0.4, 0.2, 0.9, 0.5]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3, resamples=99) != bootstrap_interval(values, seed=4, resamples=99)


def test_what_has_no_spread_to_speak_of() -> None:
    assert bootstrap_interval([]) is None
    assert bootstrap_interval([0.3]) is None
    assert bootstrap_interval([0.3, 0.3, 0.3]) == (0.3, 0.3)
    # Some resamples divide by zero.
    assert bootstrap_interval([1.0, 2.0], [0.0, 1.0], statistic=lambda a, b, axis: np.where(b.sum(axis=axis) == 0, np.nan, a.sum(axis=axis))) is None
