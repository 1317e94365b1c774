"""Targets, and running many cases of one."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

from fuzz.guard import Finding, watch


@dataclass(frozen=True)
class Target:
    """Something that reads files of others. cases: what to feed it with; feed: gives it one case, in a folder of its own.

    sound: a case that has to be accepted, or a campaign would prove nothing. dear: how many times longer than most a case takes, so that
    a campaign spends its time evenly.
    """

    name: str
    cases: st.SearchStrategy[Any]
    feed: Callable[[Any], None]
    folder: Path
    sound: Any
    dear: int = 1


@dataclass
class Outcome:
    """How the cases of one target ended, and one finding of each kind."""

    target: str
    ended: Counter[str] = field(default_factory=Counter)
    findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return sum(self.ended.values())


def run_cases(target: Target, count: int, number: int = 0) -> Outcome:
    """`count` cases drawn with the seed `number`. Goes on after a finding, so that one kind does not hide another."""
    outcome = Outcome(target.name)
    ended, finding = watch(target.name, lambda: target.feed(target.sound), target.folder, target.sound)
    assert ended == "accepted", f"{target.name}: the sound case was {ended}: {finding}"

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(target.cases)
    def one(case: Any) -> None:
        if outcome.count >= count:
            return
        ended, finding = watch(target.name, lambda: target.feed(case), target.folder, case)
        outcome.ended[ended] += 1
        if finding:
            outcome.findings.setdefault(finding.signature, finding)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HypothesisWarning)
        one()
    return outcome
