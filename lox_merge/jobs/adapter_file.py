"""adapter_model.safetensors put together from singular triplets: B = alpha · U S, A = Vᵀ, pair by pair."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.adapter_files import WEIGHTS
from lox_merge.checkpoint.safetensors_format import build_header
from lox_merge.checkpoint.weights import tensor_bytes
from lox_merge.errors import NumericalError
from lox_merge.jobs.adapter_plan import AdapterPlan, Pair, Source
from lox_merge.jobs.atomic import new_file, sync_folder, write_error
from lox_merge.jobs.journal import Journal
from lox_merge.maths.rounding import round_nearest

# U (rows, k), singular values (k,) and V (columns, k) of one matrix.
Triplets = tuple[Tensor, Tensor, Tensor]
Read = Callable[[Source], Triplets]


@dataclass(frozen=True)
class Written:
    """One matrix as it is in the adapter: what of the intended update T the stored factors give."""

    gain: float | None
    cosine: float | None
    intended_norm: float
    realised_norm: float


def factors_of(pair: Pair, rank: int, read: Read) -> tuple[Tensor, Tensor]:
    """A and B of one pair in float32, flat: (experts·rank, inside) and (outside, experts·rank), as PEFT stacks them."""
    stacked = max(1, pair.experts)
    left = torch.zeros(stacked, pair.shape[0], rank)
    right = torch.zeros(stacked, pair.shape[1], rank)
    used = [0] * stacked
    for source in pair.sources:
        vectors, values, others = read(source)
        scaled = (source.tensor.alpha * values).float()
        piece = slice(used[source.expert], used[source.expert] + values.numel())
        used[source.expert] = piece.stop
        # A is orthonormal and B carries the sizes, whichever way round the matrix is stored.
        rows, columns = (vectors, others * scaled) if pair.transposed else (vectors * scaled, others)
        left[source.expert, source.rows, piece] = rows
        right[source.expert, source.columns, piece] = columns
    outside, inside = (right, left) if pair.transposed else (left, right)
    first = inside.transpose(1, 2).reshape(stacked * rank, -1)
    second = outside.permute(1, 2, 0).reshape(outside.shape[1], -1)
    return first.contiguous(), second.contiguous()


def stored_factors(pair: Pair, rank: int, read: Read, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B as they are written: rounded to nearest, in PEFT's shapes. Raises NumericalError where they do not fit into `dtype`."""
    shapes = pair.shapes(rank)
    first, second = (round_nearest(part, dtype).reshape(shape) for part, shape in zip(factors_of(pair, rank, read), shapes, strict=True))
    if not all(bool(torch.isfinite(part).all()) for part in (first, second)):
        kind = str(dtype).removeprefix("torch.")
        wider = "" if dtype == torch.float32 else ", or another --dtype (float32 and bfloat16 reach further)"
        raise NumericalError(
            f"module {pair.target}: its update overflows {kind}, at alpha {max(source.tensor.alpha for source in pair.sources):g}. "
            f"Give a smaller --alpha{wider}, in another folder or with --overwrite."
        )
    return first.contiguous(), second.contiguous()


def realised(pair: Pair, source: Source, rank: int, read: Read, first: Tensor, second: Tensor) -> Written:
    """The update of one matrix in the stored factors against alpha · U S Vᵀ, through the factors: nothing dense is formed."""
    vectors, values, others = read(source)
    intended = source.tensor.alpha * values.double()
    stacked = max(1, pair.experts)
    inside = first.reshape(stacked, rank, -1)[source.expert].double()
    outside = second.reshape(second.shape[0], rank, stacked)[:, :, source.expert].double()
    left, right = (inside.T, outside) if pair.transposed else (outside, inside.T)
    left, right = left[source.rows], right[source.columns]
    # Columns of a fused matrix that belong to another part are zero here.
    kept_square = float(((left.T @ left) * (right.T @ right)).sum())
    product = float((((vectors.double() * intended).T @ left) * (others.double().T @ right)).sum())
    norm, kept = float(intended.norm()), math.sqrt(max(0.0, kept_square))
    return Written(product / norm**2 if norm else None, product / (norm * kept) if norm and kept else None, norm, kept)


def write_factors(made: AdapterPlan, ranks: Mapping[tuple[str, str], int], read: Read, journal: Journal) -> tuple[dict[str, Any], dict[Any, Written]]:
    """Streams all pairs into the adapter's file and gives it its name. Returns its record, and what became of each matrix.

    Raises WriteError, and NumericalError where factors do not fit into their dtype.
    """
    code = dtypes.OUTPUT_CODES[made.dtype]
    dtype = dtypes.torch_dtype(code)
    pairs = [(pair, pair.rank(ranks)) for pair in made.pairs if pair.rank(ranks)]
    entries = [(name, code, shape) for pair, rank in pairs for name, shape in zip(pair.names, pair.shapes(rank), strict=True)]
    header = build_header(entries, {"format": "pt"})
    digest = hashlib.sha256(header.raw)
    outcome: dict[tuple[str, str], Written] = {}
    with new_file(journal.partial(WEIGHTS), journal.out / WEIGHTS) as file:
        file.write(header.raw)
        for pair, rank in pairs:
            first, second = stored_factors(pair, rank, read, dtype)
            for part in (first, second):
                data = tensor_bytes(part)
                file.write(data)
                digest.update(data)
            outcome |= {source.key: realised(pair, source, rank, read, first, second) for source in pair.sources}
    try:
        sync_folder(journal.out)
    except OSError as error:
        raise write_error(journal.out / WEIGHTS, error) from error
    return {"file": WEIGHTS, "size": header.file_size, "sha256": digest.hexdigest()}, outcome
