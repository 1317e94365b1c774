"""The tables of compared hidden states."""

from __future__ import annotations

from lox_merge.publish.documents.activations import ALIGNED, BASE, Activations
from lox_merge.publish.documents.shape import Interval
from lox_merge.publish.report.section import Cell, Head, Table, count, figure, heads, word, words_head


def separations_table(result: Activations) -> Table:
    """How far apart base and aligned are along the direction of each layer."""
    columns = heads(
        "domain",
        Head("layer"),
        Head("separation", note="mean projection of aligned minus that of base, on the responses that the direction was made of"),
        *("low", "high"),
        Head("cross-validated", note="on responses that the direction was not made of"),
        *("low ", "high "),
        Head("labels swapped", note="separation if a coin had swapped base and aligned in each response, root mean square"),
        Head("random direction", note="root mean square"),
    )
    rows = [
        (
            *(word(domain.name), count(layer.layer), figure(layer.separation.value, ".3g"), *_ends(layer.separation.interval)),
            *(figure(layer.cross_validated.value, ".3g"), *_ends(layer.cross_validated.interval)),
            *(figure(layer.swapped, ".3g"), figure(layer.random, ".3g")),
        )
        for domain in result.domains
        for layer in domain.layers
    ]
    return Table("Separation along the alignment direction", columns, tuple(rows))


def positions_table(result: Activations) -> Table:
    """Where every model lies between base and aligned."""
    columns = heads(
        "domain",
        words_head("model"),
        Head("layer"),
        Head("projection", note="mean scalar projection on the direction, in units of the hidden states"),
        Head("position", note="(s − s of base)/(s of aligned − s of base)"),
        *("low", "high"),
        Head("cross-validated", note="the same on responses that the direction was not made of"),
        *("low ", "high "),
        Head("off the line", note="distance of the mean states from the line through base and aligned, in units of their distance"),
    )
    rows = [
        (
            *(word(domain.name), word(name), count(layer.layer), figure(found.projection.value, ".3g")),
            *(figure(found.position.value, ".2f"), *_ends(found.position.interval, ".2f")),
            *(figure(found.cross_validated.value, ".2f"), *_ends(found.cross_validated.interval, ".2f")),
            figure(found.off_line, ".2f"),
        )
        for domain in result.domains
        for name in (*result.others, BASE, ALIGNED)
        for layer in domain.layers
        for found in (layer.models[name],)
    ]
    return Table("Positions between base and aligned", columns, tuple(rows), folded=True)


def residuals_table(result: Activations) -> Table:
    """What alignment changed at the last layer, domain by domain."""
    columns = heads(
        "domain",
        Head("responses"),
        Head("first", note="share of ‖R‖² in the first direction"),
        "second",
        Head("mean alone", note="share of ‖R‖² in the mean difference"),
        Head("|cos| with mean", note="of the first direction"),
        Head("first, centred", note="share in the first direction of R minus its mean"),
    )
    rows = []
    for domain in result.domains:
        found = domain.residual
        shares, centred = [*found.shares, None, None], [*found.centred_shares, None]
        values = (shares[0], shares[1], found.mean_share, found.mean_cosine, centred[0])
        rows.append((word(domain.name), count(domain.examples), *(figure(value) for value in values)))
    return Table("Residuals aligned − base at the last layer", columns, tuple(rows))


def agreements_table(result: Activations) -> Table:
    """First directions of every two domains."""
    columns = heads(
        "domain",
        words_head("and"),
        words_head("rows"),
        "|cos|",
        Head("shuffled", note="mean when rows are shuffled between the domains"),
        Head("95 %", note="quantile of the same"),
        Head("p, as little", note="how often shuffled domains agree as little, (1 + count)/(1 + draws)"),
        Head("p, as much", note="or as much"),
        Head("random", note="mean of two random directions"),
        Head("random 95 %"),
        Head("p, random", note="how often a random direction would agree as much"),
    )
    rows = [
        (
            *(word(pair.first), word(pair.second), word(kind), figure(found.first), figure(found.permuted_mean), figure(found.permuted_95)),
            *(figure(found.p_less), figure(found.p_more), figure(found.random_mean), figure(found.random_95), figure(found.p_random, ".2g")),
        )
        for pair in result.pairs
        for kind, found in (("as they are", pair.uncentred), ("centred", pair.centred))
    ]
    return Table("Agreement of first directions", columns, tuple(rows))


def overlaps_table(result: Activations) -> Table:
    """Overlaps of prompt sets at every layer and η."""
    columns = heads(
        "sets",
        words_head("model"),
        words_head("states"),
        Head("layer"),
        Head("η"),
        Head("MSO"),
        Head("expected", note="of random subspaces of as many directions"),
        Head("directions", note="of the first set"),
        Head("of the second"),
        Head("half of first", note="MSO of two random halves of the first set"),
        Head("half of second"),
    )
    rows = [
        (
            *(word(f"{one.first} / {one.second}"), word(one.model), word(kind), count(one.layer), figure(point.eta, "g")),
            *(figure(point.mso), figure(point.expected), *(count(number) for number in point.counts or (None, None))),
            *(figure(half) for half in point.halves),
        )
        for one in result.overlaps
        for kind, curve in (("as they are", one.uncentred), ("centred", one.centred))
        for point in curve
    ]
    return Table("Overlaps of prompt sets", columns, tuple(rows), folded=True)


def _ends(ends: Interval | None, form: str = ".3g") -> tuple[Cell, Cell]:
    low, high = ends or (None, None)
    return figure(low, form), figure(high, form)
