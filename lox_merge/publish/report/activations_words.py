"""What measured hidden states do not show, which tables on a terminal and pages share."""

from __future__ import annotations

NOT_SHOWN = (
    "The alignment direction is made of the responses that are projected on it, so aligned lies beyond base along it by construction; only the "
    "cross-validated figures are on responses it was not made of. Along it aligned differs from base, not safe from unsafe: compare with harmless "
    "pairs (another --pairs FILE).",
    "A position between 0 and 1 says nothing of what else the model did: read it beside the distance off the line, and measure behaviour "
    "(lox-merge asr). Responses are given, not what the models would say.",
    "Hidden states share a large mean: without centring, the first direction of a residual or a prompt set is nearly that mean, and overlaps are "
    "usually high for any two sets. The random expectation is far below what two halves of one set have; read the overlap between both.",
)
