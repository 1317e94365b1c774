"""Which parameters' inputs and output gradients are kept in which pass over the completions, so that memory suffices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lox_merge.errors import RequestError

# A piece of a matrix is begun at the end of a pass only where it is worth another visit to the same layer.
_WORTHWHILE = 8
_WIDE = 4  # bytes of a float32


@dataclass(frozen=True)
class Measured:
    """One parameter as a first look at two completions found it. rows, columns: of its (or each) matrix, (d_out, d_in).

    group: parameters of one group read the same inputs. shared_bytes: those inputs over all completions; row_bytes: output gradients
    over all completions, for each of `rows`. Both 0 where gradients come whole (vectors). kept: of the
    gradients of all completions, for each row.
    """

    name: str
    rows: int
    columns: int
    group: int
    shared_bytes: int
    row_bytes: int
    kept_bytes: int


@dataclass(frozen=True)
class Piece:
    """Rows first, …, last − 1 of a parameter. formed: their gradients are formed at once (long texts), instead of at the end."""

    name: str
    first: int
    last: int
    formed: bool


def plan_passes(parameters: Sequence[Measured], memory: int) -> list[list[Piece]]:
    """Pieces by pass; together they hold every row of every parameter once. memory: bytes. Raises RequestError when no row fits."""
    passes: list[list[Piece]] = [[]]
    free, groups = memory, set[int]()
    for parameter in parameters:
        first = 0
        while first < parameter.rows:
            left = parameter.rows - first
            shared = 0 if parameter.group in groups else parameter.shared_bytes
            # Inputs beside output gradients, or the gradients themselves: what takes less. Stacks have no `kept_bytes`.
            formed = not parameter.row_bytes or 0 < parameter.kept_bytes * left < shared + parameter.row_bytes * left
            formed = formed or (parameter.shared_bytes + parameter.row_bytes > memory and parameter.kept_bytes > 0)
            row, shared = (parameter.kept_bytes, 0) if formed else (parameter.row_bytes, shared)
            fitting = min(left, max(0, free - shared) // max(1, row))
            if fitting < left and passes[-1] and fitting * _WORTHWHILE < left:
                passes.append([])
                free, groups = memory, set()
                continue
            if not fitting:
                raise RequestError(f"one row of {parameter.name} over all completions takes {(row + shared) / 1e9:.3g} GB. Raise --memory above it.")
            passes[-1].append(Piece(parameter.name, first, first + fitting, formed))
            free -= shared + row * fitting
            groups |= set() if formed else {parameter.group}
            first += fitting
            if first < parameter.rows:  # its next rows need the layer visited again
                passes.append([])
                free, groups = memory, set()
    return [some for some in passes if some]


def planned_bytes(pieces: Sequence[Piece], parameters: Mapping[str, Measured]) -> int:
    """What a pass over these pieces keeps; parameters by name."""
    groups, total = set[int](), 0
    for piece in pieces:
        parameter, rows = parameters[piece.name], piece.last - piece.first
        if piece.formed:
            total += parameter.kept_bytes * rows
            continue
        total += parameter.row_bytes * rows + (0 if parameter.group in groups else parameter.shared_bytes)
        groups.add(parameter.group)
    return total


def kept_bytes(columns: int, examples: int) -> int:
    """Of one row of the gradients of all completions."""
    return columns * examples * _WIDE
