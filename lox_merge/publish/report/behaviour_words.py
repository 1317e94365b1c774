"""What measured expectations do not show, which tables on a terminal and pages share."""

from __future__ import annotations

NOT_SHOWN = (
    "KL says that aligned differs from base there, not that safety is what differs; it is over given responses, not over what a model would say "
    "itself. Compare with harmless pairs (another --pairs FILE).",
    "A reversion index says how probable a text became, not what the model now does (lox-merge asr). A model that only changed its style moves "
    "too: where it moved as far on harmless texts, that is the likelier cause. Below 0 or above 1 it lies beyond aligned or base.",
)
