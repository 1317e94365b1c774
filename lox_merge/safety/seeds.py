"""Seeds that every generator in use takes: numpy's, torch's and a trainer's differ in what they refuse, and how."""

from __future__ import annotations

from numbers import Integral

from lox_merge.errors import RequestError

HIGHEST_SEED = 2**32 - 1  # numpy.random.seed, which trainers set, takes no more


def check_seed(seed: object) -> int:
    """`seed` as Python's own number (numpy's are taken too) where it is one. Raises RequestError."""
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= int(seed) <= HIGHEST_SEED:
        raise RequestError(f"the seed {seed!r} is not a whole number from 0 to {HIGHEST_SEED}. Choose another one, such as 0.")
    return int(seed)
