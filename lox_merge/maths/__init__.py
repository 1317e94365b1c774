"""Pure functions of tensors: spectra of alignment deltas, edits, geometry and rounding. No files, no names, no devices."""

from lox_merge.maths.edits import (
    Realised,
    apply_update,
    full_rank_update,
    gaussian_update,
    lox,
    lox_update,
    random_directions_update,
    random_subspace_update,
)
from lox_merge.maths.rank import RankRule, parse_rank
from lox_merge.maths.spectral import truncated_svd
from lox_merge.maths.subspace import Certificate, Subspace

__all__ = [
    "Certificate",
    "RankRule",
    "Realised",
    "Subspace",
    "apply_update",
    "full_rank_update",
    "gaussian_update",
    "lox",
    "lox_update",
    "parse_rank",
    "random_directions_update",
    "random_subspace_update",
    "truncated_svd",
]
