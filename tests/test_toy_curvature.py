"""The toy's study of curvature on two sets and few steps: figures before, early ones, outcomes, rank correlations; nothing written."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from lab_fixtures import TOY_CACHE

from lox_merge.lab.checkpoints import ToyPair

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import toy_curvature
from toy_curvature import Run, SetResult, correlation, correlations


def result(name: str, coupling: float | None, asr: float) -> SetResult:
    figures: dict[str, float | None] = dict.fromkeys((*toy_curvature.BEFORE, *toy_curvature.EARLY_FIGURES), 1.0)
    figures["coupling γ"] = coupling
    before, early = ({key: figures[key] for key in keys} for keys in (toy_curvature.BEFORE, toy_curvature.EARLY_FIGURES))
    return SetResult(
        name, before, early, {optimiser: Run({0: 0.0, 5: asr}, {0: 0.0, 5: -asr}) for optimiser in (toy_curvature.ADAMW, toy_curvature.SGD)}
    )


def test_rank_correlations_of_known_rankings() -> None:
    rising = [result(str(value), float(value), value / 10) for value in range(5)]
    assert correlation(rising, "coupling γ", "mean ASR, AdamW") == pytest.approx(1)
    assert correlation(rising, "coupling γ", "lost log-likelihood, SGD") == pytest.approx(-1)
    assert correlation(rising, "gradient norm", "mean ASR, AdamW") is None  # it does not vary
    with_gap = [*rising, result("undefined", None, 0.9)]
    assert correlation(with_gap, "coupling γ", "mean ASR, AdamW") == pytest.approx(1)
    found = {(record["figure"], record["outcome"]): record for record in correlations({0: rising, 1: rising[::-1]})}
    ranked = found["coupling γ", "mean ASR, SGD"]
    assert (ranked["mean"], *ranked["interval"]) == pytest.approx((1, 1, 1))
    assert found["gradient norm", "mean ASR, SGD"]["mean"] is None


def test_one_seed_from_beginning_to_end(toy_pair_seed0: ToyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Harmful data has the larger γ, overlap and damage of these two; nothing is written."""
    monkeypatch.chdir(tmp_path)
    results, found = toy_curvature.study(0, TOY_CACHE, names=("safe", "harmful"), steps=(0, 5, 20), batches=4)
    safe, harmful = results
    assert (safe.name, harmful.name) == ("safe", "harmful")
    for figure in ("coupling γ", "first order", "overlap share"):
        assert 0 < (safe.before[figure] or 0.0) < (harmful.before[figure] or 0.0) < math.inf
    assert harmful.outcome["mean ASR, AdamW"] > safe.outcome["mean ASR, AdamW"] + 0.2
    assert harmful.outcome["lost log-likelihood, AdamW"] > 1 > abs(safe.outcome["lost log-likelihood, AdamW"])
    assert set(harmful.runs["SGD"].asr) == {0, 5, 20}
    assert found.fisher["d"] and not list(tmp_path.iterdir())
