"""Which matrices a stored tensor consists of.

2-D tensors are one matrix, as stored (the authors' semantics, also where a model fuses q, k and v, or gate and up).
Stacks (E, a, b) of experts, or of heads with a matrix each, are E matrices, and so are DBRX's experts, stored one below
the other (E*d, d_model); a gate and an up projection fused inside experts are the two matrices that they are, unless asked
for whole. Other tensors with more dimensions (convolutions) are flattened to (d_0, rest): a batched SVD over their last two
dimensions, as the authors' script would take, decomposes kernel windows, not the layer's map. A tensor of one dimension is
none, whatever ones are around it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from torch import Tensor

Fused = Literal["split", "whole"]
Config = Mapping[str, Any]

_EXPERT_COUNT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")
# The usual name, that of Granite and JetMoE, and that of Aria.
_FUSED_GATE_UP = re.compile(r"(gate_up_proj|(block_sparse_moe|mlp)\.input_linear|experts\.fc1)(\.weight)?$")
# Kernels of convolutions are 3-D, too. What is not called so and has no side this short is a stack of matrices, where there are fewer of
# them than they have rows and columns: a layer whose outputs are stored by head (XLNet's, (d_in, heads, d_head)) is one matrix.
_CONVOLUTION = re.compile(r"conv|patch|embed", re.IGNORECASE)
_LONGEST_KERNEL = 15
# GPT-OSS stores gate and up columns alternately; every other fused layout known to transformers 5 stores halves.
_INTERLEAVED_MODELS = ("gpt_oss",)
# Experts stored as (E, d_in, d_out), for x @ W.
_TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter")
# Models of transformers 5 that are made of Conv1D, and what they call them; other models have nn.Linear under the same names.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
_CONV1D_NAME = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$")
_CONV1D_ENDS = ("c_attn.weight", "q_attn.weight", "c_proj.weight", "c_fc.weight")
# The experts of DBRX, (E*d, d_model) each; the last is stored for x @ W.
_ROWS_OF_EXPERTS = ("ffn.experts.mlp.w1", "ffn.experts.mlp.v1", "ffn.experts.mlp.w2")
_READS_HIDDEN = re.compile(r"(gate|up|w1|w3|fc1|wi|input_linear)(_\w+)?(\.weight)?$")
_WRITES_HIDDEN = re.compile(r"(down|w2|fc2|wo|output_linear)(_\w+)?(\.weight)?$")


@dataclass(frozen=True)
class MatrixView:
    """One matrix inside a tensor: one of a stack, a part of one axis of it or of a matrix, or the whole tensor flattened to two dimensions.

    expert: its place in a stack, of experts mostly.

    shape: (d_out, d_in) as stored. label: '' for a whole tensor, else such as '[3]' or '[3].gate'.
    """

    shape: tuple[int, int]
    label: str = ""
    expert: int | None = None
    axis: int | None = None
    part: tuple[int, int, int] | None = None  # start, stop, step along `axis` of the expert's matrix
    transposed: bool = False  # stored as (d_in, d_out): rows are inputs

    def select(self, tensor: Tensor) -> Tensor:
        """The matrix as a view on a contiguous `tensor`: writing into it writes into the tensor."""
        if self.expert is None and self.part is None:
            return tensor.view(self.shape)
        matrix = tensor if self.expert is None else tensor[self.expert]
        if self.part is None:
            return matrix
        piece = slice(*self.part)
        return matrix[piece] if self.axis == 0 else matrix[:, piece]


def nested_configs(config: Config) -> Iterator[Config]:
    """The config and the configs of its parts (text_config, thinker_config, …)."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from nested_configs(value)


def _is_one_of(config: Config, models: tuple[str, ...]) -> bool:
    return any(part.get("model_type") in models for part in nested_configs(config))


def _expert_counts(config: Config) -> set[int]:
    return {part[key] for part in nested_configs(config) for key in _EXPERT_COUNT_KEYS if isinstance(part.get(key), int)}


def is_vector(shape: tuple[int, ...]) -> bool:
    """Whether a tensor has at most one dimension, but for ones around it: (d,), (1, 1, d). Of two dimensions, (1, d) is a layer's matrix."""
    # Matrices first: a model has up to 100,000, and is planned in seconds.
    return len(shape) < 2 or (len(shape) > 2 and sum(side != 1 for side in shape) < 2)


def is_stack(name: str, shape: tuple[int, ...], config: Config) -> bool:
    """True for a 3-D tensor of several matrices.

    Of experts: its name says so, or its first dimension is the config's number of experts. Of something else, say a gate for each head
    (RecurrentGemma): it is no convolution.
    """
    if len(shape) != 3 or min(shape[1:]) < 2:
        return False
    if "expert" in name or shape[0] in _expert_counts(config):
        return True
    return 1 < shape[0] < min(shape[1:]) and min(shape[1:]) > _LONGEST_KERNEL and not _CONVOLUTION.search(name)


def is_transposed(name: str, shape: tuple[int, ...], config: Config) -> bool:
    """Whether the matrices of this tensor are stored (d_in, d_out). shape: of the whole tensor, all of a stack.

    A truncated SVD does not care, but "left" means the output side. Embedding tables are taken as they are stored: rows are tokens.
    """
    if is_stack(name, shape, config):
        hidden = {part["hidden_size"] for part in nested_configs(config) if isinstance(part.get("hidden_size"), int)}
        ends = [side in hidden for side in shape[1:]]
        if ends[0] != ends[1] and _READS_HIDDEN.search(name):
            return ends[0]
        if ends[0] != ends[1] and _WRITES_HIDDEN.search(name):
            return ends[1]
        return _is_one_of(config, _TRANSPOSED_EXPERTS)
    # The name first: going through the configuration for every tensor takes longer.
    if name.endswith(_ROWS_OF_EXPERTS[-1]):
        return _experts_in_rows(name, shape, config) > 0
    return len(shape) == 2 and name.endswith(_CONV1D_ENDS) and bool(_CONV1D_NAME.search(name)) and _is_one_of(config, _CONV1D_MODELS)


def _gate_up_axis(shape: tuple[int, ...], config: Config) -> int | None:
    """Axis (0 or 1 of an expert's matrix) that holds gate and up together; None when it cannot be told."""
    hidden = {part["hidden_size"] for part in nested_configs(config) if isinstance(part.get("hidden_size"), int)}
    fused = [axis for axis in (0, 1) if shape[1 + axis] not in hidden and shape[1 + axis] % 2 == 0]
    if len(fused) == 1:
        return fused[0]
    # Both sides equal the hidden size, or neither: (E, 2·I, H) is how transformers 5 stores it, except these models.
    if _is_one_of(config, _TRANSPOSED_EXPERTS):
        return 1
    return 0 if shape[1] % 2 == 0 else None


def _experts_in_rows(name: str, shape: tuple[int, ...], config: Config) -> int:
    """How many experts a matrix has one below the other, 0 where it has none."""
    if len(shape) != 2 or not name.endswith(_ROWS_OF_EXPERTS) or not _is_one_of(config, ("dbrx",)):
        return 0
    return max((count for count in _expert_counts(config) if count > 0 and shape[0] % count == 0), default=0)


def matrix_views(name: str, shape: tuple[int, ...], config: Config, fused: Fused = "split") -> list[MatrixView]:
    """The matrices of a tensor with at least two dimensions; an empty list for a vector, and for one without entries."""
    size = 1
    for side in shape:
        size *= side
    if is_vector(shape) or size == 0:
        return []
    if is_stack(name, shape, config):
        return [view for expert in range(shape[0]) for view in _expert_views(name, shape, config, fused, expert)]
    if experts := _experts_in_rows(name, shape, config):
        rows, turned = shape[0] // experts, is_transposed(name, shape, config)
        spans = [(place * rows, (place + 1) * rows, 1) for place in range(experts)]
        return [MatrixView((rows, shape[1]), f"[{place}]", axis=0, part=span, transposed=turned) for place, span in enumerate(spans)]
    sides = list(shape)
    while len(sides) > 2 and sides[0] == 1:  # (1, n, d) position tables are one matrix, not one row
        del sides[0]
    return [_whole_view(sides[0], size // sides[0], is_transposed(name, shape, config))]


@cache
def _whole_view(rows: int, columns: int, transposed: bool) -> MatrixView:
    """One object for all tensors of a shape: a model has few shapes and maybe 100,000 tensors."""
    return MatrixView((rows, columns), transposed=transposed)


def _expert_views(name: str, shape: tuple[int, ...], config: Config, fused: Fused, expert: int) -> list[MatrixView]:
    rows, columns = shape[1:]
    transposed = is_transposed(name, shape, config)
    axis = _gate_up_axis(shape, config) if fused == "split" and _FUSED_GATE_UP.search(name) else None
    if axis is None:
        return [MatrixView((rows, columns), f"[{expert}]", expert, transposed=transposed)]
    length = shape[1 + axis]
    if _is_one_of(config, _INTERLEAVED_MODELS):
        parts = {"gate": (0, length, 2), "up": (1, length, 2)}
    else:
        parts = {"gate": (0, length // 2, 1), "up": (length // 2, length, 1)}
    half = (rows // 2, columns) if axis == 0 else (rows, columns // 2)
    return [MatrixView(half, f"[{expert}].{part}", expert, axis, span, transposed) for part, span in parts.items()]
