"""What is known of a model before its weights are loaded: tokenizer, how many tokens it scores, how many it can see."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig

from lox_merge.checkpoint.adapter import AdaptedCheckpoint
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.errors import SourceError
from lox_merge.safety.automatic import load_tokenizer
from lox_merge.safety.loading import LoadedModel
from lox_merge.safety.vocabulary import output_size


@dataclass(frozen=True)
class Outline:
    """vocabulary: token numbers that are scored. context: tokens that can be read, None where the config names no limit.

    layers: how many blocks. width: of a hidden state.
    """

    tokenizer: Any = field(repr=False)
    vocabulary: int
    context: int | None
    layers: int
    width: int


def outline(model: Checkpoint | LoadedModel, *, trust_remote_code: bool = False) -> Outline:
    """Of a checkpoint, from its small files only (on the Hub they are fetched); of a model in memory, from itself. Raises SourceError."""
    if isinstance(model, LoadedModel):
        return Outline(model.tokenizer, output_size(model.model), *_sizes(model.model.config))
    model.fetch(model.side_files())
    if "config.json" not in model.source.names():
        raise SourceError(f"{model.title} has no config.json, so it cannot be run. Give a checkpoint that transformers can load.")
    own = isinstance(model, AdaptedCheckpoint) and "tokenizer_config.json" in model.source.names()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(model.source.path("config.json").parent, **options)
        tokenizer = load_tokenizer(model.source.path("tokenizer_config.json" if own else "config.json").parent, **options)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        raise SourceError(f"{model.title}: its config or tokenizer cannot be loaded by transformers: {error}") from error
    # Weights of another size than the config says are refused when they are loaded.
    return Outline(tokenizer, int(config.get_text_config().vocab_size), *_sizes(config))


def _sizes(config: Any) -> tuple[int | None, int, int]:
    """Context, layers and width."""
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None)
    return None if found is None else int(found), int(text.num_hidden_layers), int(text.hidden_size)
