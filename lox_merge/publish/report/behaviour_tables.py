"""The tables of compared expectations."""

from __future__ import annotations

from lox_merge.publish.documents.behaviour import ALIGNED, BASE, Behaviour
from lox_merge.publish.documents.shape import Interval
from lox_merge.publish.report.section import Cell, Head, Table, count, figure, heads, interval, rate, word, words_head


def shares_table(result: Behaviour) -> Table:
    """Share of the KL budget in the first tokens, of every set and model."""
    columns = heads(
        "texts",
        words_head("model"),
        Head("first tokens"),
        Head("share", note="of Σ_t of the mean KL from base at token t"),
        "low",
        "high",
        Head("even", note="what the share would be, were KL the same at every token"),
        Head("per text", note="mean of the shares of single texts"),
        Head("per text, even", note="its expectation, were KL the same at every token"),
    )
    rows = [
        (
            *(word(found.name), word(name), count(share.first), rate(share.share), *interval(share.interval), rate(share.even)),
            *(rate(share.per_text), rate(share.per_text_even)),
        )
        for found in result.sets
        for name, shift in found.kl_from_base.items()
        for share in shift.shares
    ]
    return Table("KL budget in the first tokens", columns, tuple(rows))


def likelihoods_table(result: Behaviour) -> Table:
    """Log-probability of the texts under every model."""
    columns = heads(
        "texts", words_head("model"), Head("log p", note="mean over texts of their joint log-probability, nats"), "low", "high", "per token"
    )
    rows = [
        (word(found.name), word(name), figure(one.joint, ".4g"), *_ends(one.interval, ".4g"), figure(one.per_token))
        for found in result.sets
        for name, one in found.log_probabilities.items()
    ]
    return Table("Log-probability of the texts", columns, tuple(rows))


def reversions_table(result: Behaviour) -> Table:
    """Where every model lies between aligned and base."""
    columns = heads(
        "texts",
        words_head("model"),
        Head("reversion", note="Σ (log p aligned − log p model) / Σ (log p aligned − log p base); 0 as aligned, 1 as base"),
        "low",
        "high",
        Head("median", note="of the indices of single texts"),
        Head("low ", note="of the median's interval"),
        Head("high ", note="of the median's interval"),
        Head("outside", note="texts with an index below 0 or above 1"),
        Head("undefined", note="texts on which aligned and base hardly differ"),
        Head("moved", note="log p minus that under aligned, nats a text"),
        Head("base moved", note="the same of base"),
    )
    rows = [
        (
            *(word(found.name), word(name), figure(one.index, ".2f"), *_ends(one.interval, ".2f")),
            *(figure(one.median, ".2f"), *_ends(one.median_interval, ".2f"), count(one.outside), count(one.undefined)),
            *(figure(0.0 - one.moved, "+.3g"), figure(0.0 - one.gap, "+.3g")),
        )
        for found in result.sets
        for name, one in found.reversion.items()
    ]
    return Table("Reversion", columns, tuple(rows))


def positions_table(result: Behaviour) -> Table:
    """KL and entropy at every token."""
    columns = heads(
        "texts",
        words_head("model"),
        Head("token"),
        Head("texts that long"),
        Head("KL", note="from base, nats, mean"),
        "low",
        "high",
        Head("entropy", note="of the model there, nats"),
    )
    rows = [
        (word(found.name), word(name), count(one.t), count(one.n), figure(one.kl), *_ends(one.interval), figure(one.entropy))
        for found in result.sets
        for name, shift in found.kl_from_base.items()
        for one in shift.positions
    ]
    return Table("KL by token", columns, tuple(rows), folded=True)


def distances_table(result: Behaviour) -> Table:
    """Entropy and distances of the next-token distributions."""
    columns = heads(
        "beginning",
        words_head("model"),
        Head("entropy", note="nats"),
        Head("to aligned", note="Jensen–Shannon distance, natural logarithm, at most 0.833"),
        "to base",
        Head("reversion", note="distance to aligned over the sum of both"),
        Head("detour", note="their sum over the distance of aligned and base; far above 1: neither"),
    )
    base, aligned = result.models.index(BASE), result.models.index(ALIGNED)
    rows = []
    for found in result.next_tokens:
        for name, row in zip(result.models, found.distances, strict=True):
            between = found.between.get(name)
            last = (Cell("–"), Cell("–")) if between is None else (figure(between.index, ".2f"), figure(between.detour, ".2f"))
            rows.append((word(found.prefix.words), word(name), figure(found.entropies[name]), figure(row[aligned]), figure(row[base]), *last))
    return Table("Next-token distributions", columns, tuple(rows))


def _ends(ends: Interval | None, form: str = ".3f") -> tuple[Cell, Cell]:
    low, high = ends or (None, None)
    return figure(low, form), figure(high, form)
