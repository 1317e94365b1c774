"""Figures over many matrices: the authors' unweighted mean, and all energies together; each with what a random subspace gives.

R_ft/R_align of a group is the quotient of the group's two figures, over the matrices that define both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lox_merge.diagnostics.records import quotient
from lox_merge.diagnostics.results import Statistic
from lox_merge.maths.random_subspace import band, band_of_draws


@dataclass(frozen=True)
class Term:
    """One matrix's part in a statistic: energy `kept` of `total`, and what random subspaces keep of it (share, variance; draws)."""

    kept: float
    total: float
    expected: float
    variance: float = 0.0
    drawn: Tensor | None = None


def shares(terms: Sequence[Term], undecided: int = 0) -> Statistic:
    """Shares of energy kept/total. Bands: a Beta law of the mean's own mean and variance, matrices being drawn independently."""
    if not terms:
        return Statistic(None, None, None, None, None, None, 0, undecided)
    count, total = len(terms), math.fsum(term.total for term in terms)
    expected = math.fsum(term.expected for term in terms) / count
    expected_energy = math.fsum(term.expected * term.total for term in terms) / total
    return Statistic(
        mean=math.fsum(min(1.0, term.kept / term.total) for term in terms) / count,
        energy=min(1.0, math.fsum(term.kept for term in terms) / total),
        expected=expected,
        band=band(expected, math.fsum(term.variance for term in terms) / count**2),
        expected_energy=expected_energy,
        band_energy=band(expected_energy, math.fsum(term.variance * (term.total / total) ** 2 for term in terms)),
        matrices=count,
        undecided=undecided,
    )


def roots(terms: Sequence[Term], undecided: int = 0) -> Statistic:
    """R = √(kept/total). The expectation is √(k/d) as in closed form; bands are of seeded draws."""
    if not terms:
        return Statistic(None, None, None, None, None, None, 0, undecided)
    total = math.fsum(term.total for term in terms)
    return Statistic(
        mean=_mean_root([term.kept / term.total for term in terms]),
        energy=math.sqrt(min(1.0, math.fsum(term.kept for term in terms) / total)),
        expected=math.fsum(math.sqrt(term.expected) for term in terms) / len(terms),
        band=band_of_draws(_drawn_means(terms))[1],
        expected_energy=math.sqrt(math.fsum(term.expected * term.total for term in terms) / total),
        band_energy=band_of_draws(_drawn_energies(terms))[1],
        matrices=len(terms),
        undecided=undecided,
    )


def ratios(before: Sequence[Term], after: Sequence[Term], undecided: int = 0) -> Statistic:
    """The roots of `after` over those of `before`, matrix by matrix the same. Expectation and band from the same draws for both."""
    if not before:
        return Statistic(None, None, None, None, None, None, 0, undecided)
    first, second = roots(before), roots(after)
    means = [b / a for a, b in zip(_drawn_means(before), _drawn_means(after), strict=True)]
    energies = [b / a for a, b in zip(_drawn_energies(before), _drawn_energies(after), strict=True)]
    (expected, limits), (expected_energy, limits_energy) = band_of_draws(means), band_of_draws(energies)
    return Statistic(
        quotient(second.mean, first.mean),
        quotient(second.energy, first.energy),
        expected,
        limits,
        expected_energy,
        limits_energy,
        len(before),
        undecided,
    )


def _mean_root(values: Iterable[float]) -> float:
    found = [math.sqrt(min(1.0, value)) for value in values]
    return math.fsum(found) / len(found)


def _drawn(terms: Sequence[Term]) -> Tensor:
    """(matrices, draws) energies."""
    return torch.stack([term.drawn for term in terms if term.drawn is not None])


def _totals(terms: Sequence[Term]) -> Tensor:
    return torch.tensor([term.total for term in terms], dtype=torch.float64)


def _drawn_means(terms: Sequence[Term]) -> list[float]:
    values: list[float] = (_drawn(terms) / _totals(terms)[:, None]).sqrt().mean(0).tolist()
    return values


def _drawn_energies(terms: Sequence[Term]) -> list[float]:
    values: list[float] = (_drawn(terms).sum(0) / _totals(terms).sum()).sqrt().tolist()
    return values
