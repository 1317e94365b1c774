"""Tiny random checkpoints of real architectures, as `save_pretrained` writes them: a pre-trained model and an aligned one.

The aligned model differs from the base by a low-rank change with noise on every matrix and by noise on every vector. Only the
aligned model has a chat template, its own end token, and sampling settings, so a test can see whose files an output carries.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

WORDS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>", "how", "do", "i", "you", "help", "no", "yes", "sorry", "cannot")
BASE_END, ALIGNED_END = WORDS.index("</s>"), WORDS.index("<|end|>")
CHAT_TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} <|end|> {% endfor %}<|assistant|>"
INDEX = "model.safetensors.index.json"


def make_pair(
    folder: Path,
    architecture: str,
    dtype: str = "bfloat16",
    *,
    base_shards: int = 1,
    aligned_shards: int = 3,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    vocabulary: int = 96,
    aligned_vocabulary: int | None = None,
    change: float = 0.05,
    **settings: Any,
) -> tuple[Path, Path]:
    """Writes `folder`/base and `folder`/aligned and returns both paths.

    architecture: a key of CONFIGS. Shards: exactly this many files, in the order of the tensors; 1 has no index.
    aligned_vocabulary: rows of the aligned model's embedding where they differ. change: ||delta||/||W|| of each matrix.
    settings: changes to the (text) configuration, e.g. attention_bias=True or num_hidden_layers=3.
    """
    base, aligned = folder / "base", folder / "aligned"
    torch.manual_seed(seed)
    options = {"hidden": hidden, "layers": layers, "vocabulary": vocabulary}
    config = CONFIGS[architecture](options, settings)
    model = _model(architecture, config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases start as exact ones and zeros, which would hide a vector taken from the wrong model.
            parameter += 0.02 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype))
    _save(model, base, base_shards, BASE_END, chat=False)
    if aligned_vocabulary is not None:
        model.resize_token_embeddings(aligned_vocabulary, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(align(parameter.float(), change))
    _save(model, aligned, aligned_shards, ALIGNED_END, chat=True)
    return base, aligned


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder, by name, whatever its shards."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One word, one token: <unk> <s> </s> and a few more, in the order of WORDS."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def align(values: torch.Tensor, change: float) -> torch.Tensor:
    """values (..., d_out, d_in) plus a change of rank 6 with falling singular values, and noise of a tenth of its size."""
    noise = torch.randn_like(values)
    if values.ndim < 2:
        return values + 0.05 * noise
    falling = torch.tensor([1.0, 0.7, 0.5, 0.35, 0.25, 0.18])
    left = torch.randn(*values.shape[:-1], 6) * falling
    low_rank = left @ torch.randn(*values.shape[:-2], 6, values.shape[-1])
    size = change * values.norm()
    return values + low_rank * (size / low_rank.norm()) + noise * (0.1 * size / noise.norm())


def _save(model: Any, folder: Path, shards: int, end: int, *, chat: bool) -> None:
    model.config.eos_token_id = end
    # copy_from_model would keep the other model's sampling settings, so both are written out in full.
    generation = transformers.GenerationConfig(bos_token_id=1, eos_token_id=end, pad_token_id=0)
    if chat:
        generation.update(do_sample=True, temperature=0.6, top_p=0.9)
    model.generation_config = generation
    model.save_pretrained(folder)
    split(folder, shards)
    words = tokenizer()
    if chat:
        words.eos_token = "<|end|>"
        words.chat_template = CHAT_TEMPLATE
    words.save_pretrained(folder)


def split(folder: Path, shards: int) -> None:
    """Rewrites a single-file checkpoint as `shards` files and an index, tensors kept in order. 1 leaves it as it is."""
    whole = folder / "model.safetensors"
    if shards == 1:
        return
    tensors = load_file(whole)
    whole.unlink()
    names = sorted(tensors)
    places: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * number // shards : len(names) * (number + 1) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2) + "\n")


def _model(architecture: str, config: Any) -> Any:
    if architecture in ("llava", "qwen2_vl"):
        return transformers.AutoModelForImageTextToText.from_config(config)
    return transformers.AutoModelForCausalLM.from_config(config)


def _text(options: dict[str, int]) -> dict[str, Any]:
    """Grouped-query attention with 4 query and 2 key-value heads."""
    hidden = options["hidden"]
    return {
        "vocab_size": options["vocabulary"],
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": options["layers"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": BASE_END,
        "pad_token_id": 0,
    }


def _llama(options: dict[str, int], settings: dict[str, Any]) -> Any:
    return transformers.LlamaConfig(**{**_text(options), "tie_word_embeddings": False, **settings})


def _qwen3(options: dict[str, int], settings: dict[str, Any]) -> Any:
    return transformers.Qwen3Config(**{**_text(options), "head_dim": 8, "tie_word_embeddings": True, **settings})


def _gpt2(options: dict[str, int], settings: dict[str, Any]) -> Any:
    # Conv1D stores (d_in, d_out), and the embeddings are tied.
    own = {
        "vocab_size": options["vocabulary"],
        "n_embd": options["hidden"],
        "n_layer": options["layers"],
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": BASE_END,
    }
    return transformers.GPT2Config(**{**own, **settings})


def _mixtral(options: dict[str, int], settings: dict[str, Any]) -> Any:
    return transformers.MixtralConfig(**{**_text(options), "num_local_experts": 3, "num_experts_per_tok": 2, **settings})


def _gemma(options: dict[str, int], settings: dict[str, Any]) -> Any:
    return transformers.Gemma2Config(**{**_text(options), "head_dim": 8, "sliding_window": 16, **settings})


def _qwen3_moe(options: dict[str, int], settings: dict[str, Any]) -> Any:
    own = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": options["hidden"], "decoder_sparse_step": 1}
    return transformers.Qwen3MoeConfig(**{**_text(options), **own, **settings})


def _gpt_oss(options: dict[str, int], settings: dict[str, Any]) -> Any:
    # Its experts stay fused on disk: gate_up_proj (E, d_in, 2·d_ff), interleaved, and down_proj (E, d_ff, d_out).
    own = {"head_dim": 8, "num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": options["hidden"], "sliding_window": 16}
    return transformers.GptOssConfig(**{**_text(options), **own, **settings})


def _llava(options: dict[str, int], settings: dict[str, Any]) -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16
    )
    text = _llama(options, settings)
    return transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=options["vocabulary"] - 1)


def _qwen2_vl(options: dict[str, int], settings: dict[str, Any]) -> Any:
    hidden = options["hidden"]
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": hidden, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2, "in_channels": 3}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {**_text(options), "rope_parameters": rope, **settings}
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    return transformers.Qwen2VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **tokens)


CONFIGS: dict[str, Callable[[dict[str, int], dict[str, Any]], Any]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
    "gemma": _gemma,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
}
