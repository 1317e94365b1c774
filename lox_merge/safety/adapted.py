"""A model in memory that is a base checkpoint with a PEFT adapter merged into it, tensor by tensor; nothing is written."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer

from lox_merge.checkpoint.adapter import AdaptedCheckpoint
from lox_merge.errors import RequestError
from lox_merge.safety.loading import LoadedModel, load_model
from lox_merge.safety.placement import place


@torch.no_grad()
def load_adapted(adapted: AdaptedCheckpoint, **settings: Any) -> LoadedModel:
    """base + adapter, each changed tensor rounded once to the model's dtype. settings: those of `load_model`.

    The tokenizer is the adapter's where it brings one. Raises RequestError for a changed tensor that the model has no use for.
    """
    base, source = adapted.base, adapted.source
    base.fetch([*base.headers, *base.side_files()])
    loaded = load_model(base.source.path("config.json").parent, **settings)
    groups, unused = place(loaded.model, adapted.names)
    lost = [name for name in unused if name in adapted.changes]
    if lost:
        raise RequestError(f"{adapted.title} changes {lost[0]}, which has no place in {type(loaded.model).__name__}. Merge it with peft first.")
    state = loaded.model.state_dict()
    for group in groups:
        if any(name in adapted.changes for name, _ in group.sources):
            for name, value in group.parameters(adapted.tensor, loaded.model).items():
                state[name].copy_(value)
    tokenizer = loaded.tokenizer
    own = [name for name in source.names() if name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template"))]
    if "tokenizer_config.json" in adapted.own.source.names():
        source.fetch(own)
        tokenizer = AutoTokenizer.from_pretrained(
            source.path("tokenizer_config.json").parent, local_files_only=True, trust_remote_code=bool(settings.get("trust_remote_code"))
        )
    return LoadedModel(loaded.model, tokenizer, adapted.title, source.identity())
