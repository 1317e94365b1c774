"""Settings of a wrong type: refused when they are given, never taken for something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest

from lox_merge import CurvatureSettings, FilterRecipe, InspectSettings, Recipe, harden
from lox_merge.diagnostics.watch.callback import AlignmentWatch
from lox_merge.diagnostics.watch.settings import WatchSettings
from lox_merge.errors import RecipeError, RequestError
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.safety.attack import AttackSettings
from lox_merge.safety.chat import Rendering
from lox_merge.safety.decoding import Decoding
from lox_merge.safety.tuning import TuneSpace


@pytest.mark.parametrize("settings", [Recipe, InspectSettings, CurvatureSettings, TuneSpace, lambda **given: FilterRecipe(rank=1, **given)])
def test_a_text_is_one_pattern(settings: Callable[..., Any]) -> None:
    name = {CurvatureSettings: "only", TuneSpace: "groups"}.get(settings, "include")
    assert getattr(settings(**{name: "lm_head"}), name) == ("lm_head",)
    assert getattr(settings(**{name: ["lm_head", "mlp"]}), name) == ("lm_head", "mlp")


@pytest.mark.parametrize(
    ("settings", "given", "says"),
    [
        (Recipe, {"include": None}, "include is None; use a text or a tuple of texts"),
        (Recipe, {"exclude": (1,)}, "an entry of exclude is 1; use a text"),
        (Recipe, {"rank_pattern": {"mlp": 4}}, r"rank_pattern is \{'mlp': 4\}; use a tuple of pairs, such as \(\('mlp', 4\),\)"),
        (Recipe, {"rank_pattern": ("mlp", 4)}, "an entry of rank_pattern is 'mlp'; use a pair"),
        (Recipe, {"rank_pattern": (("mlp", None),)}, "an entry of rank_pattern is None; use a RankRule or a whole number or a text"),
        (Recipe, {"rank": None}, "rank is None; use a RankRule or a whole number or a text"),
        (Recipe, {"alpha_pattern": (("mlp", "1.0"),)}, "an entry of alpha_pattern is '1.0'; use a number"),
        (Recipe, {"alpha": "1.25"}, "alpha is '1.25'; use a number"),
        (Recipe, {"alpha": None}, "alpha is None"),
        (Recipe, {"alpha": 10**400}, "alpha is 1000.*…; use a number"),
        (Recipe, {"alpha": 10**5000}, "alpha is too large; use a number"),
        (Recipe, {"seed": float("inf")}, "seed is inf; use a whole number"),
        (Recipe, {"alpha": True}, "alpha is True"),
        (Recipe, {"tolerance": "1e-3"}, "tolerance is '1e-3'"),
        (Recipe, {"seed": "x"}, "seed is 'x'; use a whole number"),
        (Recipe, {"seed": 1.5}, "seed is 1.5; use a whole number"),
        (Recipe, {"linear_only": "no"}, "linear_only is 'no'; use True or False"),
        (Recipe, {"dtype": ["float32"]}, r"dtype is \['float32'\]; use a text"),
        (FilterRecipe, {"fraction": ".1"}, "fraction is '.1'; use a number"),
        (FilterRecipe, {"rank": "10%"}, "rank is '10%'; use a whole number"),
        (FilterRecipe, {"rank": 1, "mode": 3}, "mode is 3; use one of parallel, orthogonal"),
        (FilterRecipe, {"rank": 1, "threshold": "0.3"}, "threshold is '0.3'; use a number"),
        (InspectSettings, {"fractions": 0.1}, "fractions is 0.1; use a tuple, each entry a number"),
        (InspectSettings, {"draws": "20"}, "draws is '20'"),
        (CurvatureSettings, {"layers": "12"}, "layers is '12'"),
        (CurvatureSettings, {"energy": None}, "energy is None"),
        (WatchSettings, {"threshold": {"alignment/projection": "0.1"}}, r"threshold\['alignment/projection'\] is '0.1'"),
        (AlignmentWatch, {"base": "base", "threshold": "0.1"}, r"threshold\['alignment/projection'\] is '0.1'"),
        (AttackSettings, {"steps": "50"}, "steps is '50'; use a tuple, each entry a whole number"),
        (AttackSettings, {"learning_rate": "2e-5"}, "learning_rate is '2e-5'"),
        (TuneSpace, {"ranks": (1, 2, 3)}, r"ranks is \(1, 2, 3\); use a pair of a whole number and a whole number"),
        (Decoding, {"max_new_tokens": "60"}, "max_new_tokens is '60'"),
        (Rendering, {"chat_template": "no"}, "chat_template is 'no'"),
        (ToyRecipe, {"seed": "0"}, "seed is '0'"),
        (ToyRecipe, {"pretraining": 400}, "pretraining is 400; use a Training"),
    ],
)
def test_a_value_of_another_type_is_refused(settings: Callable[..., Any], given: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        settings(**given)


def test_numbers_of_other_libraries_are_numbers() -> None:
    recipe = Recipe(alpha=numpy.float32(0.5), seed=numpy.int64(7))  # type: ignore[arg-type]
    assert (type(recipe.alpha), recipe.alpha, type(recipe.seed), recipe.seed) == (float, 0.5, int, 7)
    assert type(FilterRecipe(rank=2.0).rank) is int  # type: ignore[arg-type]


def test_a_long_value_is_shown_in_part() -> None:
    with pytest.raises(RecipeError, match="…; use a number") as caught:
        Recipe(alpha="9" * 10_000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("workers", ["2", 1.5, 0, None, True])
def test_a_number_of_workers_is_a_whole_number(workers: Any) -> None:
    with pytest.raises(RequestError, match=r"workers is .*; give a whole number ≥ 1, or 'auto'"):
        harden("base", "aligned", "out", workers=workers)
