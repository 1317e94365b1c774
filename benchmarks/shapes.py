"""Tensors of public models by name and shape, as their checkpoints store them: for plans and estimates without any weights.

Sizes are those of the models' config.json on the Hub; a family's tensors follow from them. DeepSeek-V3 and Kimi-K2 are published in fp8
(E4M3) with one float32 scale for every block of 128 × 128.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from synthetic import SIZES, Shapes

FP8_BLOCK = 128
Tensor = tuple[str, tuple[int, ...]]


class Model(Protocol):
    """shards: files of the public checkpoint. fp8: whether it is published in fp8."""

    @property
    def shards(self) -> int: ...

    @property
    def fp8(self) -> bool: ...

    def tensors(self) -> list[Tensor]:
        """Names and shapes in the order of the layers, without scales."""
        ...

    def config(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Llama:
    """A Llama 3 (meta-llama/Meta-Llama-3-8B, -70B, Llama-3.1-405B)."""

    sizes: Shapes
    fp8: bool = False

    @property
    def shards(self) -> int:
        return self.sizes.shards

    def tensors(self) -> list[Tensor]:
        return self.sizes.tensors()

    def config(self) -> dict[str, Any]:
        return {"model_type": "llama", "hidden_size": self.sizes.hidden, "num_hidden_layers": self.sizes.layers, "tie_word_embeddings": False}


@dataclass(frozen=True)
class DeepSeek:
    """The DeepSeek-V3 family: latent attention, experts one by one, maybe one more layer that predicts a second token.

    dense: leading layers without experts. second_token: layers of multi-token prediction behind the last one.
    """

    vocabulary: int
    heads: int
    experts: int
    dense: int
    second_token: int
    shards: int
    layers: int = 61
    hidden: int = 7168
    intermediate: int = 18432
    expert: int = 2048
    query: int = 1536
    latent: int = 512
    fp8: bool = True

    def tensors(self) -> list[Tensor]:
        found: list[Tensor] = [("model.embed_tokens.weight", (self.vocabulary, self.hidden))]
        for layer in range(self.layers + self.second_token):
            found += self._layer(f"model.layers.{layer}.", layer)
        return [*found, ("model.norm.weight", (self.hidden,)), ("lm_head.weight", (self.vocabulary, self.hidden))]

    def _layer(self, prefix: str, layer: int) -> Iterator[Tensor]:
        h = self.hidden
        if layer >= self.layers:
            yield prefix + "embed_tokens.weight", (self.vocabulary, h)
            yield prefix + "eh_proj.weight", (h, 2 * h)
            yield from ((prefix + name, (h,)) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight"))
            yield prefix + "shared_head.head.weight", (self.vocabulary, h)
        # A head has 128 + 64 entries of queries and keys (the 64 rotated), 128 of values.
        yield prefix + "self_attn.q_a_proj.weight", (self.query, h)
        yield prefix + "self_attn.q_a_layernorm.weight", (self.query,)
        yield prefix + "self_attn.q_b_proj.weight", (192 * self.heads, self.query)
        yield prefix + "self_attn.kv_a_proj_with_mqa.weight", (self.latent + 64, h)
        yield prefix + "self_attn.kv_a_layernorm.weight", (self.latent,)
        yield prefix + "self_attn.kv_b_proj.weight", (256 * self.heads, self.latent)
        yield prefix + "self_attn.o_proj.weight", (h, 128 * self.heads)
        if layer < self.dense:
            yield from _gated(prefix + "mlp.", h, self.intermediate)
        else:
            yield prefix + "mlp.gate.weight", (self.experts, h)
            yield prefix + "mlp.gate.e_score_correction_bias", (self.experts,)
            for expert in range(self.experts):
                yield from _gated(f"{prefix}mlp.experts.{expert}.", h, self.expert)
            yield from _gated(prefix + "mlp.shared_experts.", h, self.expert)
        yield prefix + "input_layernorm.weight", (h,)
        yield prefix + "post_attention_layernorm.weight", (h,)

    def config(self) -> dict[str, Any]:
        return {
            "model_type": "deepseek_v3",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "n_routed_experts": self.experts,
            "tie_word_embeddings": False,
        }


def _gated(prefix: str, hidden: int, intermediate: int) -> Iterator[Tensor]:
    yield prefix + "gate_proj.weight", (intermediate, hidden)
    yield prefix + "up_proj.weight", (intermediate, hidden)
    yield prefix + "down_proj.weight", (hidden, intermediate)


_DEEPSEEK_V3 = DeepSeek(vocabulary=129280, heads=128, experts=256, dense=3, second_token=1, shards=163)

MODELS: dict[str, Model] = {
    "8B": Llama(SIZES["8B"]),
    "70B": Llama(Shapes(8192, 28672, 80, 128256, 1024, 30)),
    # The repaired release: 8 heads of keys and values (the first one stored each of them twice).
    "405B": Llama(Shapes(16384, 53248, 126, 128256, 1024, 191)),
    "671B": _DEEPSEEK_V3,
    # Kimi-K2: no second token, one dense layer.
    "1T": DeepSeek(vocabulary=163840, heads=64, experts=384, dense=1, second_token=0, shards=62),
    # As many tensors as DeepSeek-V3 has with its scales, all of them to be planned: its experts halved.
    "671B-fine": replace(_DEEPSEEK_V3, experts=512, expert=1024, shards=1000),
}


def parameters(model: Model) -> int:
    return sum(math.prod(shape) for _, shape in model.tensors())


def stored_bytes(model: Model) -> int:
    """Bytes of the tensors as published: bf16, or fp8 with its scales for what DeepSeek quantises (linear layers but the router)."""
    total = 0
    for name, shape in model.tensors():
        if model.fp8 and quantised(name, shape):
            total += math.prod(shape) + 4 * math.prod(-(-side // FP8_BLOCK) for side in shape)
        else:
            total += 2 * math.prod(shape)
    return total


def quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether DeepSeek-V3 stores this tensor in fp8."""
    kept = ("embed_tokens.", "lm_head.", "shared_head.", "eh_proj.", "mlp.gate.")
    return len(shape) == 2 and not any(part in name for part in kept)
