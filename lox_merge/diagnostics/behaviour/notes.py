"""What limits the numbers of one run, in sentences that tables, pages and JSON share."""

from __future__ import annotations

from lox_merge.diagnostics.behaviour.results import ALIGNED, Behaviour


def notes_of(result: Behaviour) -> list[str]:
    """Of what was found in this run only; what no run shows is the page's to say."""
    notes = []
    sizes = result.settings["vocabularies"]
    if len(set(sizes.values())) > 1:
        shared = result.settings["vocabulary"]
        notes.append(f"The models score different numbers of tokens; all distributions are over the first {shared:,}, renormalised.")
    for found in result.sets:
        name = found.data.name
        if len(found.tokens) == 1:
            notes.append(f"{name} is a single text: no intervals over texts.")
        if not found.shifts[ALIGNED].budget:
            notes.append(f"{name}: aligned and base expect the same everywhere, so there is no KL to share out and nothing to revert to.")
        for label, reversion in found.reversions.items():
            if reversion.identical:
                notes.append(f"{name}: {label} gives every token exactly the probability that aligned gives it. Are they the same weights?")
            elif reversion.undefined:
                notes.append(f"{name}, {label}: {reversion.undefined} of {len(found.tokens)} texts have no reversion index.")
    if any(reversion.undefined for found in result.sets for reversion in found.reversions.values()):
        notes.append(f"The reversion index is {result.settings['reversion_rule']}.")
    low = sorted({dtype for dtype in result.settings["dtypes"].values() if dtype in ("bfloat16", "float16")})
    if low:
        notes.append(f"Models ran in {' and '.join(low)}, whose scores are rounded; --dtype float32 shows how much of a small KL is that.")
    return notes
