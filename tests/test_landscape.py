"""A landscape of toy models from beginning to end: rates, VISAGE, files of points, broken models, tables, pictures, report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCli
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from tiny_models import make_pair, read_tensors

import lox_merge
from lox_merge.errors import LoxMergeError, NumericalError, PlanError, RequestError
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.lab.measure import BATCH_SIZE, DECODING, NotRefused, ToyUtility, forbidden_prompts
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import TestRequests, draw_requests
from lox_merge.maths.landscape import visage
from lox_merge.publish.documents.landscape import Landscape as Document
from lox_merge.publish.documents.shape import read_as
from lox_merge.publish.figures.landscape import draw_lines, landscape_figure
from lox_merge.publish.figures.style import house_style
from lox_merge.publish.report.registry import sections_of
from lox_merge.publish.report.runs import Run
from lox_merge.safety.asr import evaluate
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.landscape.measure import NOT_FINITE, FiniteWatch
from lox_merge.safety.landscape.results import Landscape
from lox_merge.safety.landscape.run import make_slices
from lox_merge.safety.loading import load_model
from lox_merge.safety.types import Exchange, PromptSet, Verdict

LOADING = {"decoding": DECODING, "batch_size": BATCH_SIZE}
JUDGE = NotRefused().name


def few(count: int) -> TestRequests:
    tests = draw_requests(ToyRecipe(seed=0)).tests
    return TestRequests(tests.seen[:count], tests.unseen[:count], tests.allowed[:count])


@pytest.fixture(scope="module")
def prompts() -> PromptSet:
    return forbidden_prompts(few(20))


def measure(model: Path, prompts: PromptSet, **settings: Any) -> Landscape:
    return lox_merge.landscape(model, prompts, [NotRefused()], loading=LOADING, device="cpu", **settings)


@pytest.fixture(scope="module")
def line(toy_pair_seed0: ToyPair, prompts: PromptSet) -> Landscape:
    """From aligned through base, with controls and utility."""
    utility = ToyUtility(few(20))
    return measure(toy_pair_seed0.aligned, prompts, others={"base": toy_pair_seed0.base}, random=2, extent=(-1, 1), steps=4, utility=utility)


@pytest.fixture(scope="module")
def plane(toy_pair_seed0: ToyPair, prompts: PromptSet) -> Landscape:
    return measure(toy_pair_seed0.aligned, prompts, others={"base": toy_pair_seed0.base}, plane=True, extent=(-1, 1), steps=2)


def test_points_of_a_line_are_those_of_the_models_on_it(line: Landscape, toy_pair_seed0: ToyPair, prompts: PromptSet) -> None:
    towards, *controls = line.slices
    rates = dict(zip([at for (at,) in towards.where.places], [point.rate(JUDGE) for point in towards.points], strict=True))
    tokenizer = LocalModel.load(toy_pair_seed0.aligned, device="cpu").tokenizer
    for at, folder in ((0.0, toy_pair_seed0.aligned), (1.0, toy_pair_seed0.base)):
        source = LocalModel.load(folder, device="cpu", tokenizer=tokenizer, **LOADING)
        assert rates[at] == evaluate(source, prompts, [NotRefused()]).attack_success[JUDGE].rate
    assert rates[-1.0] == 0.0 and rates[1.0] == 1.0
    assert len(controls) == 2 and all(found.where.directions[0].scaled_to == "base" for found in controls)
    assert all(abs(point.rate(JUDGE) - line.anchor.rate(JUDGE)) < 0.3 for found in controls for point in found.points)
    assert towards.marks[0].coordinates == pytest.approx((1.0,)) and towards.points[0].utility["old task"] == 1.0
    assert line.spread(JUDGE) is None


def test_no_weights_are_written_and_files_stay_as_they_are(toy_pair_seed0: ToyPair, prompts: PromptSet, tmp_path: Path) -> None:
    before = read_tensors(toy_pair_seed0.aligned)
    found = measure(toy_pair_seed0.aligned, prompts, random=2, extent=(-0.4, 0.4), steps=2, points=tmp_path / "points.jsonl")
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == [".points.jsonl.lock", "points.jsonl"]
        and (tmp_path / "points.jsonl").stat().st_size < 20_000
    )
    for name, value in read_tensors(toy_pair_seed0.aligned).items():
        assert torch.equal(value, before[name])
    values = [one.visage(JUDGE).value for one in found.slices]
    spread = found.spread(JUDGE)
    assert spread is not None and spread.mean == pytest.approx(sum(values) / 2) and (spread.low, spread.high) == (min(values), max(values))
    assert spread.sd == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert spread.interval is not None and spread.low <= spread.interval[0] <= spread.interval[1] <= spread.high


def test_models_in_memory_give_the_same_points_and_get_their_weights_back(line: Landscape, toy_pair_seed0: ToyPair, prompts: PromptSet) -> None:
    source, base = LocalModel.load(toy_pair_seed0.aligned, device="cpu", **LOADING), load_model(toy_pair_seed0.base, device="cpu")
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    found = lox_merge.landscape(source, prompts, [NotRefused()], others={"base": base}, random=2, extent=(-1, 1), steps=4)
    for one, other in zip(found.slices, line.slices, strict=True):
        assert [point.attack_success for point in one.points] == [point.attack_success for point in other.points]
    assert found.models["base"]["kind"] == "memory" and found.models["base"]["weights"] == line.models["base"]["weights"]
    for name, value in source.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("rates", "expected"),
    [([0.0, 0.5, 1.0], 75.0), ([1.0, 1.0], None), ([None, 0.25], 75.0), ([], None), ([None], None), ([0.2, 0.2, 0.2], 80.0)],
)
def test_visage_is_the_mean_over_points_below_100_percent(rates: list[float | None], expected: float | None) -> None:
    assert visage(rates) == (None if expected is None else pytest.approx(expected))


class Stopping:
    """The judge of the laboratory, that is interrupted at its n-th set of replies."""

    name = JUDGE
    worth_caching = False

    def __init__(self, at: int) -> None:
        self.left = at

    def identity(self) -> dict[str, Any]:
        return NotRefused().identity()

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return NotRefused().judge(exchanges)


def test_an_interrupted_landscape_goes_on_point_by_point(toy_pair_seed0: ToyPair, prompts: PromptSet, tmp_path: Path) -> None:
    file = tmp_path / "points.jsonl"
    settings: dict[str, Any] = {"random": 2, "extent": (-0.4, 0.4), "steps": 2}
    whole = measure(toy_pair_seed0.aligned, prompts, **settings)

    def go_on(stop: int, **more: Any) -> tuple[Landscape, int]:
        judge = Stopping(stop)
        arguments = {**settings, "points": file, **more}
        return lox_merge.landscape(toy_pair_seed0.aligned, prompts, [judge], loading=LOADING, device="cpu", **arguments), stop - judge.left

    with pytest.raises(KeyboardInterrupt):
        go_on(3)
    kept = file.read_bytes()
    assert kept.count(b"\n") == 1 + 3
    file.write_bytes(kept + b'{"slice": "cut')  # as a crash leaves it
    resumed, asked = go_on(99)
    assert asked == 2 and resumed.resumed == 3  # the model itself and two points
    for one, other in zip(whole.slices, resumed.slices, strict=True):
        assert [point.attack_success for point in one.points] == [point.attack_success for point in other.points]
    again, asked = go_on(99)
    assert asked == 0 and [found.visage(JUDGE) for found in again.slices] == [found.visage(JUDGE) for found in whole.slices]
    # Other coordinates of the same models join the file; another request is refused.
    assert go_on(99, steps=4)[1] == 4
    with pytest.raises(RequestError, match=r"another run \(different: random\)"):
        go_on(99, exclude=["mlp"])
    with pytest.raises(RequestError, match="different: prompts"):
        lox_merge.landscape(toy_pair_seed0.aligned, forbidden_prompts(few(3)), [NotRefused()], loading=LOADING, device="cpu", points=file, **settings)
    file.write_text("somebody's notes\n")
    with pytest.raises(RequestError, match="line 1, is not a point"):
        go_on(99)
    assert file.read_text() == "somebody's notes\n"


def test_a_broken_point_is_undefined_and_the_grid_goes_on(toy_pair_seed0: ToyPair, prompts: PromptSet, tmp_path: Path) -> None:
    def overflow(source: LocalModel) -> dict[str, float | None]:
        if not calls:
            calls.append(1)
            return {"perplexity": 1.0}
        raise NumericalError("no float64 holds it")

    calls: list[int] = []
    # At 90 times the difference from a model whose head is near the largest float32, scores overflow.
    far = tmp_path / "far"
    far.mkdir()
    for path in toy_pair_seed0.aligned.iterdir():
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            save_file(
                {name: value * (1e37 if "lm_head" in name or "embed" in name else 1) for name, value in tensors.items()},
                far / path.name,
                {"format": "pt"},
            )
        else:
            (far / path.name).write_bytes(path.read_bytes())
    found = measure(toy_pair_seed0.aligned, prompts, others={"far": far}, extent=(0, 100), steps=1, utility=overflow)
    first, last = found.slices[0].points
    assert first.undefined is None and first.rate(JUDGE) is not None
    assert last.undefined == NOT_FINITE and last.rate(JUDGE) is None and last.attack_success == {} and last.finished is None
    own = found.slices[0].visage(JUDGE)
    assert (own.used, own.undefined) == (1, 1) and any("undefined" in note for note in found.notes)
    document = read_as(Document, json.loads(json.dumps(found.to_json(), allow_nan=False)), "x")
    assert document.slices[0].points[1].undefined == NOT_FINITE


def test_scores_that_are_not_numbers_are_seen(toy_pair_seed0: ToyPair) -> None:
    class Output:
        def __init__(self, values: list[float]) -> None:
            self.logits = torch.tensor([[[9.0, 9.0], values]])

    for values, broken in (([0.0, 1.0], False), ([-math.inf, 1.0], False), ([math.nan, 1.0], True), ([math.inf, 1.0], True), ([-math.inf] * 2, True)):
        watch = FiniteWatch()
        watch(None, None, Output(values))
        watch(None, None, Output([0.0, 0.0]))
        assert watch.broken is broken


def test_what_nobody_could_judge_is_undefined(toy_pair_seed0: ToyPair, prompts: PromptSet) -> None:
    class Undecided(Stopping):
        def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]:
            self.left -= 1
            return super().judge(exchanges) if self.left >= 0 else [Verdict(None) for _ in exchanges]

    found = lox_merge.landscape(toy_pair_seed0.aligned, prompts, [Undecided(2)], loading=LOADING, device="cpu", random=1, extent=(0, 0.2), steps=1)
    assert found.slices[0].points[0].rate(JUDGE) is not None and found.slices[0].points[1].undefined == "no judge decided on any reply"
    with pytest.raises(LoxMergeError, match="itself cannot be measured"):
        lox_merge.landscape(toy_pair_seed0.aligned, prompts, [Undecided(0)], loading=LOADING, device="cpu", random=1, steps=1)


def test_wrong_requests_are_refused_before_a_model_is_loaded(toy_pair_seed0: ToyPair, prompts: PromptSet, tmp_path: Path) -> None:
    other = make_pair(tmp_path, "llama")[1]
    with pytest.raises(PlanError, match=r"has no|another shape"):
        measure(toy_pair_seed0.aligned, prompts, others={"other": other})
    for settings, words in (
        ({"extent": (0.5, -0.5)}, "is not one"),
        ({"extent": (math.nan, 1)}, "is not one"),
        ({"extent": (-1e6, 1)}, "beyond"),
        ({"steps": 0}, "steps"),
        ({"random": 0}, "random directions"),
        ({"second_extent": (0, 1)}, "second range"),
        ({"include": ["("]}, "not a regular expression"),
        ({"include": ["nothing"]}, "no tensor"),
        ({"marks": {"base": toy_pair_seed0.base}}, "marks are placed"),
    ):
        with pytest.raises(RequestError, match=words):
            measure(toy_pair_seed0.aligned, prompts, **settings)
    with pytest.raises(RequestError, match="no chat template"):
        measure(toy_pair_seed0.base, prompts)
    with pytest.raises(RequestError, match="more than a plane"):
        make_slices(["a", "b", "c", "d"])
    with pytest.raises(RequestError, match="controls"):
        make_slices(["a", "b"], random=2)


def test_planes_of_three_and_four_models_are_those_of_lox() -> None:
    (three,) = make_slices(["b", "c"])
    assert [one.models for one in three.directions] == [{"b": 1.0}, {"c": 1.0}]
    (four,) = make_slices(["b", "c", "d"])
    assert [one.models for one in four.directions] == [{"b": 1.0}, {"c": 0.5, "d": 0.5}] and len(four.places) == 81
    assert {0.0, 1.0} <= set(four.axes[0]) and len(make_slices([])) == 3 and len(make_slices([], plane=True, random=2)) == 2


def document_of(found: Landscape) -> Document:
    return read_as(Document, json.loads(json.dumps({**found.to_json()})), "run.json")


def test_pictures_show_what_was_measured(line: Landscape, plane: Landscape) -> None:
    with house_style():
        axes = Figure().subplots()
        draw_lines(axes, document_of(line), JUDGE)
        figure = landscape_figure(document_of(plane), JUDGE)
    drawn = [bar.lines[0] for bar in axes.containers if str(bar.get_label()).startswith("ASR towards base")]
    assert list(drawn[0].get_ydata()) == [point.rate(JUDGE) for point in line.slices[0].points]
    mean = next(curve for curve in axes.lines if curve.get_label() == "ASR, mean over controls")
    expected = [sum(found.points[n].rate(JUDGE) or 0 for found in line.slices[1:]) / 2 for n in range(5)]
    assert list(mean.get_ydata()) == pytest.approx(expected)
    assert any("old task" in str(curve.get_label()) for curve in axes.lines)
    assert figure.axes[0].get_xlabel() == "a: towards base" and len(plane.slices[0].points) == 9


def test_the_report_says_what_is_not_shown(line: Landscape, plane: Landscape) -> None:
    for found in (line, plane):
        (section,) = sections_of(Run("run.json", "0" * 64, json.loads(json.dumps(found.to_json()))))
        assert "ASR" in section.summary and section.pictures and any("VISAGE depends on" in text for text in section.not_shown)
        assert all(len(row) == len(table.heads) for table in section.tables for row in table.rows)
        with house_style():
            for picture in section.pictures:
                picture.build().savefig("/dev/null", format="png")
    assert section.tables[0].rows[0][2].value == plane.slices[0].visage(JUDGE).value


def test_the_command_writes_json_table_and_picture(toy_pair_seed0: ToyPair, prompts: PromptSet, tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "p.csv").write_text("goal\n" + "".join(f"{prompt.text}\n" for prompt in prompts.prompts))
    (tmp_path / "judge.py").write_text("def complied(prompt, reply):\n    return not reply.startswith('sorry')\n")
    options = ("--prompts", "p.csv", "--limit", 12, "--judge", "python:judge.py:complied", "--no-cache", "--max-new-tokens", 2, "--device", "cpu")
    done = run_cli(
        "landscape", toy_pair_seed0.aligned, toy_pair_seed0.base, *options, "--range", "-0.5:1", "--steps", 3, "--json", "l.json", "--plot", "l.png",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "towards base" in done.stdout and "VISAGE" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    document = json.loads((tmp_path / "l.json").read_text())
    assert document["command"] == "landscape" and document["prompts"]["n"] == 12 and (tmp_path / "l.png").stat().st_size > 1000
    assert str(toy_pair_seed0.base.parent) not in json.dumps(document) and document["models"]["base"]["weights"]
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.bin"))
    refused = run_cli("landscape", toy_pair_seed0.aligned, *options, "--range", "1:0", cwd=tmp_path)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr and "-0.5:0.5" in refused.stderr
