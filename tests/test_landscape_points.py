"""The file of a landscape's points: what must not be believed when the same command goes on from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import lox_merge
from lox_merge.errors import LoxMergeError
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.lab.measure import BATCH_SIZE, DECODING, NotRefused, forbidden_prompts
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import draw_requests
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.landscape.measure import NOT_FINITE, NOT_JUDGED
from lox_merge.safety.landscape.results import Landscape, PointResult
from lox_merge.safety.landscape.store import ANCHOR, PointStore
from lox_merge.safety.types import Exchange, PromptSet, Verdict

JUDGE = NotRefused().name


class Undecided:
    """Decides on the first `count` points alone, under the name of the judge that decides on all."""

    name = JUDGE
    worth_caching = False

    def __init__(self, count: int) -> None:
        self.left = count

    def identity(self) -> dict[str, Any]:
        return NotRefused().identity()

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        self.left -= 1
        return NotRefused().judge(exchanges) if self.left >= 0 else [Verdict(None) for _ in exchanges]


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    found = forbidden_prompts(draw_requests(ToyRecipe(seed=0)).tests)
    return lox_merge.safety.prompts.prompt_set(found.prompts[:6], "six")


def measure(model: Path, prompts: PromptSet, points: Path, judged: int = 99, **settings: Any) -> tuple[Landscape, int]:
    """The result, and how many points the judge saw."""
    judge = Undecided(judged)
    shared: dict[str, Any] = {"loading": {"decoding": DECODING, "batch_size": BATCH_SIZE}, "device": "cpu", "points": points}
    found = lox_merge.landscape(model, prompts, [judge], random=1, extent=(0, 0.2), steps=2, **shared, **settings)
    return found, judged - judge.left


def test_what_failed_fails_again_until_the_judge_decides(toy_pair_seed0: ToyPair, prompts: PromptSet, tmp_path: Path) -> None:
    file = tmp_path / "points.jsonl"
    for _ in range(2):
        with pytest.raises(LoxMergeError, match=f"itself cannot be measured: {NOT_JUDGED}"):
            measure(toy_pair_seed0.aligned, prompts, file, 0)
        assert file.read_bytes().count(b"\n") == 1
    # The judge fails on the way: that point alone is asked for again.
    found, _ = measure(toy_pair_seed0.aligned, prompts, file, 2)
    assert [point.undefined for point in found.slices[0].points] == [None, None, NOT_JUDGED] and found.resumed == 0
    found, asked = measure(toy_pair_seed0.aligned, prompts, file)
    assert [point.undefined for point in found.slices[0].points] == [None] * 3 and (found.resumed, asked) == (2, 1)


@pytest.mark.parametrize(("why", "fails"), [(NOT_FINITE, True), (NOT_JUDGED, False)])
def test_an_undefined_model_in_a_file_is_no_measurement(
    why: str, fails: bool, toy_pair_seed0: ToyPair, prompts: PromptSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of earlier versions hold it for a judge that decided nothing, which may be asked again."""
    file, keep = tmp_path / "points.jsonl", PointStore.keep
    with monkeypatch.context() as patch:
        patch.setattr(PointStore, "keep", lambda store, key, point: keep(store, key, PointResult({}, undefined=why) if key == ANCHOR else point))
        measure(toy_pair_seed0.aligned, prompts, file)
    if fails:
        with pytest.raises(LoxMergeError, match="itself cannot be measured: the model's scores"):
            measure(toy_pair_seed0.aligned, prompts, file)
    else:
        found, asked = measure(toy_pair_seed0.aligned, prompts, file)
        assert found.anchor.undefined is None and (found.resumed, asked) == (2, 1)


def test_utility_is_not_measured_where_no_point_is_left(toy_pair_seed0: ToyPair, prompts: PromptSet, tmp_path: Path) -> None:
    calls: list[int] = []

    def utility(source: LocalModel) -> dict[str, float | None]:
        calls.append(1)
        return {"one": 1.0}

    for seen in (3, 0):
        calls.clear()
        measure(toy_pair_seed0.aligned, prompts, tmp_path / "points.jsonl", utility=utility)
        assert len(calls) == seen
