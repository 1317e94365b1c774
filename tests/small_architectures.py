"""Every model that generates text and that the installed transformers knows, with few random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

# Whatever a configuration calls its sizes. Every name stands for one number in all architectures.
SMALL = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 64)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), 96)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("num_key_value_heads", "num_shared_experts", "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1)
    | dict.fromkeys(("num_experts_per_tok", "moe_topk", "linear_num_key_heads"), 2)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads"), 4)
    | dict.fromkeys(("head_dim", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "hidden_size_per_layer_input"), 16)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16)
    | dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "state_size", "mamba_d_state", "time_step_rank"), 8)
    | {"vocab_size": 96, "vocab_size_per_layer_input": 96, "expand": 2, "mamba_n_heads": 4, "mamba_d_head": 32, "sliding_window": 32, "lru_width": 64}
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128)
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
)
# Those of encoders and decoders, of sight and hearing: only where configurations lie inside one another.
SMALLER = (
    SMALL
    | dict.fromkeys(("embed_dim", "hidden_dim", "out_hidden_size", "projection_dim", "encoder_hidden_size", "output_dim", "decoder_dim"), 64)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "encoder_intermediate_size", "mlp_dim", "decoder_hidden_size"), 96)
    | dict.fromkeys(("depth", "encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_encoder_layers", "num_decoder_layers"), 2)
    | dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads", "num_cross_attention_heads"), 4)
    | dict.fromkeys(("encoder_num_key_value_heads", "decoder_num_key_value_heads"), 4)
)
_DENSE = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")}
_DENSE |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SPARSE = _DENSE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
# Where numbers depend on one another.
BY_HAND: dict[str, dict[str, Any]] = {
    "dbrx": {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128, "vocab_size": 96, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}}
    | {"ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}, "bos_token_id": 1, "eos_token_id": 2},
    "diffllama": _DENSE,
    "dots1": _DENSE
    | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_group": 1}
    | {"topk_group": 1, "first_k_dense_replace": 1},
    "falcon_h1": _DENSE | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    "gemma3n_text": _DENSE
    | {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "laurel_rank": 8}
    | {"intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": _DENSE | {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "global_head_dim": 16},
    "gpt_neo": {"vocab_size": 96, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]}
    | {"max_position_embeddings": 128, "window_size": 32, "bos_token_id": 1, "eos_token_id": 2},
    "hunyuan_v1_dense": _DENSE,
    "hunyuan_v1_moe": _DENSE | {"num_experts": 4, "moe_topk": 2},
    "laguna": _SPARSE | {"num_attention_heads_per_layer": [4] * 4},
    "lfm2_moe": _SPARSE | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 1}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "ministral": _DENSE,
    "nemotron": _DENSE,
    "zaya": _DENSE,
}
_LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
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
    for shrunk in (_by_hand,) if architecture.name in BY_HAND else (_by_attributes, _by_arguments, _by_dictionary, _text_alone):
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


def _by_attributes(name: str) -> Any:
    config = CONFIG_MAPPING[name]()
    for part in _parts(config):
        for size, value in SMALL.items():
            known = _known(part, size)
            if isinstance(known, int) and not isinstance(known, bool):
                setattr(part, size, value)
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
    return kind.from_dict(_smaller(kind().to_dict()))


def _smaller(config: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            small[name] = _smaller(value)
        elif name in SMALLER and isinstance(value, int) and not isinstance(value, bool):
            small[name] = min(value, SMALLER[name])
        elif name in _LAYER_KINDS and isinstance(value, list) and len(value) > 4:
            small[name] = (list(dict.fromkeys(value)) * 4)[:4]
        else:
            small[name] = value
    return small


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
