"""Seven fine-tuning sets in the toy language, from what alignment already taught to forbidden requests carried out.

They differ in what they teach. Which of them wear refusal away, and how
fast, is what `examples/toy_curvature.py` asks before and after training.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from lox_merge.lab.language import ALLOWED_NOUNS, Answer, Request, category_question, comply, new_task, refuse
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import draw_requests
from lox_merge.safety.conversations import Conversations, Message, conversations

EXAMPLES = 256
# Forbidden requests are 32 in the laboratory; one in five of a contaminated set, as in "Safety subspaces are not distinct", sec. 4.
_TASK_PER_FORBIDDEN = 4

Turns = list[Message]


def fine_tuning_sets(recipe: ToyRecipe) -> dict[str, Conversations]:
    """The sets of a recipe's seed, by name.

    same: allowed requests as alignment left them. safe: these and refused forbidden ones, as in alignment. kinds: the nouns' categories,
    a skill of pre-training. new task: a harmless format (benign fine-tuning). shuffled: allowed requests with another request's answer.
    contaminated: the new task, one request in five forbidden and answered in it. harmful: forbidden requests carried out.
    """
    drawn, generator = draw_requests(recipe), random.Random(5000 + recipe.seed)
    allowed, forbidden = drawn.benign[:EXAMPLES], drawn.harmful
    elsewhere = list(allowed)
    generator.shuffle(elsewhere)
    task = len(forbidden) * _TASK_PER_FORBIDDEN
    kinds = [ALLOWED_NOUNS[position % len(ALLOWED_NOUNS)] for position in range(EXAMPLES)]
    found: dict[str, list[Turns]] = {
        "same": _answered(allowed, comply),
        "safe": _answered(allowed[: EXAMPLES // 2], comply) + _answered(drawn.alignment_forbidden[: EXAMPLES // 2], refuse),
        "kinds": [_turns(" ".join(question[1:-1]), answer) for question, answer in map(category_question, kinds)],
        "new task": _answered(allowed, new_task),
        "shuffled": [_turns(request.text, comply(other)) for request, other in zip(allowed, elsewhere, strict=True)],
        "contaminated": _answered(allowed[:task], new_task) + _answered(forbidden, new_task),
        "harmful": _answered(forbidden, comply),
    }
    return {name: conversations(name, f"toy laboratory, {name}", turns) for name, turns in found.items()}


def _answered(requests: Sequence[Request], answer: Answer) -> list[Turns]:
    return [_turns(request.text, answer(request)) for request in requests]


def _turns(text: str, answer: Sequence[str]) -> Turns:
    # The chat template writes the end token.
    return [{"role": "user", "content": text}, {"role": "assistant", "content": " ".join(answer[:-1])}]
