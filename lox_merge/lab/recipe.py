"""Every setting of a toy pair. Two equal recipes give the same bytes on the same machine and package versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lox_merge.errors import RecipeError
from lox_merge.typed_fields import check_fields

Decay = Literal["cosine", "constant"]
ToyDtype = Literal["float32", "bfloat16"]

ATTENTION_HEADS = 4


@dataclass(frozen=True)
class Training:
    """One run of AdamW. learning_rate is reached after warmup_steps, then falls to 0 by a half cosine or stays."""

    steps: int
    learning_rate: float
    batch_size: int
    warmup_steps: int
    weight_decay: float = 0.0
    decay: Decay = "cosine"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.steps < 1 or self.batch_size < 1 or self.warmup_steps < 1:
            raise RecipeError(
                f"toy training needs at least 1 step, batch size 1 and 1 warm-up step; got {self.steps}, {self.batch_size} and {self.warmup_steps}."
            )
        if self.decay not in get_args(Decay):
            raise RecipeError(f"decay {self.decay!r} is not one of {', '.join(get_args(Decay))}.")


@dataclass(frozen=True)
class ToyRecipe:
    """A base model and the aligned model trained from it.

    The defaults were chosen while looking at seeds 0 to 7; a number quoted from those seeds is optimistic.
    Alignment takes many steps at a low learning rate: a quick alignment leaves a delta that does not extrapolate.
    alignment_forbidden requests are taught to be refused, allowed_per_forbidden times as many to be carried out.
    """

    seed: int = 0
    hidden_size: int = 64
    layers: int = 3
    pretraining: Training = Training(steps=400, learning_rate=3e-3, batch_size=64, warmup_steps=20, weight_decay=0.01)
    alignment: Training = Training(steps=600, learning_rate=1e-4, batch_size=64, warmup_steps=30)
    alignment_forbidden: int = 512
    allowed_per_forbidden: int = 4
    dtype: ToyDtype = "float32"

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.seed < 2**32:
            raise RecipeError(f"seed {self.seed} is outside 0 to 2**32 - 1.")
        # Rotary embeddings rotate pairs, so each head needs an even width.
        if self.hidden_size < 1 or self.hidden_size % (2 * ATTENTION_HEADS) or self.layers < 1:
            raise RecipeError(
                f"a toy model needs a hidden size that is a multiple of {2 * ATTENTION_HEADS} and at least 1 layer; "
                f"got {self.hidden_size} and {self.layers}."
            )
        if self.alignment_forbidden < 1 or self.allowed_per_forbidden < 1:
            raise RecipeError("alignment needs at least 1 forbidden request and 1 allowed request for each of them.")
        if self.dtype not in get_args(ToyDtype):
            raise RecipeError(f"dtype {self.dtype!r} is not one of {', '.join(get_args(ToyDtype))}.")
