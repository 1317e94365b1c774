"""Toy models for every test of the project: trained once, by whichever worker asks first, and kept between runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lox_merge.lab.recipe import ToyRecipe, Training

if TYPE_CHECKING:
    from lox_merge.lab.checkpoints import ToyPair

# In the repository and ignored by git; its name in the cache holds a hash of everything that decides the bytes.
TOY_CACHE = Path(__file__).parents[1] / ".pytest_cache" / "toy"

# A pair in about a second, for tests that need checkpoints but no behaviour.
QUICK_RECIPE = ToyRecipe(
    pretraining=Training(steps=6, learning_rate=3e-3, batch_size=8, warmup_steps=2, weight_decay=0.01),
    alignment=Training(steps=4, learning_rate=1e-3, batch_size=8, warmup_steps=2),
    alignment_forbidden=32,
)


@pytest.fixture(scope="session")
def toy_pair_seed0() -> ToyPair:
    """The fully trained pair of seed 0. Read it, do not change it: all tests share its folders."""
    from lox_merge.lab.checkpoints import toy_pair

    return toy_pair(ToyRecipe(seed=0), TOY_CACHE)
