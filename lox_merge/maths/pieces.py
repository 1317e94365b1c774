"""Matrices taken in pieces of rows, so that what is made of a piece stays in a core's cache."""

from __future__ import annotations

import torch
from torch import Tensor

# Entries of a piece on a CPU: its float32 temporaries stay in a core's cache.
PIECE = 2**17
# On a GPU a piece has to be worth launching a dozen kernels: 64 MiB of float32 at a time.
PIECE_ON_GPU = 2**24
# Products with thin factors take up to four times as long an entry with fewer rows, above rank 64 up to twice with fewer than 64, and 1.3
# times where their number is no multiple of 16 (`benchmarks/cpu_path.py`).
_ROWS, _ROWS_AT_HIGH_RANK, _HIGH_RANK = 16, 64, 64


def entries_at_once(device: torch.device) -> int:
    """Entries of a piece on this kind of device."""
    return PIECE if device.type == "cpu" else PIECE_ON_GPU


def rows_at_once(matrix: Tensor, rank: int = 0) -> int:
    """How many rows of a (rows, columns) matrix make a piece; at least 1.

    rank: of the thin factors that a piece is multiplied with, 0 if it is with none: then a piece of wide rows is larger.
    """
    rows = max(1, entries_at_once(matrix.device) // max(1, matrix.shape[-1]))
    if not rank or matrix.device.type != "cpu":
        return rows
    return max(rows - rows % _ROWS, _ROWS_AT_HIGH_RANK if rank > _HIGH_RANK else _ROWS)


def row_pieces(matrix: Tensor, rank: int = 0) -> list[slice]:
    """All rows of a (rows, columns) matrix in order, a piece a slice; as torch.split, one empty piece where there are no rows. rank: see above."""
    rows, step = matrix.shape[0], rows_at_once(matrix, rank)
    return [slice(start, min(start + step, rows)) for start in range(0, max(1, rows), step)]


def piece_buffer(matrix: Tensor, dtype: torch.dtype, rank: int = 0) -> Tensor:
    """Memory for one piece of `matrix`, which every piece takes in turn: (rows of a piece, columns). rank: see above."""
    return torch.empty(min(matrix.shape[0], rows_at_once(matrix, rank)), matrix.shape[1], dtype=dtype, device=matrix.device)
