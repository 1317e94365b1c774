"""Which stored matrices are (d_in, d_out): a truncated SVD does not care, but "left" means the output side.

`nn.Linear` stores (d_out, d_in). GPT-2's Conv1D and the fused experts of some models store the transpose. Embedding tables are taken
as they are stored, rows are tokens: whether a token is their input or their output depends on whether they are tied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from lox_merge.jobs.layout import Config, is_expert_stack

# Models of transformers 5 that are made of Conv1D, and what they call them; other models have nn.Linear under the same names.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")
_CONV1D_NAME = re.compile(r"(^|\.)(c_attn|q_attn|c_proj|c_fc)\.weight$")
_TRANSPOSED_EXPERTS = ("gpt_oss", "llama4", "llama4_text", "aria", "aria_text", "openai_privacy_filter")
_READS_HIDDEN = re.compile(r"(gate|up|w1|w3|fc1|wi|input_linear)(_\w+)?(\.weight)?$")
_WRITES_HIDDEN = re.compile(r"(down|w2|fc2|wo|output_linear)(_\w+)?(\.weight)?$")


def is_transposed(name: str, shape: tuple[int, ...], config: Config) -> bool:
    """Whether the matrices of this tensor are stored (d_in, d_out). shape: of the whole tensor, experts included."""
    kinds = {part.get("model_type") for part in _parts(config)}
    if is_expert_stack(name, shape, config):
        hidden = {part["hidden_size"] for part in _parts(config) if isinstance(part.get("hidden_size"), int)}
        ends = [side in hidden for side in shape[1:]]
        if ends[0] != ends[1] and _READS_HIDDEN.search(name):
            return ends[0]
        if ends[0] != ends[1] and _WRITES_HIDDEN.search(name):
            return ends[1]
        return bool(kinds & set(_TRANSPOSED_EXPERTS))
    return len(shape) == 2 and bool(kinds & set(_CONV1D_MODELS)) and bool(_CONV1D_NAME.search(name))


def _parts(config: Config) -> Iterator[Config]:
    """The config and those of its parts (text_config, …)."""
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _parts(value)
