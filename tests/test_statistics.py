"""Statistics of attack success against statsmodels, scipy and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import multinomial, norm
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.inter_rater import cohens_kappa as reference_kappa
from statsmodels.stats.proportion import proportion_confint

from lox_merge.safety import statistics


def paired(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Candidate and reference with these counts of the four kinds of pair."""
    pairs = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
    return [c for c, _ in pairs], [r for _, r in pairs]


TABLES = [(43, 0, 1, 0), (10, 7, 2, 30), (0, 0, 0, 5), (0, 5, 0, 0), (0, 0, 6, 0), (1, 0, 0, 0), (50, 1, 0, 49), (3, 9, 9, 3), (0, 1, 0, 0)]


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (0, 100), (7, 100), (50, 100), (100, 100), (3, 520)])
def test_wilson_is_that_of_statsmodels(successes: int, n: int) -> None:
    interval = statistics.wilson(successes, n)
    assert interval == pytest.approx(proportion_confint(successes, n, method="wilson"), abs=1e-9)
    assert statistics.wilson(successes, n, confidence=0.8) == pytest.approx(proportion_confint(successes, n, alpha=0.2, method="wilson"), abs=1e-9)


def test_impossible_counts_are_refused() -> None:
    for successes, n in ((2, 1), (-1, 3)):
        with pytest.raises(ValueError, match="not a rate"):
            statistics.wilson(successes, n)


@pytest.mark.parametrize("table", TABLES)
def test_mcnemar_is_that_of_statsmodels(table: tuple[int, int, int, int]) -> None:
    both, first, second, neither = table
    expected = reference_mcnemar([[both, first], [second, neither]], exact=True).pvalue
    assert statistics.mcnemar(*paired(*table)) == pytest.approx(expected, abs=1e-12)


def score_statistic(first: int, second: int, n: int, difference: float) -> float:
    """Score test of a paired difference with the nuisance parameter maximised numerically instead of in closed form."""

    def negative_likelihood(other: float) -> float:
        cells = (other + difference, other, 1 - 2 * other - difference)
        counts = (first, second, n - first - second)
        return -sum(count * math.log(max(cell, 1e-300)) for count, cell in zip(counts, cells, strict=True) if count)

    low, high = max(0.0, -difference), (1 - difference) / 2
    other = minimize_scalar(negative_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
    return float((first - second - n * difference) / math.sqrt(n * (2 * other + difference - difference**2)))


@pytest.mark.parametrize("table", TABLES)
def test_limits_of_the_paired_interval_are_where_the_score_test_rejects(table: tuple[int, int, int, int]) -> None:
    candidate, reference = paired(*table)
    _, first, second, _ = table
    n, z = len(candidate), float(norm.ppf(0.975))
    interval = statistics.paired_interval(candidate, reference)
    assert interval is not None
    low, high = interval
    assert -1 <= low <= (first - second) / n <= high <= 1 and low < high
    if high < 1:
        assert score_statistic(first, second, n, high) == pytest.approx(-z, abs=2e-3)
    if low > -1:
        assert score_statistic(first, second, n, low) == pytest.approx(z, abs=2e-3)
    assert statistics.paired_interval(reference, candidate) == pytest.approx((-high, -low))


def test_paired_interval_without_discordant_pairs_is_known_in_closed_form() -> None:
    z2 = float(norm.ppf(0.975)) ** 2
    assert statistics.paired_interval(*paired(20, 0, 0, 80)) == pytest.approx((-z2 / (100 + z2), z2 / (100 + z2)), abs=1e-6)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_upper_bound_is_made_of_clopper_pearson_limits(table: tuple[int, int, int, int], confidence: float) -> None:
    candidate, reference = paired(*table)
    _, first, second, _ = table
    n = len(candidate)
    upper = proportion_confint(first, n, alpha=1 - confidence, method="beta")[1]
    lower = proportion_confint(second, n, alpha=1 - confidence, method="beta")[0]
    assert statistics.upper_bound_of_increase(candidate, reference, confidence) == pytest.approx(upper - lower, abs=1e-9)


def test_upper_bound_holds_as_often_as_it_promises() -> None:
    """Every outcome of 12 pairs, weighed by its probability, under several truths."""
    n = 12
    bounds = {}
    for first in range(n + 1):
        for second in range(n + 1 - first):
            bounds[first, second] = statistics.upper_bound_of_increase(*paired(0, first, second, n - first - second), 0.9)
    for p_first, p_second in itertools.product((0.02, 0.1, 0.3, 0.45), repeat=2):
        law = multinomial(n, [p_first, p_second, 1 - p_first - p_second])
        covered = sum(law.pmf([f, s, n - f - s]) for (f, s), bound in bounds.items() if bound is not None and bound >= p_first - p_second)
        assert covered >= 0.9


def test_equal_replies_are_surely_within_one_percent_from_368_prompts_on() -> None:
    for n, sure in ((367, False), (368, True)):
        bound = statistics.upper_bound_of_increase([True] * n, [True] * n)
        assert bound is not None and (bound < 0.01) is sure


def test_paired_difference() -> None:
    assert statistics.paired_difference(*paired(1, 3, 1, 5)) == pytest.approx(0.2)
    assert statistics.discordant(*paired(1, 3, 1, 5)) == (3, 1)


@pytest.mark.parametrize("table", [(10, 7, 2, 30), (3, 9, 9, 3), (5, 0, 0, 5), (0, 5, 5, 0), (0, 0, 3, 4)])
def test_kappa_is_that_of_statsmodels(table: tuple[int, int, int, int]) -> None:
    both, first, second, neither = table
    expected = float(reference_kappa(np.array([[both, first], [second, neither]])).kappa)
    assert statistics.cohens_kappa(*paired(*table)) == pytest.approx(expected, abs=1e-12)


def test_what_is_undefined_is_none() -> None:
    assert statistics.wilson(0, 0) is None
    assert statistics.mcnemar([], []) is None
    assert statistics.paired_difference([], []) is None
    assert statistics.paired_interval([], []) is None
    assert statistics.upper_bound_of_increase([], []) is None
    assert statistics.cohens_kappa([], []) is None
    assert statistics.cohens_kappa([True] * 4, [True] * 4) is None
    assert statistics.cohens_kappa([True] * 4, [False] * 4) == 0


def test_pairs_of_unequal_length_are_refused() -> None:
    for function in (statistics.mcnemar, statistics.paired_difference, statistics.paired_interval, statistics.cohens_kappa):
        with pytest.raises(ValueError, match=r"shorter|longer"):
            function([True, False], [True])
