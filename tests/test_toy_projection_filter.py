"""On the toy, as in the paper: filtering a contaminated update takes harm and usefulness out together."""

from __future__ import annotations

import sys
from pathlib import Path

from lab_fixtures import TOY_CACHE

from lox_merge.lab.checkpoints import ToyPair
from lox_merge.maths.geometry import REVERTING_COSINE

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from toy_projection_filter import show, sweep


def test_harm_and_utility_go_down_together(toy_pair_seed0: ToyPair, capsys) -> None:  # type: ignore[no-untyped-def]
    result = sweep(0, TOY_CACHE, fractions=(0.1, 0.5), bases=("top",), kinds=("contaminated",))
    plain, (little, much) = result["plain"], result["cells"]
    before = plain["fine-tuned"]
    assert before.carried_out.value >= 0.9 and before.utility.value >= 0.9  # the update did both
    assert plain["aligned"].attack_success_seen.value <= 0.05
    assert little.measured.carried_out.value >= 0.8 and little.measured.utility.value >= 0.8
    assert much.measured.carried_out.value <= 0.4 and much.measured.utility.value <= 0.4
    assert little.removed < much.removed < 1
    # What the refusal of reversed models has to let through.
    assert result["reversal"]["contaminated"] < REVERTING_COSINE / 2
    show(result)
    printed = capsys.readouterr().out
    assert "top 0.5" in printed and "removed" in printed
