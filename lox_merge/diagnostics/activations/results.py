"""The result of `activations`, and its JSON: numbers only, no text of the sets, no path of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from lox_merge._version import __version__
from lox_merge.safety.bootstrap import Interval
from lox_merge.safety.conversations import Conversations


@dataclass(frozen=True)
class Measure:
    """A mean over texts with its 95 % bootstrap interval; None where undefined, and the interval of one text."""

    value: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Projection:
    """One model on one layer's direction.

    projection: mean scalar projection s_l, in units of the hidden states. position: (s − s_base)/(s_aligned − s_base).
    cross_validated: the same position with v_l of the other folds' texts. off_line: distance from the line through base and
    aligned in units of ‖v_l‖: what the model did besides moving along it.
    """

    projection: Measure
    position: Measure
    cross_validated: Measure
    off_line: float | None


@dataclass(frozen=True)
class LayerDirection:
    """v_l. norm: ‖v_l‖. separation: s_aligned − s_base on the texts that v_l was made of. cross_validated: on texts it was not made of.

    swapped: ‖v_l‖ (the separation, where all responses are as long) if a coin had swapped base and aligned in each response, root mean
    square. random: the separation along a random direction, root mean square, ‖v_l‖/√dimension.
    """

    layer: int
    norm: float
    separation: Measure
    cross_validated: Measure
    swapped: float | None
    random: float
    models: Mapping[str, Projection]


@dataclass(frozen=True)
class Residual:
    """h_aligned(x) − h_base(x) over a domain, at the last layer. shares: of ‖R‖²_F in each leading direction. centred_shares: the same of R
    minus its mean. mean_share: of ‖R‖²_F in the mean difference alone. mean_cosine: |cos| of the first direction and that mean."""

    shares: tuple[float, ...]
    centred_shares: tuple[float, ...]
    mean_share: float | None
    mean_cosine: float | None
    directions: Tensor = field(repr=False)


@dataclass(frozen=True)
class Domain:
    """One file of responses. lengths: positions read of each, at most `tokens`."""

    data: Conversations
    lengths: tuple[int, ...]
    shorter: int
    layers: tuple[LayerDirection, ...]
    residual: Residual

    def to_json(self) -> dict[str, Any]:
        residual = {name: getattr(self.residual, name) for name in ("shares", "centred_shares", "mean_share", "mean_cosine")}
        return {
            **self.data.identity(),
            "positions": sum(self.lengths),
            "longest": max(self.lengths),
            "shorter": self.shorter,
            "layers": [asdict(layer) for layer in self.layers],
            "residual": residual,
        }


@dataclass(frozen=True)
class Agreement:
    """|cos| of leading directions of two domains. cosines: [i][j] of direction i of the first and j of the second.

    permuted_mean, permuted_95: of the first two directions when rows are shuffled between the domains. p_less: how often shuffled
    domains agree as little, p_more: as much, (1 + count)/(1 + draws). random_mean, random_95: of random directions; p_random: how often
    one would agree as much.
    """

    cosines: tuple[tuple[float, ...], ...]
    permuted_mean: float | None
    permuted_95: float | None
    p_less: float | None
    p_more: float | None
    random_mean: float
    random_95: float
    p_random: float | None


@dataclass(frozen=True)
class DomainPair:
    """Two domains: with the mean difference, as in the paper, and without."""

    first: str
    second: str
    uncentred: Agreement
    centred: Agreement


@dataclass(frozen=True)
class Overlap:
    """MSO at one η. expected: of random subspaces, max(k_A, k_B)/d. halves: MSO of two random halves of each set: what sampling alone leaves."""

    eta: float
    counts: tuple[int, int] | None
    mso: float | None
    expected: float | None
    halves: tuple[float | None, float | None]


@dataclass(frozen=True)
class SetOverlap:
    """Two prompt sets at one layer of one model."""

    model: str
    layer: int
    first: str
    second: str
    uncentred: tuple[Overlap, ...]
    centred: tuple[Overlap, ...]


@dataclass(frozen=True)
class Activations:
    """The result of `activations`. models: labels, base and aligned first. sources: identities. settings: all that decides the numbers.

    prompts: of each prompt set, name, source, sha256, count. notes: what limits the numbers or was done in another way than asked.
    """

    models: tuple[str, ...]
    sources: Mapping[str, Any]
    settings: Mapping[str, Any]
    domains: tuple[Domain, ...]
    pairs: tuple[DomainPair, ...]
    prompts: tuple[Mapping[str, Any], ...]
    overlaps: tuple[SetOverlap, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is undefined is null."""
        return {
            "lox_merge": __version__,
            "models": list(self.models),
            "sources": dict(self.sources),
            "settings": dict(self.settings),
            "domains": [domain.to_json() for domain in self.domains],
            "pairs": [asdict(pair) for pair in self.pairs],
            "prompts": [dict(found) for found in self.prompts],
            "overlaps": [asdict(overlap) for overlap in self.overlaps],
            "notes": list(self.notes),
        }
