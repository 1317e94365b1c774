"""All targets by name."""

from __future__ import annotations

from collections.abc import Callable

from fuzz import checkpoints, models, outputs, quantised, reports, texts
from fuzz.cases import Target
from fuzz.materials import Materials

TARGETS: dict[str, Callable[[Materials], Target]] = {
    "headers": checkpoints.headers,
    "indexes": checkpoints.indexes,
    "configs": checkpoints.configs,
    "quantised": quantised.quantised,
    "adapters": checkpoints.adapters,
    "factors": outputs.factors,
    "manifests": outputs.manifests,
    "working states": outputs.working_states,
    "models": models.models,
    "reports": reports.reports,
    "prompts": texts.prompts,
    "conversations": texts.conversations,
    "recipes": texts.recipes,
    "judge replies": texts.judge_replies,
    "reply stores": texts.reply_stores,
    "verdict caches": texts.verdict_caches,
}
