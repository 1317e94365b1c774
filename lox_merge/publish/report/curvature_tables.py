"""Tables of a measurement of curvature."""

from __future__ import annotations

from lox_merge.publish.documents.curvature import Curvature, Estimate, Fisher
from lox_merge.publish.report.section import Cell, Head, Table, count, figure, heads, word


def data_table(result: Curvature) -> Table:
    """The Alignment Instability Condition of each data set, the riskiest first; predictions at the last t."""
    columns = (
        Head("data", numeric=False),
        *heads(Head("rank", note="by coupling; 1 is the highest")),
        Head("overlap", note="share of the gradient's norm inside the subspace"),
        Head("chance", note="√(d/n), what a random direction has"),
        Head("coupling γ", note="‖F^½ P ∇g·g‖"),
        Head("low"),
        Head("high"),
        Head("random", note="of a random vector of the norm of ∇g·g"),
        Head("projection", note="γt²/2 at the last t"),
        Head("λγ²t⁴", note="the paper's scaling, without its constant"),
        Head("γ²t⁴/8", note="what Theorems 6.1 and 6.2 give together, nats"),
        Head("second order", note="½‖F^½ P (−tg + t²/2 ∇g·g)‖², nats"),
        Head("low "),
        Head("high "),
        Head("batches"),
    )
    rows = []
    for data in result.ranked:
        last = data.predictions[-1] if data.predictions else None
        rows.append(
            (
                word(data.name),
                count(data.rank),
                _value(data.overlap_share, ".3f"),
                figure(data.expected_overlap_share, ".3f"),
                _value(data.coupling),
                *_ends(data.coupling),
                figure(data.expected_coupling, ".3g"),
                _value(last.projection if last else None),
                _value(last.loss if last else None),
                _value(last.quadratic_loss if last else None),
                _value(last.second_order_loss if last else None),
                *_ends(last.second_order_loss if last else None),
                count(data.batches),
            )
        )
    time = f" at t = {result.settings.times[-1]:g}" if result.settings.times else ""
    return Table(f"Data sets by risk; predictions{time}; intervals: 95 %, over batches", columns, tuple(rows))


def overlaps_table(result: Curvature) -> Table:
    """Overlap scores of fine-tuned models beside those of random changes."""
    columns = heads(
        "model",
        Head("norm", note="‖Δθ‖ of the covered parameters"),
        Head("score", note="sum over parameters, each alone"),
        Head("random", note="of random changes with the same norm in every parameter"),
        Head("ratio"),
        Head("joint", note="of the whole change, blocks between parameters included"),
        Head("joint random"),
        Head("joint ratio"),
        Head("predicted loss", note="half of joint, nats (Proposition 3.3)"),
    )
    rows = tuple(
        (
            word(model.name),
            *(
                figure(value, ".3g")
                for value in (
                    model.norm,
                    model.score,
                    model.expected,
                    model.ratio,
                    model.joint,
                    model.joint_expected,
                    model.joint_ratio,
                    model.predicted_loss,
                )
            ),
        )
        for model in result.finetuned
    )
    return Table("Overlap scores", columns, rows)


def layers_table(result: Curvature) -> Table:
    """The Fisher matrix of each layer's parameters jointly."""
    rows = tuple((word(layer.name), *_spectrum(layer)) for layer in result.layers)
    return Table("Fisher matrix by layer", heads("layer", *_SPECTRUM), rows)


def parameters_table(result: Curvature) -> Table:
    """The Fisher matrix of each parameter alone, the largest trace first, with overlap scores."""
    columns = heads("parameter", *_SPECTRUM, *(Head(f"score / random, {model.name}") for model in result.finetuned))
    ratios = [{entry.name: entry.ratio for entry in model.parameters} for model in result.finetuned]
    rows = tuple(
        (word(parameter.name), *_spectrum(parameter), *(figure(ratio.get(parameter.name), ".3g") for ratio in ratios))
        for parameter in sorted(result.parameters, key=lambda parameter: -parameter.trace)
    )
    return Table("Fisher matrix by parameter", columns, rows, folded=True)


_SPECTRUM = (
    Head("entries"),
    Head("trace"),
    Head("d"),
    Head("λ", note="the d-th eigenvalue"),
    Head("tail", note="sum of the eigenvalues beyond d"),
    Head("participation", note="(Σμ)²/Σμ²"),
    Head("largest"),
)


def _spectrum(fisher: Fisher) -> tuple[Cell, ...]:
    largest = fisher.eigenvalues[0] if fisher.eigenvalues else None
    numbers = (fisher.smallest, fisher.tail, fisher.effective.participation, largest)
    return (count(fisher.parameters), figure(fisher.trace, ".3g"), count(fisher.d), *(figure(value, ".3g") for value in numbers))


def _value(estimate: Estimate | None, form: str = ".3g") -> Cell:
    return figure(None if estimate is None else estimate.value, form)


def _ends(estimate: Estimate | None) -> tuple[Cell, Cell]:
    low, high = (None, None) if estimate is None or estimate.interval is None else estimate.interval
    return figure(low, ".3g"), figure(high, ".3g")
