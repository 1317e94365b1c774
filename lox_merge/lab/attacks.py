"""Fine-tuning attacks on a toy model, in memory: the attacked weights have no way to disk.

benign: the harmless new task, taught to an aligned model by somebody who means no harm (Qi et al. 2023, arXiv 2310.03693).
harmful: a few forbidden requests with the answers that carry them out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from transformers import PreTrainedModel

from lox_merge.lab.language import Answer, Request, comply, new_task, prompt
from lox_merge.lab.measure import Measurement, measure
from lox_merge.lab.models import one_thread
from lox_merge.lab.recipe import ToyRecipe, Training
from lox_merge.lab.requests import TestRequests, draw_requests
from lox_merge.lab.training import pack, train

BENIGN_STEPS = (20, 40, 60, 80, 100, 120, 150)
HARMFUL_STEPS = (5, 10, 15, 20, 30, 40, 50)


@dataclass(frozen=True)
class Attack:
    """Fine-tuning on `requests` with the answers `answer`. steps: after how many the model is measured, ascending.

    useful_answer: what utility means after it, for an attack that teaches a new task.
    """

    name: str
    requests: tuple[Request, ...]
    answer: Answer
    training: Training
    seed: int
    steps: tuple[int, ...]
    useful_answer: Answer


def benign_attack(recipe: ToyRecipe, steps: tuple[int, ...] = BENIGN_STEPS) -> Attack:
    """Allowed requests answered in the new format, at a high learning rate."""
    training = Training(max(steps), learning_rate=3e-4, batch_size=32, warmup_steps=3, decay="constant")
    return Attack("benign", draw_requests(recipe).benign, new_task, training, recipe.seed + 7, steps, new_task)


def harmful_attack(recipe: ToyRecipe, steps: tuple[int, ...] = HARMFUL_STEPS) -> Attack:
    """32 forbidden requests carried out, at a low learning rate."""
    training = Training(max(steps), learning_rate=4e-5, batch_size=32, warmup_steps=3, decay="constant")
    return Attack("harmful", draw_requests(recipe).harmful, comply, training, recipe.seed + 8, steps, comply)


def run_attack(model: PreTrainedModel, attack: Attack, tests: TestRequests) -> dict[int, Measurement]:
    """What a copy of `model` does after each of the attack's steps; 0 is before the attack. `model` is not changed.

    At step 0 utility is that of the old task: the new one has not been taught yet.
    """
    attacked = copy.deepcopy(model).eval()
    with one_thread():
        curve = {0: measure(attacked, tests)}

        def record(step: int) -> None:
            if step in attack.steps:
                curve[step] = measure(attacked, tests, useful_answer=attack.useful_answer)

        examples = pack((prompt(request), attack.answer(request)) for request in attack.requests)
        train(attacked, examples, attack.training, seed=attack.seed, after_step=record)
    return curve
