"""Rank and alpha by behaviour: the front is the front, a study goes on, and nothing is written without being picked."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from adapters import edit_config, make_adapter
from conftest import RunCli
from safetensors.torch import load_file

from lox_merge.cli.main import cli
from lox_merge.errors import LoxMergeError, LoxMergeWarning, RequestError
from lox_merge.jobs.harden import harden, plan_hardening, with_recipe
from lox_merge.jobs.recipe import Recipe
from lox_merge.lab.attacks import harmful_attack
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import draw_requests
from lox_merge.safety.divergence import kl_divergence, reference_log_probabilities
from lox_merge.safety.loading import load_model
from lox_merge.safety.prompts import load_prompts
from lox_merge.safety.tune_study import open_study, tuning_of
from lox_merge.safety.tuner import run_trials
from lox_merge.safety.tuning import TuneSpace
from lox_merge.safety.types import AttackSuccess

JUDGE = "def complied(prompt, reply):\n    return not reply.startswith('sorry')\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    requests = draw_requests(ToyRecipe(seed=0))
    (folder / "prompts.txt").write_text("\n".join(request.text for request in requests.tests.seen[:40]))
    (folder / "harmless.txt").write_text("\n".join(request.text for request in requests.tests.allowed[:20]))
    attack = harmful_attack(ToyRecipe(seed=0)).data
    (folder / "attack.jsonl").write_text("".join(json.dumps({"messages": list(turns)}) + "\n" for turns in attack.conversations))
    (folder / "judge.py").write_text(JUDGE)
    return folder


def arguments(pair: ToyPair, files: Path, *more: object) -> list[str]:
    data = ("--prompts", files / "prompts.txt", "--utility-prompts", files / "harmless.txt", "--attack", files / "attack.jsonl")
    settings = ("--attack-steps", 12, "--attack-batch-size", 32, "--learning-rate", "1e-4", "--max-new-tokens", 2, "--no-cache", "--device", "cpu")
    judge = ("--judge", f"python:{files / 'judge.py'}:complied")
    return list(map(str, ("search", pair.base, pair.aligned, "--tune", *data, *settings, *judge, *more)))


def test_a_study_from_the_command_line_goes_on_and_is_picked_from(toy_pair_seed0: ToyPair, files: Path, tmp_path: Path, run_cli: RunCli) -> None:
    study = ("--study", tmp_path / "study.log", "--rank-range", "2-8", "--json", tmp_path / "r.json")
    first = run_cli(*arguments(toy_pair_seed0, files, *study, "--trials", 2))
    assert first.returncode == 0, first.stderr
    before = json.loads((tmp_path / "r.json").read_text())
    again = run_cli(*arguments(toy_pair_seed0, files, *study, "--trials", 4, "--plot", tmp_path / "front.svg"))
    assert again.returncode == 0, again.stderr
    result = json.loads((tmp_path / "r.json").read_text())
    assert [trial["number"] for trial in result["trials"]] == [0, 1, 2, 3]
    figures = ("recipe", "attack", "divergence")
    assert [[trial[key] for key in figures] for trial in result["trials"][:2]] == [[trial[key] for key in figures] for trial in before["trials"]]
    assert "aligned, attacked" in first.stderr and "aligned, attacked" not in again.stderr
    settings = {(trial["recipe"]["rank"], trial["recipe"]["alpha"]) for trial in result["trials"]}
    assert len(settings) == 4 and ("6", 1.25) in settings, "the paper's setting first, then others"
    assert all(2 <= int(trial["recipe"]["rank"]) <= 8 and 0.25 <= trial["recipe"]["alpha"] <= 2 for trial in result["trials"])
    # The front against its definition.
    points = {trial["number"]: (trial["attack"]["rate"], trial["divergence"]) for trial in result["trials"]}
    beaten = {n for n, (a, k) in points.items() for b, j in points.values() if b <= a and j <= k and (b, j) != (a, k)}
    assert set(result["front"]) == set(points) - beaten and result["aligned"]["rate"] >= 0.6
    assert min(rate for rate, _ in points.values()) <= 0.4, "some hardening withstands what breaks the aligned model"
    assert "<svg" in (tmp_path / "front.svg").read_text()[:600]
    assert max(map(len, again.stdout.splitlines())) <= 80 and "--pick TRIAL" in again.stdout
    assert str(tmp_path) not in json.dumps(result) and str(toy_pair_seed0.base) not in json.dumps(result)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".lock") == ["front.svg", "r.json", "study.log"]
    # Picking hardens as the trial says, and measures nothing.
    number = result["front"][0]
    picked = run_cli(*arguments(toy_pair_seed0, files, "--study", tmp_path / "study.log", "--pick", number, "--write", tmp_path / "out"))
    assert picked.returncode == 0 and "attacked" not in picked.stderr, picked.stderr
    recipe = Recipe.from_json(result["trials"][number]["recipe"])
    own = harden(toy_pair_seed0.base, toy_pair_seed0.aligned, tmp_path / "own", recipe=recipe, device="cpu").out
    for file in own.glob("*.safetensors"):
        expected, found = load_file(file), load_file(tmp_path / "out" / file.name)
        assert all(torch.allclose(found[name], value, rtol=1e-5, atol=1e-7) for name, value in expected.items())
    # The divergence that was optimised is that of the written model.
    harmless = load_prompts(files / "harmless.txt")
    aligned, hardened = (load_model(path, device="cpu") for path in (toy_pair_seed0.aligned, tmp_path / "out"))
    reference = reference_log_probabilities(aligned.model, aligned.tokenizer, harmless, last=8)
    assert kl_divergence(reference, hardened.model).value == pytest.approx(result["trials"][number]["divergence"], rel=1e-4)
    picking = ("--study", tmp_path / "study.log", "--pick", number, "--write", tmp_path / "x")
    elsewhere = run_cli(*arguments(toy_pair_seed0, files, *picking, "--include", "q_proj"))
    assert elsewhere.returncode == 2 and "--include is not what study.log was made with" in elsewhere.stderr and not (tmp_path / "x").exists()
    other = run_cli(*arguments(toy_pair_seed0, files, *study, "--seed", 5))
    assert other.returncode == 2 and "of another request (different: recipe, seed)" in other.stderr
    swapped = ToyPair(toy_pair_seed0.aligned, toy_pair_seed0.base)
    wrong = run_cli(*arguments(swapped, files, "--study", tmp_path / "study.log", "--pick", 0, "--write", tmp_path / "x", "--order-is-right"))
    assert wrong.returncode == 2 and "a study of another pair" in wrong.stderr and not (tmp_path / "x").exists()


class Measured:
    """A tuner whose figures follow from the setting: safer with more alpha, further from aligned with it."""

    def __init__(self, failing: bool = False) -> None:
        self.asked: list[Recipe | None] = []
        self._failing = failing

    def measure(self, recipe: Recipe | None) -> tuple[AttackSuccess, float]:
        self.asked.append(recipe)
        if recipe is not None and self._failing:
            raise LoxMergeError("the attack went wrong")
        alpha = 0.0 if recipe is None else recipe.alpha
        successes = 100 - round(40 * alpha)
        return AttackSuccess(100, 100, successes, 0, successes / 100, (0.0, 1.0), None), alpha**2


IDENTITY = {"space": {"ranks": [1, 4], "alphas": [0.5, 2.0], "groups": ["mlp"]}, "recipe": Recipe().to_json()}


def test_trials_count_over_interruptions_and_failures(tmp_path: Path) -> None:
    space = TuneSpace((1, 4), (0.5, 2.0), ("mlp",))
    tuner: Any = Measured()
    run_trials(open_study(tmp_path / "s.log", IDENTITY, 0), space, tuner, Recipe(), 3)
    failing: Any = Measured(failing=True)
    with pytest.warns(LoxMergeWarning, match="trial 3 has no figures: the attack went wrong"):
        found = run_trials(open_study(tmp_path / "s.log", IDENTITY, 0), space, failing, Recipe(), 4)
    assert found.failed == {3: "the attack went wrong"} and [trial.number for trial in found.trials] == [0, 1, 2]
    found = run_trials(open_study(tmp_path / "s.log", IDENTITY, 0), space, tuner, Recipe(), 5)
    assert [trial.number for trial in found.trials] == [0, 1, 2, 4, 5] and tuner.asked.count(None) == 1
    assert found == tuning_of(open_study(tmp_path / "s.log", IDENTITY, 0))
    first = found.trial(0).recipe
    assert (str(first.rank), first.alpha) == ("4", 1.25), "the paper's setting, moved into the space"
    assert [pattern for pattern, _ in first.rank_pattern] == ["mlp"] and [pattern for pattern, _ in first.alpha_pattern] == ["mlp"]
    assert len({json.dumps(trial.recipe.to_json()) for trial in found.trials}) == 5
    rates = [trial.attack.rate for trial in found.front]
    assert rates == sorted(rates) and len(found.front) == len({trial.recipe.alpha for trial in found.trials}), "every alpha is on this front"
    with pytest.raises(RequestError, match="no finished trial 3"):
        found.trial(3)


def test_a_study_killed_in_its_first_trial_asks_the_papers_setting_again(tmp_path: Path) -> None:
    class Killed(Measured):
        def measure(self, recipe: Recipe | None) -> tuple[AttackSuccess, float]:
            if recipe is not None:
                raise KeyboardInterrupt
            return super().measure(recipe)

    space, killed, tuner = TuneSpace((1, 8), (0.5, 2.0), ("mlp",)), Killed(), Measured()
    with pytest.raises(KeyboardInterrupt):
        run_trials(open_study(tmp_path / "s.log", IDENTITY, 0), space, cast("Any", killed), Recipe(), 3)
    found = run_trials(open_study(tmp_path / "s.log", IDENTITY, 0), space, cast("Any", tuner), Recipe(), 2)
    assert [trial.number for trial in found.trials] == [1, 2]
    settings = [(str(trial.recipe.rank), trial.recipe.alpha) for trial in found.trials]
    assert settings[0] == ("6", 1.25) and settings[1] != settings[0]


def test_a_plan_follows_another_recipe(toy_pair_seed0: ToyPair, tmp_path: Path) -> None:
    recipe = Recipe(rank=3, alpha=0.7, rank_pattern=(("q_proj", 2),), alpha_pattern=(("mlp", 0.1),), exclude=("lm_head",))
    direct = plan_hardening(toy_pair_seed0.base, toy_pair_seed0.aligned, tmp_path / "out", recipe=recipe)
    other = plan_hardening(toy_pair_seed0.base, toy_pair_seed0.aligned, tmp_path / "out", recipe=Recipe(exclude=("lm_head",)))
    changed = with_recipe(other, recipe)
    assert changed.tensors == direct.tensors and changed.recipe == recipe


def test_wrong_requests(toy_pair_seed0: ToyPair, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.txt").write_text("not a study\n")

    def asked(*more: object) -> Any:
        return cli.main(arguments(toy_pair_seed0, files, *more), standalone_mode=False)

    for more, message in (
        (("--ranks", "1,2"), "--ranks does not go with --tune"),
        (("--dtype", "bfloat16"), "--dtype does not go with --tune"),
        (("--write", tmp_path / "out"), "writes none"),
        (("--pick", 1), "needs --study FILE and --write OUT"),
        (("--rank-range", "3"), "is not LOW-HIGH"),
        (("--rank-range", "8-2"), "leave nothing to choose"),
        (("--rank-range", "1.5-2"), "two whole numbers"),
        (("--alpha-range", "0-2"), "above 0"),
        (("--alpha-range", "0.0004-2"), "told apart to 0.001, and 0.0004 is less"),
        (("--alpha", "1.25"), "--alpha does not go with --tune, which chooses it"),
        (("--rho", "0.1"), "--rho does not go with --tune"),
        (("--dtype", "auto"), "--dtype does not go with --tune"),
        (("--group", "("), "not a regular expression"),
        (("--group", "no_such_tensor"), "matches no tensor that is edited"),
        (("--study", tmp_path / "other.txt"), "is not a study"),
        (("--study", tmp_path / "none" / "study.log"), "there is no folder"),
        (("--study", tmp_path / "none.log", "--pick", 1, "--write", tmp_path / "out"), "there is no study"),
    ):
        with pytest.raises(RequestError, match=message):
            asked(*more)
    assert (tmp_path / "other.txt").read_text() == "not a study\n"
    plain = ["search", str(toy_pair_seed0.base), str(toy_pair_seed0.aligned), "--prompts", str(files / "prompts.txt")]
    for more, message in (
        (["--attack", "x.jsonl"], "--attack goes with --tune"),
        (["--trials", "20"], "--trials goes with --tune"),
        (["--rank-range", "1-4", "--lora"], "--lora goes with --tune"),
        (["--pick", "0"], "--pick goes with --tune"),
        (["--tune"], "--tune needs --attack"),
    ):
        with pytest.raises(RequestError, match=message):
            cli.main([*plain, *more], standalone_mode=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RequestError, match=r"pip install 'lox-merge\[tune\]'"):
        asked()


def test_an_adapter_is_tuned_and_picked_over_a_base_of_another_name(toy_pair_seed0: ToyPair, files: Path, tmp_path: Path, run_cli: RunCli) -> None:
    adapter = make_adapter(toy_pair_seed0.base, tmp_path / "adapter", chat=False, r=2)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (toy_pair_seed0.aligned / file).exists():
            shutil.copy(toy_pair_seed0.aligned / file, adapter)
    edit_config(adapter, base_model_name_or_path="elsewhere/another")
    few = ("--attack-steps", 1, "--trials", 1, "--study", tmp_path / "study.log", "--rank-range", "1-2", "--base-is-right")
    pair = ToyPair(toy_pair_seed0.base, adapter)
    done = run_cli(*arguments(pair, files, *few, "--alpha-range", "0.5-2"))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    picked = run_cli("search", *map(str, (pair.base, adapter)), *arguments(pair, files, *few)[3:], "--pick", "0", "--write", out)
    assert picked.returncode == 0 and (out / "lox_merge.json").is_file(), picked.stderr


def test_a_study_without_any_figures_fails(toy_pair_seed0: ToyPair, files: Path, run_cli: RunCli) -> None:
    done = run_cli(*arguments(toy_pair_seed0, files, "--attack-steps", 1, "--trials", 1, "--alpha-range", f"{1e30:.0f}-{1e38:.0f}"))
    assert done.returncode == 1 and "no trial gave figures" in done.stderr, done.stderr
    assert "None of these is best" not in done.stdout and "--pick TRIAL" not in done.stdout
