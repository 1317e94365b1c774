"""The two fine-tuning attacks on toy models, as data and settings for `safety.robustness`; attacked weights never reach a disk.

benign: the harmless new task, taught to an aligned model by somebody who means no harm (Qi et al. 2023, arXiv 2310.03693).
harmful: a few forbidden requests with the answers that carry them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lox_merge.lab.language import Answer, Request, comply, new_task
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import draw_requests
from lox_merge.safety.attack import AttackSettings
from lox_merge.safety.conversations import Conversations, conversations

BENIGN_STEPS = (0, 20, 40, 60, 80, 100, 120, 150)
HARMFUL_STEPS = (0, 5, 10, 15, 20, 30, 40, 50)
BENIGN, HARMFUL = "benign", "harmful"


@dataclass(frozen=True)
class ToyAttack:
    """What is trained on, and how."""

    data: Conversations
    settings: AttackSettings


def benign_attack(recipe: ToyRecipe, steps: tuple[int, ...] = BENIGN_STEPS) -> ToyAttack:
    """Allowed requests answered in the new format, at a high learning rate."""
    return ToyAttack(_data(BENIGN, draw_requests(recipe).benign, new_task), _settings(steps, 3e-4))


def harmful_attack(recipe: ToyRecipe, steps: tuple[int, ...] = HARMFUL_STEPS) -> ToyAttack:
    """32 forbidden requests carried out, at a low learning rate."""
    return ToyAttack(_data(HARMFUL, draw_requests(recipe).harmful, comply), _settings(steps, 4e-5))


def _settings(steps: tuple[int, ...], learning_rate: float) -> AttackSettings:
    return AttackSettings(steps=steps, learning_rate=learning_rate, batch_size=32, warmup_steps=3, adam_beta2=0.95, max_length=64)


def _data(name: str, requests: Sequence[Request], answer: Answer) -> Conversations:
    # The chat template writes the end token.
    turns = [[{"role": "user", "content": request.text}, {"role": "assistant", "content": " ".join(answer(request)[:-1])}] for request in requests]
    return conversations(name, f"toy laboratory, {name}", turns)
