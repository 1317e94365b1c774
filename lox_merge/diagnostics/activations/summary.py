"""Projections of texts as means with intervals over texts, and where a model lies between base and aligned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy
from torch import Tensor

from lox_merge.diagnostics.activations.direction import Direction, Projected
from lox_merge.diagnostics.activations.results import LayerDirection, Measure, Projection
from lox_merge.safety.bootstrap import bootstrap_interval
from lox_merge.safety.model_labels import ALIGNED, BASE

# Several hundred intervals are wanted at once; their ends do not need more.
_RESAMPLES = 1999


def layer_directions(layers: list[int], direction: Direction, projected: Mapping[str, Projected], seed: int) -> tuple[LayerDirection, ...]:
    off_line = {label: found.off_line() for label, found in projected.items()}
    found = []
    for place, (layer, norm) in enumerate(zip(layers, direction.norms, strict=True)):
        inside = {label: texts.inside[:, place] for label, texts in projected.items()}
        outside = {label: texts.outside[:, place] for label, texts in projected.items()}
        found.append(
            LayerDirection(
                layer,
                norm,
                _mean(inside[ALIGNED] - inside[BASE], seed),
                _mean(outside[ALIGNED] - outside[BASE], seed),
                direction.swapped[place],
                norm / math.sqrt(direction.dimension),
                {
                    label: Projection(
                        _mean(inside[label], seed), _position(inside, label, seed), _position(outside, label, seed), off_line[label][place]
                    )
                    for label in projected
                },
            )
        )
    return tuple(found)


def _mean(values: Tensor, seed: int) -> Measure:
    if bool(values.isnan().any()):
        return Measure(None, None)
    return Measure(float(values.mean()), bootstrap_interval(values.tolist(), seed=seed, resamples=_RESAMPLES))


def _position(projections: Mapping[str, Tensor], label: str, seed: int) -> Measure:
    """(s − s_base)/(s_aligned − s_base) of the means. None where aligned does not lie beyond base on the direction: nothing to measure with."""
    moved, whole = projections[label] - projections[BASE], projections[ALIGNED] - projections[BASE]
    if bool(moved.isnan().any()) or bool(whole.isnan().any()) or float(whole.mean()) <= 0:
        return Measure(None, None)
    value = float(moved.mean() / whole.mean())
    if label in (BASE, ALIGNED):  # 0 and 1, whatever the texts
        return Measure(value, None)
    return Measure(value, bootstrap_interval(moved.tolist(), whole.tolist(), statistic=_ratio, seed=seed, resamples=_RESAMPLES))


def _ratio(moved: Any, whole: Any, axis: int = -1) -> Any:
    with numpy.errstate(divide="ignore", invalid="ignore"):
        return numpy.mean(moved, axis=axis) / numpy.mean(whole, axis=axis)
