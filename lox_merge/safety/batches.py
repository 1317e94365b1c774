"""Batches of prompts of unequal length: padding, how many fit, and what to do when they did not."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

# On a CPU more rows at once stop paying long before memory ends; on a GPU they pay until it is busy.
_MOST_ON_CPU, _MOST_ON_GPU = 32, 256
# What a guess may take of the free memory: activations, copies while the cache grows, and fragmentation need the rest.
_SHARE = 0.4


def left_padded(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and attention mask, both (rows, longest), int64: generation goes on at the right end, so padding is on the left."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[padding] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return tokens, mask


def right_padded(rows: Sequence[Sequence[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `left_padded` with padding on the right, where a causal model's scores of the real tokens cannot see it."""
    longest = max(map(len, rows))
    tokens = torch.tensor([list(row) + [padding] * (longest - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    return tokens, mask


def first_batch_size(model: Any, tokens: int) -> int:
    """A batch size, a power of two, that should fit when each row holds up to `tokens` tokens; halving corrects a wrong guess."""
    device = model.device
    most = _MOST_ON_GPU if device.type == "cuda" else _MOST_ON_CPU
    fitting = max(1, int(_SHARE * free_memory(device) / _row_bytes(model, tokens)))
    return int(min(most, 2 ** (fitting.bit_length() - 1)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, on a GPU or a CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The CPU allocator and some CUDA libraries raise a bare RuntimeError.
    texts = ("out of memory", "not enough memory", "can't allocate memory", "cublas_status_alloc_failed")
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)


def release_memory() -> None:
    """Gives back what a failed batch left, so that the smaller one has the room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _row_bytes(model: Any, tokens: int) -> int:
    """Keys and values of every layer, and the last scores with their float32 copies."""
    config = model.config.get_text_config()
    width = model.dtype.itemsize
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 1)
    head = getattr(config, "head_dim", None) or config.hidden_size // getattr(config, "num_attention_heads", 1)
    cache = 2 * config.num_hidden_layers * heads * head * width * tokens
    activations = 8 * config.hidden_size * width * tokens
    return int(cache + activations + 3 * 4 * config.vocab_size)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device now; on a CPU with what the system keeps of files and would give up."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
