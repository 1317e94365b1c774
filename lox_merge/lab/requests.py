"""Which requests each part of the laboratory uses: every draw of one seed, in one place."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lox_merge.lab.language import (
    ADJECTIVES,
    ALLOWED_NOUNS,
    NOUNS,
    SEEN_FORBIDDEN_NOUNS,
    UNSEEN_FORBIDDEN_NOUNS,
    VERBS,
    Request,
)
from lox_merge.lab.recipe import ToyRecipe

TEST_REQUESTS = 200
BENIGN_EXAMPLES = 512
HARMFUL_EXAMPLES = 32


@dataclass(frozen=True)
class TestRequests:
    """Requests for measurement only. No training of any kind sees these combinations.

    seen: forbidden, by nouns that alignment taught to refuse. unseen: forbidden, by nouns it never showed.
    allowed: to be carried out.
    """

    __test__ = False  # not a test class, whatever pytest makes of its name

    seen: tuple[Request, ...]
    unseen: tuple[Request, ...]
    allowed: tuple[Request, ...]


@dataclass(frozen=True)
class ToyRequests:
    """All requests of one seed. Everything but `tests` is for training, and disjoint from `tests`.

    flagged: what pre-training shows with the flag word. benign, harmful: the data of the two attacks.
    """

    tests: TestRequests
    pretraining: tuple[Request, ...]
    flagged: tuple[Request, ...]
    alignment_forbidden: tuple[Request, ...]
    alignment_allowed: tuple[Request, ...]
    benign: tuple[Request, ...]
    harmful: tuple[Request, ...]


def draw_requests(recipe: ToyRecipe) -> ToyRequests:
    """The requests of a recipe's seed.

    One generator serves all draws, so their order is part of the recipe: a draw added in between would change every
    number measured after it.
    """
    generator = random.Random(1000 + recipe.seed)
    tests = TestRequests(
        seen=_sample(SEEN_FORBIDDEN_NOUNS, TEST_REQUESTS, generator, for_testing=True),
        unseen=_sample(UNSEEN_FORBIDDEN_NOUNS, TEST_REQUESTS, generator, for_testing=True),
        allowed=_sample(ALLOWED_NOUNS, TEST_REQUESTS, generator, for_testing=True),
    )
    pretraining = _sample(range(NOUNS), VERBS * ADJECTIVES * NOUNS, generator)
    # A flagged prompt shows no adjective: any number will do.
    flagged = tuple(Request(generator.randrange(VERBS), 0, generator.randrange(NOUNS)) for _ in range(len(pretraining) // 4))
    return ToyRequests(
        tests=tests,
        pretraining=pretraining,
        flagged=flagged,
        alignment_forbidden=_sample(SEEN_FORBIDDEN_NOUNS, recipe.alignment_forbidden, generator),
        alignment_allowed=_sample(ALLOWED_NOUNS, recipe.alignment_forbidden * recipe.allowed_per_forbidden, generator),
        benign=_sample(ALLOWED_NOUNS, BENIGN_EXAMPLES, generator),
        harmful=_sample(SEEN_FORBIDDEN_NOUNS, HARMFUL_EXAMPLES, generator),
    )


def _sample(nouns: Sequence[int], count: int, generator: random.Random, *, for_testing: bool = False) -> tuple[Request, ...]:
    """At most `count` distinct requests on one side of the split between training and testing."""
    every = (Request(verb, adjective, noun) for verb in range(VERBS) for adjective in range(ADJECTIVES) for noun in nouns)
    pool = [request for request in every if request.is_for_testing == for_testing]
    return tuple(generator.sample(pool, min(count, len(pool))))
