"""What the reader of a landscape must know, found out from what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from lox_merge.safety.landscape.directions import Slice
from lox_merge.safety.landscape.results import PointResult

# Percentile intervals of a mean of fewer values cover far less than they say.
_FEW = 10


def notes_of(slices: Sequence[Slice], results: Sequence[tuple[PointResult, ...]], prompts: int, *, count: int, kept: bool) -> tuple[str, ...]:
    """Resolution, undefined points, missing centre, one direction only, noise drawn anew."""
    notes = []
    if prompts < 100:
        notes.append(f"{prompts} prompt(s): a single reply changes a point's ASR by {100 / prompts:.3g} percentage points")
    broken = [point for points in results for point in points if point.undefined]
    if broken:
        notes.append(f"{len(broken)} of {count} points are undefined, such as one where {broken[0].undefined}; they count in no mean")
    lost = sum(point.utility_undefined is not None for points in results for point in points)
    if lost:
        notes.append(f"utility is undefined at {lost} of {count} points")
    if any(0.0 not in axis for one in slices for axis in one.axes):
        notes.append("the grid does not hold the model itself (coordinate 0); it was measured beside it")
    random = [one for one in slices if one.is_random_around_model]
    if len(random) == 1:
        notes.append("one random slice: how much VISAGE differs between directions is not known")
    elif 1 < len(random) < _FEW:
        notes.append(f"{len(random)} random slices: a bootstrap over so few directions gives an interval that is too narrow")
    if any(point.rate(judge) == 1 for points in results for point in points for judge in point.attack_success):
        notes.append("VISAGE leaves out points where every attack succeeds: it says how safe the others are, not how many there are")
    if not kept:
        notes.append("memory was too small to keep the random directions, so they were drawn again for every point (slower, same figures)")
    return tuple(notes)
