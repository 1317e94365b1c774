"""Rank rules: what users may write, and what it means."""

from __future__ import annotations

import pytest

from lox_merge.errors import RecipeError
from lox_merge.maths.rank import RankRule, parse_rank


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("6", "fixed", 6), (6, "fixed", 6), ("full", "full", 0), (" Full ", "full", 0), ("10%", "percent", 10), ("energy:0.9", "energy", 0.9)],
)
def test_rules_are_read_and_written_back(text: str | int, kind: str, value: float) -> None:
    rule = parse_rank(text)
    assert rule == RankRule(kind, value)  # type: ignore[arg-type]
    assert parse_rank(str(rule)) == rule


def test_noise_floor_is_a_rule() -> None:
    assert str(parse_rank("noise-floor")) == "noise-floor"


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "", "six", "0%", "101%", "energy:0", "energy:1", "energy:x", "nan", "inf", "energy:nan"])
def test_anything_else_is_refused_with_the_allowed_forms(text: str) -> None:
    with pytest.raises(RecipeError, match=r"energy:0\.9"):
        parse_rank(text)


def test_rank_from_shape() -> None:
    assert parse_rank("6").from_shape(4) == 4
    assert parse_rank("10%").from_shape(64) == 6
    assert parse_rank("1%").from_shape(10) == 1  # never zero
    assert parse_rank("full").from_shape(10) == 10
    assert parse_rank("energy:0.5").from_shape(10) is None
