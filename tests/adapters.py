"""PEFT adapters over tiny models: made, loaded and merged by peft itself."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tiny_models import tokenizer

TARGETS: dict[str, dict[str, Any]] = {
    "llama": {
        "target_modules": ["q_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"],
        "use_rslora": True,
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"o_proj": 5},
    },
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "modules_to_save": ["ln_f"]},
    "qwen3": {"target_modules": "all-linear", "modules_to_save": ["norm"]},
    "gemma": {"target_modules": ["q_proj", "gate_proj"]},
    "mixtral": {
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "gate.weight"],
        "rank_pattern": {"experts.down_proj": 2},
    },
    "qwen3_moe": {"target_modules": ["v_proj"], "target_parameters": ["experts.down_proj"]},
    "gpt_oss": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "llava": {"target_modules": "all-linear"},
}


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a checkpoint folder, by the class that its config names."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, kind).from_pretrained(folder, dtype=dtype)


def make_adapter(base: Path, out: Path, *, chat: bool = True, change: Callable[[Any], None] | None = None, **settings: Any) -> Path:
    """A LoRA adapter over `base` with random factors, saved by peft. chat: with a tokenizer that has a chat template."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model = peft.get_peft_model(load_model(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 7, **settings}))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
            elif "modules_to_save" in name:
                parameter.data += 0.3
        if change:
            change(model)
        model.save_pretrained(out)
    if chat:
        words = tokenizer()
        words.chat_template = "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} {% endfor %}"
        words.save_pretrained(out)
    return out


def load_adapter(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """base with the adapter on it, not merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(load_model(base, dtype), adapter)


def merge(base: Path, adapter: Path, out: Path | None = None, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """State of base + adapter as peft merges it; saved to `out` as transformers saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = load_adapter(base, adapter, dtype).merge_and_unload()
    if out is not None:
        merged.save_pretrained(out)
    state: dict[str, torch.Tensor] = merged.state_dict()
    return state


def edit_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
