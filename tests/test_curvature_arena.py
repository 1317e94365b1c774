"""Memory for what outlives a backward pass: copies that are their own, shared tensors once, the same memory again."""

from __future__ import annotations

import torch

from lox_merge.diagnostics.curvature.arena import Arena, Scratch
from lox_merge.maths.gradients import Contribution, Lookup, Outer, Whole, gradient_rows


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


def test_blocks_take_one_memory_in_turn_whatever_it_holds() -> None:
    """Owners without rows are zero, and one owner's rows may come in several contributions of any kind."""
    scratch, generator = Scratch(4 * 5 * 6 * 3), torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    outer = [Outer(random(4, 3), random(4, 6), torch.tensor([0, 0, 2, 2])), Outer(random(3, 3), random(3, 6), torch.tensor([2, 4, 4]))]
    lookup = Lookup(torch.tensor([5, 0, 5]), random(3, 3), torch.tensor([1, 2, 2]))
    whole = Whole(random(2, 6, 3), torch.tensor([0, 4]))
    mixtures: list[list[Contribution]] = [outer, [outer[0], lookup, outer[1]], [whole, *outer], [lookup], [whole]]
    addresses = set()
    for mixture in mixtures:
        dirty = scratch.place((5, 6, 3), torch.float32, torch.device("cpu"))
        dirty.fill_(float("nan"))
        block = gradient_rows(mixture, 0, 6, 3, torch.arange(5), scratch.place)
        expected = torch.zeros(5, 6, 3)
        for some in mixture:
            for row, owner in enumerate(some.owners.tolist()):
                if isinstance(some, Outer):
                    expected[owner] += some.gradients[row, :, None] * some.inputs[row]
                elif isinstance(some, Lookup):
                    expected[owner, some.tokens[row]] += some.gradients[row]
                else:
                    expected[owner] += some.values[row]
        torch.testing.assert_close(block, expected, rtol=1e-5, atol=1e-6)
        addresses |= {dirty.data_ptr(), block.data_ptr()}
    assert len(addresses) == 1
    larger = scratch.place((5, 6, 4), torch.float32, torch.device("cpu"))
    assert larger.shape == (5, 6, 4) and larger.data_ptr() not in addresses
