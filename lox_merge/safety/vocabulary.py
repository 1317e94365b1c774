"""Whether two models speak of the same tokens: without that, no probability of one can be set beside one of the other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from lox_merge.errors import RequestError


def output_size(model: Any) -> int:
    """How many tokens a model scores: rows of its output head, which may be more than its tokenizer knows."""
    head = model.get_output_embeddings()
    return int(head.weight.shape[0]) if head is not None else int(model.config.get_text_config().vocab_size)


def same_tokens(one: Any, other: Any, size: int) -> list[str]:
    """Differences of two tokenizers over the token numbers below `size`, a few in words; empty where they agree."""
    first, second = ({number: text for text, number in tokenizer.get_vocab().items() if number < size} for tokenizer in (one, other))
    different = sorted(number for number in first.keys() & second.keys() if first[number] != second[number])
    # A number that one of them has no name for is padding of its table, and never written.
    return [f"token {number} is {first[number]!r} and {second[number]!r}" for number in itertools.islice(different, 3)]


def common_vocabulary(models: Mapping[str, tuple[int, Any]], *, shared: bool = False) -> int:
    """How many token numbers all models share: (size of the output, tokenizer) by label.

    Raises RequestError where tokenizers call a shared number by different names, and where sizes differ unless `shared`: KL is
    undefined between distributions over different sets; over the shared numbers, renormalised, it is defined again.
    """
    (label, (size, tokenizer)), *rest = models.items()
    smallest = min(size for size, _ in models.values())
    for other, (_, its) in rest:
        if different := same_tokens(tokenizer, its, smallest):
            raise RequestError(
                f"{label} and {other} have different vocabularies ({'; '.join(different)}): probabilities of their tokens cannot be compared. "
                "Give models of one family, with the same tokenizer."
            )
    sizes = {name: count for name, (count, _) in models.items()}
    if len(set(sizes.values())) > 1 and not shared:
        listed = ", ".join(f"{name} {count:,}" for name, count in sizes.items())
        raise RequestError(
            f"the models have vocabularies of different sizes ({listed}), so KL between them is undefined. Their tokenizers agree on the first "
            f"{smallest:,} tokens: --shared-vocabulary compares these alone, renormalised."
        )
    return smallest if shared else size
