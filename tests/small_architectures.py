"""Every model that generates text and that the installed transformers knows, with few random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from small_configurations import AXES, BY_HAND, SMALL, SMALLER
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

_LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
# Latent attention: keys of its own for every query, and a head is as wide as what is rotated of it.
_LATENT = {"num_key_value_heads": SMALL["num_attention_heads"], "head_dim": SMALL["qk_rope_head_dim"]}
_LARGEST = 30_000_000

# By transformers' auto class. Many models of several kinds of input are in more than one.
KINDS = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "multimodal": ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    "image-text": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "encoder-decoder": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "speech": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
}


class NotBuilt(Exception):
    """transformers does not make this model from a small configuration."""


@dataclass(frozen=True)
class Architecture:
    """One class of transformers. name: its model_type. kind: of KINDS."""

    name: str
    kind: str = "causal"

    @property
    def auto(self) -> Any:
        """The class that loads it: AutoModelForCausalLM and its like."""
        return getattr(transformers, KINDS[self.kind][0])

    def model_class(self, config: Any) -> Any:
        kind = self.auto._model_mapping[type(config)]
        return kind[0] if isinstance(kind, tuple) else kind


def architectures(kinds: tuple[str, ...] = tuple(KINDS)) -> list[Architecture]:
    """All of these kinds; what an earlier kind has is not counted again under a later one."""
    found: dict[tuple[str, str], Architecture] = {}
    for kind in kinds:
        earlier = {one for _, one in found}
        for name, classes in sorted(getattr(modeling_auto, KINDS[kind][1]).items()):
            one = classes if isinstance(classes, str) else classes[0]
            if one not in earlier:
                found[name, one] = Architecture(name, kind)
    return list(found.values())


def small_model(architecture: Architecture) -> Any:
    """In bfloat16, in training mode: of what can be built, that with the fewest parameters. Raises NotBuilt with the first reason."""
    reasons, sizes, configs = [], [], []
    by_hand = architecture.name in BY_HAND
    for shrunk in (_by_hand, _text_by_hand) if by_hand else (_by_attributes, _by_arguments, _by_dictionary, _text_alone):
        if by_hand and sizes:
            break
        try:
            config = shrunk(architecture.name)
            with torch.device("meta"):
                sizes.append(sum(parameter.numel() for parameter in architecture.model_class(config)(config).parameters()))
            configs.append(config)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0][:120])
    if not sizes:
        raise NotBuilt(reasons[0])
    if min(sizes) > _LARGEST:
        raise NotBuilt(f"{min(sizes) / 1e6:.0f}M parameters at its smallest")
    config = configs[sizes.index(min(sizes))]
    torch.manual_seed(0)
    return architecture.model_class(config)(config).to(torch.bfloat16)


def _by_hand(name: str) -> Any:
    return CONFIG_MAPPING[name](**BY_HAND[name])


def _text_by_hand(name: str) -> Any:
    return _by_hand(name).get_text_config()


def _by_attributes(name: str) -> Any:
    config = CONFIG_MAPPING[name]()
    for part in _parts(config):
        for size, value in SMALL.items():
            known = _known(part, size)
            if isinstance(known, int) and not isinstance(known, bool):
                setattr(part, size, value)
        if isinstance(_known(part, "kv_lora_rank"), int):
            for size, value in _LATENT.items():
                if _known(part, size) is not None:
                    setattr(part, size, value)
        rope = _known(part, "rope_parameters")
        if isinstance(rope, dict) and "mrope_section" in rope:
            rope["mrope_section"] = [2, 3, 3]  # half a head of 16
        for size in _LAYER_KINDS:
            known = _known(part, size)
            if isinstance(known, (list, tuple)) and len(known) > 4:
                setattr(part, size, (list(dict.fromkeys(known)) * 4)[:4])
    return config


def _by_arguments(name: str) -> Any:
    known = CONFIG_MAPPING[name]().to_dict()
    return CONFIG_MAPPING[name](**{size: value for size, value in SMALL.items() if isinstance(known.get(size), int)})


def _by_dictionary(name: str) -> Any:
    kind = CONFIG_MAPPING[name]
    config = _smaller(kind().to_dict())
    if name in AXES:
        text = config.get("text_config", config)
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": list(AXES[name])}
    return kind.from_dict(config)


def _smaller(config: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            small[name] = _smaller(value)
        elif name == "mrope_section":
            small[name] = [2, 3, 3]  # half a head of 16
        elif name in SMALLER and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(value, SMALLER[name])
        elif name in _LAYER_KINDS and isinstance(value, list) and len(value) > 4:
            small[name] = (list(dict.fromkeys(value)) * 4)[:4]
        else:
            small[name] = value
    return small | {name: value for name, value in _LATENT.items() if "kv_lora_rank" in small and name in small}


def _text_alone(name: str) -> Any:
    return _by_attributes(name).get_text_config()


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in ("text_config", "vision_config", "audio_config", "attn_config", "ffn_config"):
        part = _known(config, name)
        if hasattr(part, "to_dict"):
            yield part


def _known(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some have one value a layer, and say so by an exception of their own
        return None
