"""A quantised checkpoint as a plain model in memory: the weights that its codes and scales stand for, rounded once to the model's dtype."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from lox_merge.checkpoint.quantised.view import QuantisedCheckpoint


@dataclass(frozen=True)
class _Decoded:
    """One tensor, decoded when transformers slices it, as it does with tensors in files: a whole model in float32 need not fit."""

    checkpoint: QuantisedCheckpoint
    name: str

    def __getitem__(self, index: Any) -> Tensor:
        return self.checkpoint.tensor(self.name)[index]


def load_decoded(
    checkpoint: QuantisedCheckpoint, folder: Path, auto: Any, *, dtype: torch.dtype | None, remote: dict[str, Any], **settings: Any
) -> tuple[Any, Any]:
    """The model and transformers' report of what it loaded. folder: of the checkpoint's configuration, on this machine.
    auto: transformers' class that loads it, see `automatic.auto_class`.

    dtype: None takes that of the configuration, bfloat16 where it names none. remote: whether code of the checkpoint may run, as from_pretrained
    takes it. settings: of `from_pretrained`. Weights are this program's own reading: no kernel for the quantised form is needed, and edits that
    are computed from the checkpoint belong to just these weights.
    """
    config = AutoConfig.from_pretrained(folder, **remote)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with torch.device("meta"):
        kind = type(auto.from_config(config, trust_remote_code=remote["trust_remote_code"]))
    chosen = dtype or getattr(config, "dtype", None) or torch.bfloat16
    state = {name: _Decoded(checkpoint, name) for name in checkpoint.names}
    model, report = kind.from_pretrained(None, config=config, state_dict=state, dtype=chosen, output_loading_info=True, **settings)
    if "generation_config.json" in checkpoint.source.names():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, report
