"""A model of its own, or a PEFT adapter merged in memory into the model it lies over, tensor by tensor; nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lox_merge.checkpoint.adapter import AdaptedCheckpoint, is_adapter, open_adapter
from lox_merge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lox_merge.checkpoint.files import find_source
from lox_merge.checkpoint.quantised.view import QuantisedCheckpoint, as_quantised
from lox_merge.errors import RequestError
from lox_merge.jobs.quantised import form_of
from lox_merge.safety.automatic import load_tokenizer
from lox_merge.safety.loading import LoadedModel, load_model
from lox_merge.safety.placement import place


def open_any(
    reference: str | Path,
    role: str,
    cache_dir: Path | None = None,
    *,
    adapter_base: str | Path | Checkpoint | None = None,
    base_is_right: bool = False,
    decode: bool = False,
) -> Checkpoint:
    """A checkpoint, or an adapter over `adapter_base` (a folder, a Hub id, or one that is open already); headers only.

    base_is_right: take `adapter_base` although the adapter names another model. decode: show a quantised checkpoint as float32; what an
    adapter lies over is shown so in any case. Raises what `open_checkpoint` and `open_adapter` raise, RequestError for an adapter with
    nothing to lie over.
    """
    source = find_source(reference, role, cache_dir)
    if not is_adapter(source):
        opened = open_checkpoint(source, role)
        return as_quantised(opened) if decode else opened
    if adapter_base is None:
        raise RequestError(
            f"{role}: {source.title} is a PEFT adapter, which is no model by itself. Name the model that it lies over (--adapter-base, where the "
            "command takes it), or merge the two with peft (merge_and_unload)."
        )
    base = adapter_base if isinstance(adapter_base, Checkpoint) else open_checkpoint(adapter_base, f"{role}, adapter base", cache_dir)
    return open_adapter(source, role, as_quantised(base), base_is_right=base_is_right)


def load_any(
    reference: str | Path,
    *,
    adapter_base: str | Path | None = None,
    base_is_right: bool = False,
    cache_dir: Path | None = None,
    decode: bool = False,
    **settings: Any,
) -> LoadedModel:
    """`load_model`, or an adapter merged into `adapter_base` in memory. settings: those of `load_model`. Raises what `open_any` and that raise.

    decode: as `load_model` takes it; what an adapter lies over is decoded in any case. Models that are compared should be run alike.
    """
    if not is_adapter(find_source(reference, "model", cache_dir)):
        return load_model(reference, cache_dir=cache_dir, decode=decode, **settings)
    opened = open_any(reference, "model", cache_dir, adapter_base=adapter_base, base_is_right=base_is_right)
    assert isinstance(opened, AdaptedCheckpoint)
    try:
        return load_adapted(opened, **settings)
    finally:
        opened.close()


@torch.no_grad()
def load_adapted(adapted: AdaptedCheckpoint, **settings: Any) -> LoadedModel:
    """base + adapter, each changed tensor rounded once to the model's dtype; a quantised base as plain weights. settings: those of `load_model`.

    The tokenizer is the adapter's where it brings one. Raises RequestError for a changed tensor that the model has no use for.
    """
    base, source = adapted.base, adapted.source
    base.fetch([*base.weight_headers, *base.side_files()])
    loaded = load_model(base.source.path("config.json").parent, decode=isinstance(base, QuantisedCheckpoint), **settings)
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
        tokenizer = load_tokenizer(
            source.path("tokenizer_config.json").parent, local_files_only=True, trust_remote_code=bool(settings.get("trust_remote_code"))
        )
    return LoadedModel(loaded.model, tokenizer, adapted.title, source.identity() | form_of(adapted))
