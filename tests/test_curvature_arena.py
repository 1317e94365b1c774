"""Memory for what outlives a backward pass: copies that are their own, shared tensors once, the same memory again."""

from __future__ import annotations

import torch

from lox_merge.diagnostics.curvature.arena import Arena
from lox_merge.maths.gradients import Lookup, Outer, Whole


def test_copies_are_whole_and_their_own() -> None:
    arena = Arena(4096)
    inputs, gradients, owners = torch.randn(5, 3, dtype=torch.bfloat16), torch.randn(4, 5).T, torch.arange(5)
    kept = arena.keep(Outer(inputs, gradients, owners, slot=2, transposed=True))
    assert isinstance(kept, Outer) and (kept.slot, kept.transposed) == (2, True)
    expected = inputs.clone(), gradients.clone()
    inputs.zero_()
    gradients.zero_()
    assert torch.equal(kept.inputs, expected[0]) and torch.equal(kept.gradients, expected[1]) and torch.equal(kept.owners, owners)
    assert kept.gradients.is_contiguous()


def test_a_tensor_of_several_contributions_is_kept_once() -> None:
    arena, inputs, owners = Arena(10**6), torch.randn(100, 8), torch.arange(100)
    first = arena.keep(Outer(inputs, torch.randn(100, 2), owners))
    second = arena.keep(Outer(inputs, torch.randn(100, 2), owners))
    assert isinstance(first, Outer) and isinstance(second, Outer)
    assert first.inputs.data_ptr() == second.inputs.data_ptr() and first.gradients.data_ptr() != second.gradients.data_ptr()
    assert 100 * (8 * 4 + 2 * 4 + 2 * 4 + 8) <= arena.used <= 100 * (8 * 4 + 2 * 4 + 2 * 4 + 8) + 4 * 64
    # Another tensor at the address of one that is gone is not taken for it.
    for place in range(50):
        kept = arena.keep(Whole(torch.full((1, 4, 1), float(place)), torch.zeros(1, dtype=torch.int64)))
        assert isinstance(kept, Whole) and bool((kept.values == place).all())


def test_memory_is_used_again_and_more_than_expected_fits() -> None:
    arena = Arena(64)
    lookups = [Lookup(torch.arange(9), torch.randn(9, 40), torch.arange(9)) for _ in range(3)]
    for _ in range(3):
        kept = [arena.keep(lookup) for lookup in lookups]
        for one, lookup in zip(kept, lookups, strict=True):
            assert isinstance(one, Lookup) and torch.equal(one.gradients, lookup.gradients) and torch.equal(one.tokens, lookup.tokens)
        used = arena.used
        addresses = [one.gradients.data_ptr() for one in kept if isinstance(one, Lookup)]
        arena.clear()
        assert arena.used == 0
        again = [arena.keep(lookup) for lookup in lookups]
        assert arena.used == used and [one.gradients.data_ptr() for one in again if isinstance(one, Lookup)] == addresses
        arena.clear()
    empty = arena.keep(Lookup(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)))
    assert isinstance(empty, Lookup) and empty.gradients.shape == (0, 4)
