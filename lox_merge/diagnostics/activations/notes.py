"""What limits the numbers of one run, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from lox_merge.diagnostics.activations.direction import Projected
from lox_merge.diagnostics.activations.passes import Found
from lox_merge.diagnostics.activations.results import Domain
from lox_merge.safety.model_labels import ALIGNED, BASE


def notes_of(domains: Sequence[Domain], found: Found, tokens: int) -> Iterator[str]:
    if short := [f"{domain.data.name} {domain.shorter} of {len(domain.lengths)}" for domain in domains if domain.shorter]:
        yield (
            f"Responses of fewer than {tokens} tokens: {', '.join(short)}. The mean at a position is over the responses that have it, and a response "
            "is projected over its own positions."
        )
    for domain in domains:
        name, texts = domain.data.name, len(domain.lengths)
        if texts == 1:
            yield f"{name}: one response only, so there are no intervals and nothing to cross-validate on."
        if flat := [layer.layer for layer in domain.layers if not layer.norm]:
            yield f"{name}: aligned and base have the same mean states at layer(s) {_listed(flat)}, so no direction and no position is defined there."
        if weak := [layer.layer for layer in domain.layers if layer.norm and texts > 1 and not (layer.cross_validated.interval or (0, 0))[0] > 0]:
            yield (
                f"{name}: at layer(s) {_listed(weak)} the direction does not separate aligned from base on responses it was not made of (the 95 % "
                "interval of the cross-validated separation reaches 0): positions there say little."
            )
    for label in found.dtypes:
        if found.projections and label not in (BASE, ALIGNED) and all(_same(projected[label], projected[ALIGNED]) for projected in found.projections):
            yield f"{label} has the same projections as aligned everywhere: the same model, or one that does not differ on these responses."


def _same(one: Projected, other: Projected) -> bool:
    # v_l = 0 makes NaN of both.
    return bool(torch.isclose(one.inside, other.inside, rtol=0, atol=0, equal_nan=True).all())


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
