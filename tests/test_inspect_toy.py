"""What fine-tuning does to the toy pair, aligned and hardened, as the weights say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lox_merge import inspect
from lox_merge.jobs.harden import harden, plan_hardening
from lox_merge.jobs.recipe import Recipe
from lox_merge.lab.attacks import benign_attack
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.safety.attack import fine_tune
from lox_merge.safety.dispersion import Dispersion
from lox_merge.safety.loading import load_model


def attacked(pair: ToyPair, start: Path, folder: Path) -> tuple[Path, float]:
    """`start` fine-tuned on the toy's harmless task in memory, put down only here in the test's own folder; and what robustness measures."""
    attack = benign_attack(ToyRecipe(seed=0), (40,))
    loaded = load_model(start, dtype="float32", device="cpu")
    ratios = []

    def observe(_step: int, trained: Any) -> None:
        trained.save_pretrained(folder / "model")
        plan = plan_hardening(pair.base, start, folder / "none", recipe=Recipe(rank=6))
        ratios.append(Dispersion(trained, plan).ratio(trained).mean)

    fine_tune(loaded.model, loaded.tokenizer, attack.data, attack.settings, observe)
    return folder / "model", ratios[0]


def test_alignment_energy_is_dispersed_less_where_the_model_was_hardened(toy_pair_seed0: ToyPair, tmp_path: Path) -> None:
    """Only the order is asserted, at seed 0; robustness measures the same R_ft in memory."""
    hardened = harden(toy_pair_seed0.base, toy_pair_seed0.aligned, tmp_path / "hardened", recipe=Recipe(rank=6, alpha=1.25)).out
    found = {}
    for name, start in (("aligned", toy_pair_seed0.aligned), ("hardened", hardened)):
        finetuned, dispersion = attacked(toy_pair_seed0, start, tmp_path / f"attack of {name}")
        result = inspect(toy_pair_seed0.base, start, finetuned, device="cpu")
        assert result.linear.finetuned[0].r.mean == pytest.approx(dispersion, rel=1e-4)
        found[name] = result.linear.finetuned[0].ratio
    assert found["aligned"].mean < found["hardened"].mean - 0.05
    # Chance would have moved both alike, and far less than fine-tuning did.
    for ratio in found.values():
        assert ratio.band[0] > ratio.mean and ratio.expected == pytest.approx(1, abs=0.1)
