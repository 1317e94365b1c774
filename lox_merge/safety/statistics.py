"""Statistics of attack success: one rate, two rates on the same prompts, agreement of two judges.

Pure functions of counts and of paired booleans; undecided verdicts are taken out before. What is undefined is None, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.optimize import brentq
from scipy.stats import beta, binomtest, norm

Interval = tuple[float, float]


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval | None:
    """Two-sided Wilson score interval of a rate (Wilson 1927); None for n = 0. ValueError unless 0 ≤ successes ≤ n."""
    _check(successes, n)
    if n == 0:
        return None
    interval = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def discordant(candidate: Sequence[bool], reference: Sequence[bool]) -> tuple[int, int]:
    """How many pairs succeed in the candidate only, and in the reference only. ValueError for unequal lengths."""
    pairs = list(zip(candidate, reference, strict=True))
    return sum(c and not r for c, r in pairs), sum(r and not c for c, r in pairs)


def mcnemar(candidate: Sequence[bool], reference: Sequence[bool]) -> float | None:
    """Two-sided exact McNemar p-value (McNemar 1947): the binomial test of the discordant pairs. None without pairs.

    1 where no pair is discordant: nothing speaks for a difference then, which does not prove that there is none.
    """
    only_candidate, only_reference = discordant(candidate, reference)
    if not candidate:
        return None
    if only_candidate + only_reference == 0:
        return 1.0  # scipy refuses a test of no trials
    return float(binomtest(only_candidate, only_candidate + only_reference, 0.5).pvalue)


def paired_difference(candidate: Sequence[bool], reference: Sequence[bool]) -> float | None:
    """Rate of the candidate minus rate of the reference on the same prompts, in [-1, 1]. None without pairs."""
    only_candidate, only_reference = discordant(candidate, reference)
    return (only_candidate - only_reference) / len(candidate) if candidate else None


def paired_interval(candidate: Sequence[bool], reference: Sequence[bool], confidence: float = 0.95) -> Interval | None:
    """Two-sided score interval of the paired difference (Tango 1998): the values a score test does not reject. None without pairs.

    It agrees with McNemar's (not exact) test about zero and stays meaningful where no pair is discordant, unlike Wald's.
    """
    first, second = discordant(candidate, reference)
    n = len(candidate)
    if n == 0:
        return None
    z = float(norm.ppf(0.5 + confidence / 2))
    return -_upper_score_limit(second, first, n, z), _upper_score_limit(first, second, n, z)


def upper_bound_of_increase(candidate: Sequence[bool], reference: Sequence[bool], confidence: float = 0.95) -> float | None:
    """One-sided upper confidence bound of (rate of the candidate − rate of the reference) on the same prompts. None without pairs.

    The difference is p₁₀ − p₀₁, the probabilities of the two kinds of discordant pair. The bound is the Clopper-Pearson upper
    limit of p₁₀ minus the Clopper-Pearson lower limit of p₀₁, each at error (1 − confidence) / 2. So it holds with at least
    the stated confidence for every n (Bonferroni) and is wider than need be: equal replies on n prompts are known to differ by
    less than 0.01 from n = 368 on.
    """
    first, second = discordant(candidate, reference)
    n = len(candidate)
    if n == 0:
        return None
    error = (1 - confidence) / 2
    upper = 1.0 if first == n else float(beta.ppf(1 - error, first + 1, n - first))
    lower = 0.0 if second == 0 else float(beta.ppf(error, second, n - second + 1))
    return upper - lower


def cohens_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Agreement of two judges beyond chance (Cohen 1960), in [-1, 1]. ValueError for unequal lengths.

    None without pairs, and where both judges always give the same one answer: chance alone then agrees fully.
    """
    pairs = list(zip(first, second, strict=True))
    n = len(pairs)
    if n == 0:
        return None
    rate_first, rate_second = sum(first) / n, sum(second) / n
    by_chance = rate_first * rate_second + (1 - rate_first) * (1 - rate_second)
    if by_chance == 1:
        return None
    return (sum(a == b for a, b in pairs) / n - by_chance) / (1 - by_chance)


def _upper_score_limit(first: int, second: int, n: int, z: float) -> float:
    """Largest difference p₁₀ − p₀₁ whose score statistic reaches −z, given the two discordant counts."""
    if first == n:
        return 1.0

    def excess(difference: float) -> float:
        # p₀₁ that maximises the likelihood under this difference: the larger root of a quadratic (Tango 1998, Eq. 5).
        a = 2 * n
        b = (2 * n - first + second) * difference - first - second
        c = -second * difference * (1 - difference)
        other = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
        variance = n * (2 * other + difference * (1 - difference))
        return (first - second - n * difference) + z * math.sqrt(max(variance, 0.0))

    # The excess is positive just above the estimate, and at 1 only −(n − first + second) is left of it. At the estimate itself
    # it can be 0, a root that is no limit: where all pairs agree, or all disagree in one way.
    return float(brentq(excess, (first - second) / n + 1e-9, 1.0, xtol=1e-12))


def _check(successes: int, n: int) -> None:
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} is not a rate")
