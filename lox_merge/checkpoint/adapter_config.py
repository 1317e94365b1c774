"""adapter_config.json of a PEFT LoRA adapter: what of it decides weights, and refusal of what is no plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any

from lox_merge.checkpoint.patterns import compile_pattern, found
from lox_merge.errors import SourceError

CONFIG = "adapter_config.json"
# Settings of training, of loading, or of how PEFT finds modules: the stored matrices say what they came to.
_WITHOUT_EFFECT = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "fan_in_fan_out", "target_modules"),
    *("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config"),
    *("runtime_config", "qalora_group_size", "revision", "base_model_name_or_path", "ensure_weight_tying", "target_parameters"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"),
}
# Other ways to start from change the base model's own weights, and with them the meaning of the factors.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_NAMES = {
    "use_dora": "DoRA (weights scaled by learnt magnitudes)",
    "lora_bias": "biases inside the LoRA layers",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activation by invocation tokens (aLoRA)",
    "trainable_token_indices": "trainable token rows",
    "megatron_config": "a Megatron model",
}


@dataclass(frozen=True)
class AdapterConfig:
    """base: the model that the adapter names, None where it names none. Ranks and factors by module, as PEFT resolves them."""

    base: str | None
    rank: int
    alpha: float
    rank_stabilised: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_parameters: tuple[str, ...]

    def rank_of(self, name: str) -> int:
        """r of a module, or of a parameter that is targeted by itself."""
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, name), self.rank)

    def scale_of(self, name: str) -> float:
        """The factor of B·A: alpha/r, or alpha/√r (rsLoRA, arXiv 2312.03732)."""
        rank = self.rank_of(name)
        alpha = self.alpha_pattern.get(_pattern_of(self.alpha_pattern, name), self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _pattern_of(patterns: Mapping[str, Any], name: str) -> str:
    """The first pattern that matches as PEFT matches (peft.utils.other.get_pattern_key): at the end of the name, after a dot."""
    try:
        return next((pattern for pattern in patterns if found(compile_pattern(rf"(.*\.)?({pattern})$"), name, at_start=True)), "")
    except ValueError as error:
        raise SourceError(f"{CONFIG}: {error}. Save the adapter again with peft.") from None


def read_config(values: Mapping[str, Any], where: str) -> AdapterConfig:
    """Raises SourceError naming every setting that makes it something else than W + scale · B·A."""
    kind = str(values.get("peft_type"))
    if kind != "LORA":
        raise SourceError(f"{where} is a PEFT adapter of type {kind}; only LORA is read. Merge it with peft (merge_and_unload) and give that model.")
    wrong = [
        f"{_NAMES.get(key, key)} ({key})" for key, value in values.items() if key not in _WITHOUT_EFFECT and value not in (None, False, {}, [], "")
    ]
    if values.get("bias", "none") != "none":
        wrong.append(f"trained biases (bias {values['bias']!r})")
    start = values.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        wrong.append(f"a start that changes the base weights (init_lora_weights {start!r})")
    if wrong:
        raise SourceError(
            f"{where} is more than a plain LoRA: {'; '.join(wrong)}. What that does to the weights is not known here, and nothing of an "
            "adapter is left out. Merge it with peft (merge_and_unload) and give that model."
        )
    try:
        config = AdapterConfig(
            base=_text(values.get("base_model_name_or_path")) or None,
            rank=int(values.get("r", 8)),
            alpha=float(values.get("lora_alpha", 8)),
            rank_stabilised=bool(values.get("use_rslora")),
            rank_pattern={str(key): int(rank) for key, rank in (values.get("rank_pattern") or {}).items()},
            alpha_pattern={str(key): float(alpha) for key, alpha in (values.get("alpha_pattern") or {}).items()},
            target_parameters=tuple(map(_text, values.get("target_parameters") or ())),
        )
        for pattern in (*config.rank_pattern, *config.alpha_pattern):
            compile_pattern(pattern)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise SourceError(f"{where} cannot be understood: {error}. Save the adapter again with peft.") from None
    ranks, alphas = (config.rank, *config.rank_pattern.values()), (config.alpha, *config.alpha_pattern.values())
    if min(ranks) < 1 or not all(math.isfinite(alpha) for alpha in alphas):
        raise SourceError(f"{where} has a rank below 1 or a lora_alpha that is no finite number. Save the adapter again with peft.")
    if min(alphas) < 0:
        raise SourceError(
            f"{where} has a lora_alpha below 0: it takes away what was trained, and an edit along that would take away more. "
            "Give the adapter as training wrote it."
        )
    return config


def _text(value: Any) -> str:
    if not isinstance(value, (str, NoneType)):
        raise TypeError(f"{value!r} stands where a text belongs")
    return value or ""
