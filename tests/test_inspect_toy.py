"""What fine-tuning does to the toy pair, aligned and hardened, as the weights say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lox_merge import inspect
from lox_merge.jobs.harden import harden, plan_hardening
from lox_merge.jobs.recipe import Recipe
from lox_merge.lab.attacks import benign_attack
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.lab.language import new_task
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import draw_requests
from lox_merge.safety.attack import AttackSettings, fine_tune
from lox_merge.safety.attack_data import load_attack
from lox_merge.safety.dispersion import Dispersion
from lox_merge.safety.loading import load_model


def attacked(pair: ToyPair, start: Path, folder: Path) -> tuple[Path, float]:
    """`start` fine-tuned on the toy's harmless task in memory, put down only here in the test's own folder; and what robustness measures."""
    recipe = ToyRecipe(seed=0)
    requests = draw_requests(recipe)
    data = folder / "benign.jsonl"
    folder.mkdir()
    rows = [{"prompt": request.text, "response": " ".join(new_task(request)[:-1])} for request in requests.benign]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rate = benign_attack(recipe).training.learning_rate
    settings = AttackSettings(steps=(40,), learning_rate=rate, batch_size=32, warmup_steps=3, adam_beta2=0.95, max_length=64)
    loaded = load_model(start, dtype="float32", device="cpu")
    ratios = []

    def observe(_step: int, trained: Any) -> None:
        trained.save_pretrained(folder / "model")
        plan = plan_hardening(pair.base, start, folder / "none", recipe=Recipe(rank=6))
        ratios.append(Dispersion(trained, plan).ratio(trained).mean)

    fine_tune(loaded.model, loaded.tokenizer, load_attack(data), settings, observe)
    return folder / "model", ratios[0]


def test_alignment_energy_is_dispersed_less_where_the_model_was_hardened(toy_pair_seed0: ToyPair, tmp_path: Path) -> None:
    """FACTS: R_ft/R_align after harmless fine-tuning, aligned .64, LoX .80; safe to order at seed 0. Robustness measures the same R_ft."""
    hardened = harden(toy_pair_seed0.base, toy_pair_seed0.aligned, tmp_path / "hardened", recipe=Recipe(rank=6, alpha=1.25)).out
    found = {}
    for name, start in (("aligned", toy_pair_seed0.aligned), ("hardened", hardened)):
        finetuned, dispersion = attacked(toy_pair_seed0, start, tmp_path / f"attack of {name}")
        result = inspect(toy_pair_seed0.base, start, finetuned, device="cpu")
        assert result.linear["finetuned"][0]["r"]["mean"] == pytest.approx(dispersion, rel=1e-4)
        found[name] = result.linear["finetuned"][0]["ratio"]
    assert found["aligned"]["mean"] < found["hardened"]["mean"] - 0.05
    # Chance would have moved both alike, and far less than fine-tuning did.
    for ratio in found.values():
        assert ratio["band"][0] > ratio["mean"] and ratio["expected"] == pytest.approx(1, abs=0.1)
