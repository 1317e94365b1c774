"""What a measurement of curvature is asked for."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from lox_merge.diagnostics.curvature.gram import MEMORY
from lox_merge.diagnostics.curvature.subspace import ENERGY
from lox_merge.diagnostics.curvature.walk import Reduction
from lox_merge.diagnostics.places import layer_of
from lox_merge.errors import RequestError
from lox_merge.safety.seeds import check_seed
from lox_merge.typed_fields import check_fields


@dataclass(frozen=True)
class CurvatureSettings:
    """Which parameters, completions and batches, and how the figures are made.

    reduction: a completion's log-likelihood is the 'sum' over its tokens, log π(y|x) as in the paper, or their 'mean'. energy: d
    is the fewest eigenvalues that hold this share of tr F; dimension: d itself instead. layers: numbers; only, exclude:
    regular expressions of parameter names. limit: completions, a seeded sample of more (None: all). max_length: tokens that are kept.
    memory: bytes beside the model. batches, data_batch_size: of each data set. learning_rate, steps: predictions at t = their
    product. projection: dimensions of the paper's estimate (None: without), projection_seeds: how often it is drawn.
    """

    reduction: Reduction = "sum"
    energy: float = ENERGY
    dimension: int | None = None
    layers: tuple[int, ...] | None = None
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    limit: int | None = 100
    max_length: int = 512
    memory: int = MEMORY
    batches: int = 8
    data_batch_size: int = 8
    learning_rate: float = 1e-5
    steps: tuple[int, ...] = (10, 30, 100)
    projection: int | None = None
    projection_seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.reduction not in ("sum", "mean"):
            raise RequestError(f"the log-likelihood of a completion is a sum or a mean over its tokens, not {self.reduction!r}.")
        if not 0 < self.energy <= 1:
            raise RequestError(f"an energy of {self.energy} is not a share of the trace; give one above 0 and at most 1, such as 0.9.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0) or not self.steps or min(self.steps) < 1:
            raise RequestError("predictions need a learning rate above 0 and steps of 1 or more, such as 1e-5 and 10,100.")
        counts = (self.batches, self.data_batch_size, self.max_length - 1, self.memory, self.projection_seeds)
        optional = (self.dimension, self.limit, None if self.projection is None else self.projection - 1)
        if min(counts) < 1 or any(value is not None and value < 1 for value in optional):
            raise RequestError("counts must be 1 or more, and lengths and projections 2 or more.")
        check_seed(self.seed)
        for pattern in (*self.only, *self.exclude):
            try:
                re.compile(pattern)
            except re.error as error:
                raise RequestError(f"{pattern!r} is not a regular expression: {error}.") from error

    @property
    def times(self) -> tuple[float, ...]:
        return tuple(self.learning_rate * steps for steps in self.steps)

    def wants(self, name: str) -> bool:
        """Whether this parameter is measured."""
        where = layer_of(name)
        if self.layers is not None and (where is None or where[1] not in self.layers):
            return False
        chosen = not self.only or any(re.search(pattern, name) for pattern in self.only)
        return chosen and not any(re.search(pattern, name) for pattern in self.exclude)

    def check_against(self, names: list[str]) -> None:
        """Raises RequestError for layers and expressions that name nothing of the model."""
        there = sorted({where[1] for where in map(layer_of, names) if where is not None})
        absent = [number for number in self.layers or () if number not in there]
        if absent:
            span = f"{there[0]} to {there[-1]}" if there else "no"
            raise RequestError(f"the model has no layer {', '.join(map(str, absent))}; it has {span} layers.")
        for pattern in self.only:
            if not any(re.search(pattern, name) for name in names):
                raise RequestError(f"--only {pattern!r} names no parameter of the model, such as {names[0]}.")
        if not any(self.wants(name) for name in names):
            raise RequestError("no parameter is left to measure; check --layers, --only and --exclude.")

    def to_json(self) -> dict[str, Any]:
        record = asdict(self) | {"times": list(self.times)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}
