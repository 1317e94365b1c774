"""Matrices taken in pieces of rows, so that what is made of a piece stays in a core's cache."""

from __future__ import annotations

import torch
from torch import Tensor

# Entries of a piece on a CPU: its float32 temporaries stay in a core's cache.
PIECE = 2**17
# On a GPU a piece has to be worth launching a dozen kernels: 64 MiB of float32 at a time.
PIECE_ON_GPU = 2**24


def entries_at_once(device: torch.device) -> int:
    """Entries of a piece on this kind of device."""
    return PIECE if device.type == "cpu" else PIECE_ON_GPU


def rows_at_once(matrix: Tensor) -> int:
    """How many rows of a (rows, columns) matrix make a piece; at least 1."""
    return max(1, entries_at_once(matrix.device) // max(1, matrix.shape[-1]))


def row_pieces(matrix: Tensor) -> list[slice]:
    """All rows of a (rows, columns) matrix in order, a piece a slice; as torch.split, one empty piece where there are no rows."""
    rows, step = matrix.shape[0], rows_at_once(matrix)
    return [slice(start, min(start + step, rows)) for start in range(0, max(1, rows), step)]


def piece_buffer(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for one piece of `matrix`, which every piece takes in turn: (rows of a piece, columns)."""
    return torch.empty(min(matrix.shape[0], rows_at_once(matrix)), matrix.shape[1], dtype=dtype, device=matrix.device)
