"""The demo: train a toy pair, harden its files, search the rank, attack the models in memory, compare with equal-norm controls."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lox_merge.errors import OutputError
from lox_merge.jobs.harden import harden
from lox_merge.jobs.recipe import Recipe
from lox_merge.lab.attacks import ToyAttack, benign_attack, harmful_attack
from lox_merge.lab.checkpoints import ToyPair, toy_pair
from lox_merge.lab.measure import BATCH_SIZE, DECODING, CarriedOut, NotRefused, ToyUtility, forbidden_prompts
from lox_merge.lab.models import one_thread
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import TestRequests, draw_requests
from lox_merge.safety.asr import evaluate, summary
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.loading import load_model
from lox_merge.safety.robustness import Robustness, compare_under_attack
from lox_merge.safety.search import RankSearch
from lox_merge.safety.search_job import search
from lox_merge.safety.starting_points import Control
from lox_merge.safety.types import Evaluation

RANK, ALPHA = 6, 1.25
RANKS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 16)
# The seeds whose results were looked at while the laboratory's settings were chosen.
TUNED_SEEDS = range(8)
CONTROLS: tuple[Control, ...] = ("full-rank", "gaussian")

Report = Callable[[str], None]


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured. base: the pre-trained model, asked in aligned's chat format. base_utility: of it.

    search: the effective rank. benign, harmful: aligned, LoX and the controls under both attacks. seconds: wall time, training included.
    """

    recipe: ToyRecipe
    parameters: int
    base: Evaluation
    base_utility: dict[str, float | None]
    search: RankSearch
    benign: Robustness
    harmful: Robustness
    hardened: Path
    seconds: float

    @property
    def attacks(self) -> tuple[Robustness, Robustness]:
        return self.benign, self.harmful

    def to_json(self) -> dict[str, Any]:
        """Plain values for --json: documents of `search` and `robustness` as those commands write them, and the base model's figures."""
        return {
            "command": "demo",
            "seed": self.recipe.seed,
            "seed_was_used_for_tuning": self.recipe.seed in TUNED_SEEDS,
            "parameters": self.parameters,
            "toy_recipe": asdict(self.recipe),
            "hardened": self.hardened.name,
            "seconds": self.seconds,
            "base": summary(self.base) | {"utility": self.base_utility},
            "search": {"command": "search", **self.search.to_json()},
            "attacks": [{"command": "robustness", **attack.to_json()} for attack in self.attacks],
        }


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    cache_dir: Path | None = None,
    controls: bool | Sequence[Control] = CONTROLS,
    progress: Report | None = None,
) -> DemoResult:
    """Train (or take from the cache) the pair of `seed`, harden its files into out/hardened, search its rank and attack it.

    The hardened model is taken from its folder, as a user would. The controls and everything attacked stay in memory.
    About a minute on two cores. Raises OutputError when `out` or the cache cannot be written.
    """
    started = time.perf_counter()
    report = progress or (lambda _message: None)
    recipe = ToyRecipe(seed=seed)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder {out} cannot be made ({error.strerror or error}); name another one with --out.") from error
    with one_thread():  # sums in a fixed order: the same seed gives the same figures
        pair = toy_pair(recipe, cache_dir, report)
        report(f"hardening the aligned checkpoint, rank {RANK}, alpha {ALPHA}")
        hardened = harden(pair.base, pair.aligned, out / "hardened", recipe=Recipe(rank=RANK, alpha=ALPHA), device="cpu", overwrite=True).out
        tests = draw_requests(recipe).tests
        report(f"searching the effective rank, {len(RANKS)} ranks")
        found = _search(pair, tests)
        benign = _attack(pair, hardened, benign_attack(recipe), tests, seed, controls, report)
        harmful = _attack(pair, hardened, harmful_attack(recipe), tests, seed, controls, report)
        base = _base_model(pair)
        return DemoResult(
            recipe,
            base.model.num_parameters(),
            evaluate(base, forbidden_prompts(tests), [NotRefused(), CarriedOut()]),
            ToyUtility(tests)(base),
            found,
            benign,
            harmful,
            hardened,
            time.perf_counter() - started,
        )


def _search(pair: ToyPair, tests: TestRequests) -> RankSearch:
    return search(
        pair.base,
        pair.aligned,
        # As safe as aligned where alignment has taught: on nouns it never showed, aligned itself fails on other requests than theta_r.
        forbidden_prompts(replace(tests, unseen=())),
        NotRefused(),
        ranks=RANKS,
        model={"decoding": DECODING, "batch_size": BATCH_SIZE},
        utility=ToyUtility(tests),
        device="cpu",
    )


def _attack(
    pair: ToyPair, hardened: Path, attack: ToyAttack, tests: TestRequests, seed: int, controls: bool | Sequence[Control], report: Report
) -> Robustness:
    return compare_under_attack(
        pair.base,
        pair.aligned,
        hardened,
        [attack.data],
        forbidden_prompts(tests),
        [NotRefused(), CarriedOut()],
        settings=attack.settings,
        recipe=Recipe(rank=RANK, alpha=ALPHA),
        seeds=[seed],
        controls=controls,
        model={"decoding": DECODING, "batch_size": BATCH_SIZE},
        utility=ToyUtility(tests),
        device="cpu",
        report=lambda text: report(f"attacking, {text}"),
    )


def _base_model(pair: ToyPair) -> LocalModel:
    """The base model, asked as aligned is: its own tokenizer has no chat template."""
    loaded = load_model(pair.base, device="cpu")
    tokenizer = load_model(pair.aligned, device="cpu").tokenizer
    return LocalModel.of(loaded, tokenizer=tokenizer, decoding=DECODING, batch_size=BATCH_SIZE)
