"""Rank rules: what users may write, and what it means."""

from __future__ import annotations

import pytest

from lox_merge.errors import RecipeError
from lox_merge.jobs.recipe import Recipe
from lox_merge.maths.rank import RankRule, parse_rank


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [("6", "fixed", 6), (6, "fixed", 6), ("full", "full", 0), (" Full ", "full", 0), ("10%", "percent", 10), ("energy:0.9", "energy", 0.9)],
)
def test_rules_are_read_and_written_back(text: str | int, kind: str, value: float) -> None:
    rule = parse_rank(text)
    assert rule == RankRule(kind, value)  # type: ignore[arg-type]
    assert parse_rank(str(rule)) == rule


@pytest.mark.parametrize("text", ["energy:0.9999999", "energy:0.123456789", "33.3333333%", "0.0000125%", "99.99999999%"])
def test_every_digit_is_written_back(text: str) -> None:
    rule = parse_rank(text)
    assert parse_rank(str(rule)) == rule
    assert Recipe.from_json(Recipe(rank=text).to_json()).rank == rule


def test_numbers_are_written_as_short_as_they_can_be() -> None:
    assert [str(parse_rank(text)) for text in ("10.0%", "2.50%", "energy:0.90", "6.0")] == ["10%", "2.5%", "energy:0.9", "6"]


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
