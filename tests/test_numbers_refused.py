"""Numbers that no measurement can work with: NaN, infinity, seeds of no generator, sizes beyond any machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy
import pytest
import torch

import lox_merge
from lox_merge.cli.main import _COMMANDS, cli
from lox_merge.cli.options import number
from lox_merge.diagnostics.curvature.hessian import twice_differentiable
from lox_merge.diagnostics.curvature.settings import CurvatureSettings
from lox_merge.diagnostics.settings import InspectSettings
from lox_merge.diagnostics.watch.settings import WatchSettings
from lox_merge.errors import RequestError
from lox_merge.maths.update import Update
from lox_merge.safety.attack import AttackSettings
from lox_merge.safety.endpoint import EndpointModel
from lox_merge.safety.judges.factory import JudgeOptions, make_judge
from lox_merge.safety.judges.inspect_judge import InspectJudge
from lox_merge.safety.judges.keyword import KeywordJudge
from lox_merge.safety.judges.openai_judge import OpenAIJudge
from lox_merge.safety.judges.python_judge import PythonJudge
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.robustness import compare_under_attack
from lox_merge.safety.seeds import check_seed
from lox_merge.safety.types import Prompt

NOT_FINITE = (math.nan, math.inf, -math.inf)
BAD_SEEDS = (-1, 2**32, 9999999999999999999)


def refused(*arguments: object) -> str:
    """The message of a command that is refused before anything is loaded."""
    with pytest.raises((RequestError, click.UsageError)) as error:
        cli.main([str(argument) for argument in arguments], standalone_mode=False)
    assert error.value.exit_code == 2
    return str(error.value) if isinstance(error.value, RequestError) else error.value.format_message()


@pytest.fixture
def judge_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "how do i", "response": "you cannot"}\n')
    (tmp_path / "judge.py").write_text("def score(prompt, reply):\n    return 1.0\n")
    return "judge.py:score"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_options_that_are_numbers_are_finite(text: str, judge_file: str) -> None:
    with pytest.raises(RequestError, match=r"--rho: .* is not a finite number"):
        number(text, "--rho")
    pair, prompts = ("base", "aligned"), ("--prompts", "p.txt")
    judged = (*prompts, "--judge", f"python:{judge_file}")
    attack = (*pair, "--attack", "rows.jsonl", *prompts)
    for arguments in (
        ("asr", "model", *judged, f"--threshold={text}"),
        ("asr", "model", *prompts, "--judge", "openai:grader", f"--judge-temperature={text}"),
        ("search", *pair, *judged, f"--rho={text}"),
        ("landscape", "model", *judged, "--range", f"{text}:1"),
        ("robustness", *attack, f"--learning-rate={text}"),
        ("robustness", *attack, f"--adam-beta2={text}"),
        ("curvature", "model", "--completions", "rows.jsonl", f"--memory={text}"),
        ("curvature", "model", "--completions", "rows.jsonl", f"--energy={text}"),
        ("activations", *pair, "--pairs", "rows.jsonl", f"--eta={text}"),
        ("inspect", *pair, f"--fractions={text}"),
    ):
        assert f"'{text}' is not a finite number" in refused(*arguments), arguments


def test_other_numbers_out_of_range_are_refused(judge_file: str) -> None:
    curvature = ("curvature", "model", "--completions", "rows.jsonl")
    attack = ("robustness", "base", "aligned", "--attack", "rows.jsonl", "--prompts", "p.txt")
    for arguments, words in (
        ((*curvature, "--memory", "1e300"), "--memory '1e300' is not an amount of memory"),
        ((*curvature, "--memory", "0"), "--memory '0' is not an amount of memory"),
        ((*curvature, "--limit", "5,6"), "--limit '5,6' is neither all nor a whole number"),
        ((*attack, "--adam-beta2", "2"), "adam_beta2 is 2.0"),
        ((*attack, "--seeds", "9999999999999999999"), "the seed 9999999999999999999 is not a whole number from 0 to 4294967295"),
        ((*attack, "--seeds", "0,-1"), "the seed -1"),
        (("asr", "model", "--prompts", "p.txt", "--max-new-tokens", "0"), "0 is not in the range"),
    ):
        assert words in refused(*arguments), arguments


@pytest.mark.parametrize("name", [name for name in sorted(_COMMANDS) if name != "yaml"])
@pytest.mark.parametrize("seed", BAD_SEEDS)
def test_every_seed_option_takes_the_same_range(name: str, seed: int) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for option in command.params:
        if option.name == "seed":
            with pytest.raises(click.BadParameter, match="is not in the range 0<=x<=4294967295"):
                option.type.convert(str(seed), option, None)


@pytest.mark.parametrize("seed", [*BAD_SEEDS, 1.5, True])
def test_functions_refuse_seeds_before_they_load_a_model(seed: Any) -> None:
    prompts = prompt_set([Prompt("0", "how", None)], "one")
    calls: tuple[Callable[[], object], ...] = (
        lambda: lox_merge.behaviour("base", "aligned", next_tokens=["how"], seed=seed),
        lambda: lox_merge.activations("base", "aligned", pairs=["pairs.jsonl"], seed=seed),
        lambda: lox_merge.framing(["model"], "first.jsonl", "second.jsonl", seed=seed),
        lambda: lox_merge.landscape("model", prompts, [KeywordJudge()], seed=seed),
        lambda: lox_merge.brittleness("base", "aligned", prompts, KeywordJudge(), seed=seed),
        lambda: compare_under_attack("base", "aligned", None, [], prompts, [KeywordJudge()], seeds=[0, seed]),
        lambda: CurvatureSettings(seed=seed),
        lambda: WatchSettings(seed=seed),
        lambda: InspectSettings(seed=seed),
    )
    for call in calls:
        # Settings look at the type first.
        with pytest.raises(RequestError, match=f"the seed {seed!r} is not a whole number from 0 to 4294967295|seed is {seed!r}; use a whole number"):
            call()


def test_a_seed_of_numpy_s_is_python_s_own() -> None:
    for seed in (numpy.int64(3), numpy.uint32(3)):
        found = check_seed(seed)
        assert found == 3 and type(found) is int
    with pytest.raises(RequestError, match=r"the seed .*3\.0.* is not"):
        check_seed(numpy.float64(3))


@pytest.mark.parametrize("value", NOT_FINITE)
def test_settings_and_judges_refuse_what_is_not_finite(value: float, judge_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    url = "http://localhost:1/v1"
    for make, words in (
        (lambda: PythonJudge(judge_file, threshold=value), "is not a finite number"),
        (lambda: InspectJudge(judge_file, threshold=value), "is not a finite number"),
        (lambda: make_judge(f"python:{judge_file}", JudgeOptions(threshold=value)), "is not a finite number"),
        (lambda: OpenAIJudge("m", threshold=value), "not a score above 1"),
        (lambda: OpenAIJudge("m", temperature=value), "temperature"),
        (lambda: OpenAIJudge("m", timeout=value), "timeout"),
        (lambda: EndpointModel(url, "m", timeout=value, no_key=True), "timeout"),
        (lambda: AttackSettings(learning_rate=value), "learning rate"),
        (lambda: AttackSettings(adam_beta2=value), "adam_beta2"),
        (lambda: AttackSettings(weight_decay=value), "weight_decay"),
        (lambda: AttackSettings(max_grad_norm=value), "max_grad_norm"),
        (lambda: CurvatureSettings(energy=value), "energy"),
        (lambda: CurvatureSettings(learning_rate=value), "learning rate"),
        (lambda: WatchSettings(overhead=value), "overhead"),
        (lambda: WatchSettings(threshold={"projection": value}), "threshold"),
    ):
        with pytest.raises(RequestError, match=words):
            make()  # type: ignore[no-untyped-call]
    assert AttackSettings(adam_beta2=0.0, weight_decay=0.1, max_grad_norm=0.0).adam_beta2 == 0.0


def test_only_a_refused_kernel_is_called_attention_that_cannot_be_differentiated() -> None:
    """What goes wrong inside keeps its own words."""

    class Model(torch.nn.Module):
        def __init__(self, fails: bool) -> None:
            super().__init__()
            self.fails, self.config = fails, type("Config", (), {"_attn_implementation": "sdpa"})()

        def set_attn_implementation(self, name: str) -> None:
            if self.fails and name == "eager":
                raise ValueError("none here")

    with pytest.raises(ValueError, match=r"^a seed of the body$"), twice_differentiable(Model(fails=False), []):
        raise ValueError("a seed of the body")
    with pytest.raises(RequestError, match=r"no plain attention to differentiate twice \(none here\)"), twice_differentiable(Model(fails=True), []):
        pass


def test_the_norm_of_factors_that_cancel_is_zero() -> None:
    """<LᵀL, RᵀR> of an update that is zero by cancellation is a sum of large terms: rounding may leave it below 0."""
    generator = torch.Generator().manual_seed(0)
    norms = []
    for _ in range(200):
        column, row = torch.randn(7, 1, generator=generator) * 1e3, torch.randn(9, 1, generator=generator) * 1e3
        update = Update(torch.cat([column, -column, column], 1), torch.cat([row, row * 3, row * 2], 1))
        norms.append((float(update.squared_norm(None)), update.norm(None)))
    assert min(square for square, _ in norms) < 0  # else this test shows nothing
    assert all(norm == math.sqrt(max(square, 0.0)) for square, norm in norms)
