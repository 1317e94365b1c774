"""The section of two framings of the same completions."""

from __future__ import annotations

from typing import Any

from lox_merge.publish.documents.framing import Framing, Mean, ModelCosines
from lox_merge.publish.documents.shape import read_as
from lox_merge.publish.figures.framing import draw_framing, draw_pairs
from lox_merge.publish.report.notes import FRAMING_NOT_SHOWN
from lox_merge.publish.report.numbers import UNDEFINED, counted, number
from lox_merge.publish.report.section import Cell, Head, Picture, Section, Table, count, figure, heads, name_of, panel, word


def framing_sections(document: dict[str, Any], name: str) -> list[Section]:
    """Cosines of losses and gradients, every model beside chance. Raises RequestError."""
    result = read_as(Framing, document, name)
    first, pairs = result.models[0], len(result.models[0].pairs)
    summary = (
        f"Under {result.data['first'].name} and {result.data['second'].name}, gradients of {result.weights_words} for the same completion have a "
        f"mean cosine of {mean_words(first.gradient)} in {first.model}."
    )
    words = (*(_at(model) for model in result.models), *result.notes)
    caption = (
        "Whiskers: bootstrap 95 % intervals over pairs. Grey crosses: the same losses in random order; losses are not negative, so this is far "
        "above 0. Diamonds: gradients of different completions under the two framings."
    )
    pictures = [panel("framing", "Cosines between the two framings", caption, draw_framing, result, width=5.4)]
    pictures += [_scatter(model) for model in result.models if len(model.pairs) > 1]
    details = (
        *((f"{place} data", f"{data.source}, {counted(data.examples, 'row')} (sha256 {data.sha256[:12]})") for place, data in result.data.items()),
        ("pairs", f"{pairs:,}, by {result.settings.matching}"),
        ("weights", ", ".join(first.weights[:8]) + (" …" if len(first.weights) > 8 else "")),
    )
    return [Section("Framing", summary, words, FRAMING_NOT_SHOWN, tuple(pictures), (_means(result), *map(_pairs, result.models)), details)]


def mean_words(found: Mean) -> str:
    """A mean and its interval for a sentence."""
    if found.mean is None:
        return UNDEFINED
    ends = "" if found.interval is None else f" (95 % interval {number(found.interval[0])} to {number(found.interval[1])})"
    return f"{number(found.mean)}{ends}"


def _at(model: ModelCosines) -> str:
    return (
        f"{model.model}: losses {mean_words(model.loss)}, where the same losses in random order give {mean_words(model.shuffled)}; centred "
        f"{mean_words(model.centred)}, with the next completion's {mean_words(model.other_centred)}. Mean gradients of the two sets "
        f"{number(model.mean_gradient)}; random directions in {model.entries:,} "
        f"entries lie within ±{number(model.band, '.2g')}; gradients of different completions under one framing give "
        f"{mean_words(model.same_framing)}."
    )


def _scatter(model: ModelCosines) -> Picture:
    caption = "One mark a completion. Below 0: training on one framing undoes, for this completion, what training on the other does."
    return panel(name_of("pairs", model.model), f"Every completion in {model.model}", caption, draw_pairs, model)


_FIGURES = (
    ("loss", "losses of the completion's tokens"),
    ("shuffled", "the same losses in random order: what their sizes alone give"),
    ("centred", "losses minus their mean (Pearson correlation); chance is 0"),
    ("other_loss", "losses of the next, different completion, cut to the shorter one"),
    ("other_centred", "the same, centred: what places in a completion have in common"),
    ("gradient", "gradients of the same completion"),
    ("same_framing", "gradients of different completions under one framing"),
    ("other_completion", "gradients of different completions under the two framings"),
)


def _means(result: Framing) -> Table:
    columns = heads("model", Head("figure", numeric=False), "mean", "low", "high", "pairs")
    rows: list[tuple[Cell, ...]] = []
    for model in result.models:
        for name, text in _FIGURES:
            found: Mean = getattr(model, name)
            low, high = found.interval or (None, None)
            rows.append((word(model.model), word(text), figure(found.mean), figure(low), figure(high), count(found.n)))
        rows.append(
            (word(model.model), word("mean gradients of the two data sets"), figure(model.mean_gradient), *map(figure, (None, None)), count(None))
        )
    return Table("Mean cosines, bootstrap 95 % intervals over pairs", columns, tuple(rows))


def _pairs(model: ModelCosines) -> Table:
    columns = heads(
        Head("row of first"),
        "row of second",
        "tokens",
        Head("excluded", note="tokens of the completion that differ between the framings, because one spans the border"),
        Head("loss, first", note="mean of the completion's tokens, in nats"),
        "loss, second",
        "losses",
        "random order",
        "centred",
        "gradients",
    )
    ordered = sorted(model.pairs, key=lambda pair: (pair.gradient is None, pair.gradient))
    rows = [
        (
            *map(count, (*pair.rows, pair.tokens, pair.excluded)),
            *map(figure, (*pair.mean_losses, pair.loss, pair.shuffled, pair.centred, pair.gradient)),
        )
        for pair in ordered
    ]
    return Table(f"Cosines of every completion in {model.model}, the most opposed gradients first", columns, tuple(rows), folded=True)
