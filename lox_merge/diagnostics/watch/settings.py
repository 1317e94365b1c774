"""What a watch is asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lox_merge.diagnostics.curvature.subspace import ENERGY
from lox_merge.diagnostics.curvature.walk import Reduction
from lox_merge.errors import RequestError
from lox_merge.safety.seeds import check_seed
from lox_merge.typed_fields import check_fields

PROJECTION, OVERLAP = "alignment/projection", "alignment/overlap_score"
R_FT, RATIO = "alignment/r_ft", "alignment/r_ft_over_r_align"
# What falls as alignment is lost, where the others rise.
FALLING = (R_FT, RATIO)
NAMES = (PROJECTION, f"{PROJECTION}_random", OVERLAP, f"{OVERLAP}_random", R_FT, RATIO)


@dataclass(frozen=True)
class WatchSettings:
    """rank: k of R_ft. energy, dimension: of the sensitive subspace, as in CurvatureSettings. interval: steps between measurements;
    None: as many as fit into `overhead`, a share of the training's time. threshold: by name of a logged figure, the
    value at which to warn: above it, for r_ft and r_ft_over_r_align below it; a number alone is for the projection. stop: end the
    training there. only: regular expressions of parameter names. limit, max_length: completions that are used, and their tokens.
    memory: bytes for what the completions leave. reduction: as in CurvatureSettings.
    """

    rank: int = 6
    energy: float = ENERGY
    dimension: int | None = None
    interval: int | None = None
    overhead: float = 0.05
    threshold: Mapping[str, float] = field(default_factory=dict)
    stop: bool = False
    only: tuple[str, ...] = ()
    limit: int = 100
    max_length: int = 256
    memory: int = 4 * 2**30
    reduction: Reduction = "sum"
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        counts = (self.rank, self.limit, self.max_length - 1, self.memory, self.interval or 1, self.dimension or 1)
        if min(counts) < 1 or self.interval == 0 or self.dimension == 0:
            raise RequestError("rank, interval, limit, dimension and memory must be 1 or more, the length 2 or more.")
        if not 0 < self.overhead < math.inf:
            raise RequestError(f"an overhead of {self.overhead} is not a share of the training's time; give one above 0, such as 0.05.")
        if unknown := sorted(set(self.threshold) - set(NAMES)):
            raise RequestError(f"a threshold is for {unknown[0]!r}, which is not logged. Use {', '.join(NAMES)}.")
        if bad := [name for name, value in self.threshold.items() if not math.isfinite(value)]:
            raise RequestError(f"the threshold of {bad[0]} is not a number.")
        if self.stop and not self.threshold:
            raise RequestError("stop=True needs a threshold to stop at.")
        check_seed(self.seed)
        for pattern in self.only:
            try:
                re.compile(pattern)
            except re.error as error:
                raise RequestError(f"only={pattern!r} is not a regular expression: {error}.") from error

    def wants(self, name: str) -> bool:
        return not self.only or any(re.search(pattern, name) for pattern in self.only)

    def crossed(self, figures: Mapping[str, float | None]) -> list[str]:
        """Names of the figures that are at or beyond their threshold."""
        return [name for name, limit in self.threshold.items() if (value := figures.get(name)) is not None and beyond(name, value, limit)]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"threshold": dict(self.threshold), "only": list(self.only)}


def beyond(name: str, value: float, limit: float) -> bool:
    return value <= limit if name in FALLING else value >= limit
