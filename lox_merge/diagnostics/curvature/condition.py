"""The Alignment Instability Condition of one data set: overlap of its gradient with the safe subspace, coupling, predictions.

Springer et al. 2026, Definition 5.1, Theorems 6.1 and 6.2, with F the empirical Fisher matrix of safe completions over all
covered parameters jointly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from lox_merge.diagnostics.curvature.gram import FisherGram
from lox_merge.diagnostics.curvature.hessian import inner, second_order, twice_differentiable
from lox_merge.diagnostics.curvature.products import products_with
from lox_merge.diagnostics.curvature.subspace import SafeSubspace
from lox_merge.diagnostics.curvature.walk import Example
from lox_merge.maths.fisher import PREDICTIONS, expected_weighted_norm, predictions, projection_norm, weighted_norm
from lox_merge.safety.bootstrap import Interval, bootstrap_interval
from lox_merge.safety.progress import ProgressFactory, no_progress

RESAMPLES = 1999


@dataclass(frozen=True)
class Moments:
    """What the batches of one data set say, in numbers per safe completion.

    gradients, products: (batches, n): ⟨g_i, g_b⟩ and ⟨g_i, H_b g⟩ over all covered parameters, float64. gradient_gram, product_gram:
    (batches, batches): ⟨g_b, g_b'⟩ and ⟨H_b g, H_b' g⟩. control: (n,): ⟨g_i, H r⟩. by_name: the means (2, n) of each
    parameter: ⟨g_i, g⟩, ⟨g_i, ∇g·g⟩. kernels: what was chosen so that a second derivative exists.
    """

    gradients: Tensor
    products: Tensor
    gradient_gram: Tensor
    product_gram: Tensor
    control: Tensor
    by_name: dict[str, Tensor]
    kernels: list[str]


def moments(
    model: Any,
    examples: Sequence[Example],
    gram: FisherGram,
    batches: Sequence[Sequence[Example]],
    *,
    memory: int,
    seed: int = 0,
    batch_size: int | None = None,
    progress: ProgressFactory = no_progress,
    what: str = "second derivatives",
) -> Moments:
    """examples, gram: the safe completions. batches: of the data set that would be fine-tuned on."""
    count, safe = len(batches), len(examples)
    gradients, products = torch.zeros(count, safe, dtype=torch.float64), torch.zeros(count, safe, dtype=torch.float64)
    gradient_gram, product_gram = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
    control = torch.zeros(safe, dtype=torch.float64)
    by_name: dict[str, Tensor] = {}
    with twice_differentiable(model, gram.names) as kernels, progress(2 * count, what) as shown:
        for group in second_order(model, batches, gram.names, memory=memory, seed=seed, progress=shown):
            found = products_with(model, examples, gram, [*group.gradients, *group.products, group.control], batch_size=batch_size)
            for name in group.names:
                values = found[name]
                gradients, products, control = gradients + values[:count], products + values[count:-1], control + values[-1]
                by_name[name] = torch.stack([values[:count].mean(0), values[count:-1].mean(0)])
            for i in range(count):
                for j in range(count):
                    gradient_gram[i, j] += inner(group.gradients[i], group.gradients[j])
                    product_gram[i, j] += inner(group.products[i], group.products[j])
    return Moments(gradients, products, gradient_gram, product_gram, control, by_name, kernels)


@dataclass(frozen=True)
class Estimate:
    """interval: 95 % percentile bootstrap over batches; None for one batch."""

    value: float | None
    interval: Interval | None

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "interval": None if self.interval is None else list(self.interval)}


def condition_record(found: Moments, subspace: SafeSubspace, times: Sequence[float], *, seed: int = 0) -> dict[str, Any]:
    """The condition's figures as in docs/curvature.md; None where F = 0.

    Resampling batches changes g and the mean over H_b; within H_b g, g stays the mean of all batches.
    """
    d, spectrum, n = subspace.dimension, subspace.spectrum, subspace.parameters
    if d is None:
        return dict.fromkeys(("gradient_norm", "overlap", "overlap_share", "first_order", "coupling", "control_coupling")) | {
            "expected_overlap_share": None,
            "expected_coupling": None,
            "second_order_from": None,
            "predictions": [],
        }
    dimension = d

    def norms(gram: Tensor, places: Tensor) -> Tensor:
        """|| mean of the chosen batches' vectors ||, from their inner products."""
        return gram[places[..., :, None], places[..., None, :]].mean((-1, -2)).clamp(min=0).sqrt()

    def estimate(statistic: Callable[[Tensor], Tensor]) -> Estimate:
        def of_batches(places: Any, axis: int = -1) -> Any:
            return statistic(torch.from_numpy(numpy.moveaxis(numpy.asarray(places), axis, -1).astype(numpy.int64))).numpy()

        count = len(found.gradients)
        value = float(of_batches(numpy.arange(count)))
        interval = bootstrap_interval(list(range(count)), statistic=of_batches, seed=seed, resamples=RESAMPLES)
        return Estimate(value if math.isfinite(value) else None, interval)

    def predicted(field: str, time: float) -> Estimate:
        def statistic(places: Tensor) -> Tensor:
            return predictions(spectrum, found.gradients[places].mean(-2), found.products[places].mean(-2), dimension, time)[field]

        return estimate(statistic)

    first = estimate(lambda places: weighted_norm(spectrum, found.gradients[places].mean(-2), dimension))
    coupling = estimate(lambda places: weighted_norm(spectrum, found.products[places].mean(-2), dimension))
    everything = torch.arange(len(found.gradients))
    product_norm = float(norms(found.product_gram, everything))
    return {
        "gradient_norm": estimate(lambda places: norms(found.gradient_gram, places)).to_json(),
        "overlap": estimate(lambda places: projection_norm(spectrum, found.gradients[places].mean(-2), dimension)).to_json(),
        "overlap_share": estimate(
            lambda places: projection_norm(spectrum, found.gradients[places].mean(-2), dimension) / norms(found.gradient_gram, places)
        ).to_json(),
        "expected_overlap_share": math.sqrt(d / n),
        "first_order": first.to_json(),
        "coupling": coupling.to_json(),
        "expected_coupling": expected_weighted_norm(spectrum, product_norm, d, n),
        "control_coupling": float(weighted_norm(spectrum, found.control, d)),
        # Where γt²/2 overtakes the first-order term ||F^{1/2} P g|| t.
        "second_order_from": 2 * first.value / coupling.value if first.value is not None and coupling.value else None,
        "predictions": [{"time": time, **{field: predicted(field, time).to_json() for field in PREDICTIONS}} for time in times],
    }
