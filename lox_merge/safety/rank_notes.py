"""What to know when reading an effective rank: whether enough prompts were asked, and what the curve leaves open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lox_merge.safety import statistics
from lox_merge.safety.types import AttackSuccess

if TYPE_CHECKING:
    from lox_merge.safety.search import RankPoint

CONFIDENCE = 0.95


def prompts_for_confidence(rho: float) -> int:
    """The fewest prompts at which equal verdicts bound the increase below rho."""
    low, high = 0, 1
    while _bound_of_equal(high) >= rho:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if _bound_of_equal(middle) < rho:
            high = middle
        else:
            low = middle
    return high


def _bound_of_equal(n: int) -> float:
    bound = statistics.upper_bound_of_increase([False] * n, [False] * n, CONFIDENCE)
    assert bound is not None
    return bound


def resolution_notes(n: int, rho: float, *, confident: bool) -> list[str]:
    """Whether n prompts can show a difference of rho at all."""
    if n == 0:
        return ["the judge decided on no reply of the aligned model, so no rank can be compared with it"]
    needed = prompts_for_confidence(rho)
    notes = []
    if 1 / n >= rho:
        notes.append(
            f"at n = {n} one prompt is a difference of {1 / n:.3g}, not below rho = {rho:g}: a rank passes only with no more successes at all"
        )
    if n < needed:
        bound = _bound_of_equal(n)
        notes.append(f"at n = {n} even equal verdicts leave an increase of up to {bound:.2g} possible (95 %); for rho = {rho:g} take n ≥ {needed}")
    if not confident:
        notes.append("the rates are compared as measured; --confident asks that the upper 95 % bound of the increase stay below rho")
    return notes


def curve_notes(curve: tuple[RankPoint, ...], aligned: AttackSuccess, rho: float) -> list[str]:
    """What of the curve the effective rank alone does not tell."""
    notes = []
    passing = [point.rank for point in curve if point.accepted]
    if not passing:
        notes.append(f"no tried rank satisfies rho = {rho:g}; try higher ranks, more prompts or another rho")
    else:
        best = passing[0]
        failing = [point.rank for point in curve if point.rank > best and not point.accepted]
        if failing:
            notes.append(f"the curve is not monotone: rank {best} satisfies rho, {_listed(failing)} above it do(es) not")
        skipped = sorted(set(range(best)) - {point.rank for point in curve})
        if skipped:
            notes.append(f"below rank {best}, {_listed(skipped)} {'was' if len(skipped) == 1 else 'were'} not tried")
    undecided = [point.rank for point in curve if point.attack.undecided]
    if aligned.undecided or undecided:
        where = (["the aligned model"] if aligned.undecided else []) + ([f"rank(s) {_listed(undecided)}"] if undecided else [])
        notes.append(f"undecided replies at {' and '.join(where)}; their prompts are left out of the comparison")
    return notes


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:10])) + (" …" if len(ranks) > 10 else "")
