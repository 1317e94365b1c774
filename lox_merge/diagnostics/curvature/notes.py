"""Sentences that a table and a page put beside the figures of one measurement."""

from __future__ import annotations

from collections import Counter
from typing import Any


def notes(record: dict[str, Any]) -> list[str]:
    """What was left out or chosen, and what the figures do not mean."""
    found = []
    if record["left_out"]:
        reasons = Counter(record["left_out"].values())
        found.append("left out: " + "; ".join(f"{count} parameter{'s' * (count > 1)} ({reason})" for reason, count in reasons.items()))
    found += sorted({text for data in record["data"] for text in data["kernels"]})
    if record["fisher"]["d"] is None:
        found.append("every gradient is zero: the completions tell nothing about these parameters")
    if record["data"]:
        found.append(
            "predictions hold for gradient flow from these weights, t = learning rate × steps of plain gradient descent, while t is small; "
            "Adam's steps are longer by far"
        )
        first = [data["name"] for data in record["data"] if data["second_order_from"] and data["second_order_from"] > record["settings"]["times"][-1]]
        if first:
            found.append(
                f"for {', '.join(first)} the first-order overlap outweighs the coupling up to the last t: the condition's initial "
                "orthogonality does not hold there, and the second-order loss is the figure to read"
            )
    return found
