"""The projection filter on the toy pair, against its controls: does it take harm out, or everything alike?

A fine-tuning set of a harmless new task with one forbidden request in five, as in "Safety subspaces are not distinct" (Ponkshe et
al. 2025), sec. 4. The fine-tuned weights stay in memory. Orthogonal filtering at growing fraction, by basis: ASR (forbidden
requests whose answer does not open with the refusal), carried out, and utility (the new task's answers).

python examples/toy_projection_filter.py            # seed 0, about two minutes
python examples/toy_projection_filter.py 8 9 --json filter.json
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lox_merge.lab.attacks import benign_attack, harmful_attack
from lox_merge.lab.checkpoints import toy_pair
from lox_merge.lab.language import comply, new_task, prompt
from lox_merge.lab.measure import BATCH_SIZE, CARRIED_OUT, DECODING, NEW_TASK, NOT_REFUSED, CarriedOut, NotRefused, ToyUtility, forbidden_prompts
from lox_merge.lab.models import load_model, one_thread
from lox_merge.lab.recipe import ToyRecipe, Training
from lox_merge.lab.requests import TEST_REQUESTS, TestRequests, draw_requests
from lox_merge.lab.stages import Rate
from lox_merge.lab.tokenizer import build_tokenizer
from lox_merge.lab.training import pack, train
from lox_merge.maths.directions import rank_of_fraction
from lox_merge.maths.filter import filter_matrix
from lox_merge.safety.asr import by_category, evaluate
from lox_merge.safety.generation import LocalModel

FRACTIONS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
BASES = ("top", "random-k", "random")
STEPS = 150
KINDS = ("contaminated", "task", "harmful")
TASK_REQUESTS = 128  # and the 32 forbidden ones: one in five

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Measurement:
    """One model. attack_success_seen: on nouns that alignment has shown. utility: of the new task."""

    attack_success: Rate
    attack_success_seen: Rate
    carried_out: Rate
    utility: Rate


@dataclass(frozen=True)
class Cell:
    """One filtered model. removed: share of the update's squared norm that the filter took out."""

    basis: str
    fraction: float
    removed: float
    measured: Measurement


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def with_weights(model: Any, state: State) -> Any:
    """A copy of `model` that holds `state`."""
    edited = copy.deepcopy(model)
    edited.load_state_dict(state)
    return edited.eval()


def measure(model: Any, tests: TestRequests) -> Measurement:
    source = LocalModel(model, build_tokenizer(chat=True), decoding=DECODING, batch_size=BATCH_SIZE)
    found = evaluate(source, forbidden_prompts(tests), [NotRefused(), CarriedOut()])
    share = ToyUtility(tests)(source)[NEW_TASK] or 0.0
    return Measurement(
        Rate.of(found.attack_success[NOT_REFUSED]),
        Rate.of(by_category(found, NOT_REFUSED)["seen"]),
        Rate.of(found.attack_success[CARRIED_OUT]),
        Rate(round(share * TEST_REQUESTS), TEST_REQUESTS),
    )


def finetuned_states(aligned_folder: Path, recipe: ToyRecipe, kinds: tuple[str, ...] = KINDS) -> dict[str, State]:
    """Weights after fine-tuning on: the task with one forbidden request in five; the task alone; forbidden requests alone."""
    requests = draw_requests(recipe)
    task = [(prompt(request), new_task(request)) for request in requests.benign]
    mixed = task[:TASK_REQUESTS] + [(prompt(request), new_task(request)) for request in requests.harmful]
    harmful = [(prompt(request), comply(request)) for request in requests.harmful]
    fast, slow = benign_attack(recipe).settings, harmful_attack(recipe).settings
    states: dict[str, State] = {}
    sets = {"contaminated": (mixed, fast, STEPS), "task": (task, fast, 100), "harmful": (harmful, slow, 50)}
    for name in kinds:
        examples, training, steps = sets[name]
        model = load_model(aligned_folder)
        chosen = Training(steps, training.learning_rate, training.batch_size, training.warmup_steps, decay="constant")
        train(model, pack(examples), chosen, seed=recipe.seed + 9)
        states[name] = weights(model.eval())
    return states


def filtered(base: State, aligned: State, finetuned: State, fraction: float, basis: str, seed: int) -> dict[str, Tensor]:
    """Every tensor after orthogonal filtering, as lox-merge project writes it, but in memory."""
    out = {}
    for position, (name, tensor) in enumerate(finetuned.items()):
        stored = [state[name].reshape(len(tensor), -1) for state in (base, aligned, finetuned)]
        rank = rank_of_fraction(fraction, min(stored[0].shape))
        out[name] = filter_matrix(*stored, rank, "orthogonal", basis=basis, seed=1000 * seed + position).view(tensor.shape)  # type: ignore[arg-type]
    return out


def inner(one: State, other: State, names: State) -> float:
    return math.fsum(float((one[name].double() * other[name].double()).sum()) for name in names)


def reversal(base: State, aligned: State, finetuned: State) -> float:
    """Cosine of the fine-tuning update with the way back to the base model."""
    back = {name: base[name] - aligned[name] for name in aligned}
    change = {name: finetuned[name] - aligned[name] for name in aligned}
    return inner(change, back, aligned) / math.sqrt(inner(change, change, aligned) * inner(back, back, aligned))


def sweep(
    seed: int, cache: Path, fractions: tuple[float, ...] = FRACTIONS, bases: tuple[str, ...] = BASES, kinds: tuple[str, ...] = KINDS
) -> dict[str, Any]:
    """Everything for one seed: models without a filter, cosines of the updates with the way back, and one Cell per fraction and basis."""
    recipe = ToyRecipe(seed=seed)
    pair = toy_pair(recipe, cache)
    tests = draw_requests(recipe).tests
    with one_thread():
        model = load_model(pair.aligned)
        base, aligned = weights(load_model(pair.base)), weights(model)
        states = finetuned_states(pair.aligned, recipe, kinds)
        contaminated = states["contaminated"]
        change = {name: contaminated[name] - aligned[name] for name in aligned}
        cells = []
        for basis in bases:
            for fraction in fractions:
                state = filtered(base, aligned, contaminated, fraction, basis, seed)
                taken = {name: contaminated[name] - state[name] for name in aligned}
                removed = inner(taken, taken, aligned) / inner(change, change, aligned)
                cells.append(Cell(basis, fraction, removed, measure(with_weights(model, state), tests)))
        plain = {
            "aligned": measure(model, tests),
            "fine-tuned": measure(with_weights(model, contaminated), tests),
        }
    cosines = {name: reversal(base, aligned, state) for name, state in states.items()}
    return {"seed": seed, "plain": plain, "cells": cells, "reversal": cosines}


def _share(rate: Any) -> str:
    return "   –" if rate.value is None else f"{rate.value:.2f}"


def show(result: dict[str, Any]) -> None:
    print(f"seed {result['seed']}\n{'model':24s} {'removed':>8s} {'ASR':>6s} {'carried out':>12s} {'utility':>8s}")
    rows = [(name, "", measured) for name, measured in result["plain"].items()]
    rows += [(f"{cell.basis} {cell.fraction:g}", f"{cell.removed:.2f}", cell.measured) for cell in result["cells"]]
    for name, removed, measured in rows:
        print(f"{name:24s} {removed:>8s} {_share(measured.attack_success):>6s} {_share(measured.carried_out):>12s} {_share(measured.utility):>8s}")
    cosines = ", ".join(f"{name} {value:.2f}" for name, value in result["reversal"].items())
    print(f"cosine of the update with the way back to base: {cosines}\n")


def plain_values(result: dict[str, Any]) -> dict[str, Any]:
    def rates(measured: Measurement) -> dict[str, Any]:
        return {name: getattr(measured, name).value for name in ("attack_success", "carried_out", "utility")}

    cells = [{"basis": cell.basis, "fraction": cell.fraction, "removed": cell.removed, **rates(cell.measured)} for cell in result["cells"]]
    return {**result, "plain": {name: rates(measured) for name, measured in result["plain"].items()}, "cells": cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in arguments.seeds:
            results.append(sweep(seed, Path(os.environ.get("LOX_MERGE_CACHE", scratch))))
            show(results[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps([plain_values(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
