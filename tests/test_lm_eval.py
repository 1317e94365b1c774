"""lm-eval on the model in memory: a local task, its accuracy against one computed here, and through the command line."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import RunCli, run_program

from lox_merge.errors import LoxMergeError, RequestError
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.lab.language import TOKEN
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import draw_requests
from lox_merge.safety.lm_eval_tasks import check_lm_eval, lm_eval_scores
from lox_merge.safety.loading import load_model

TASK = """task: toy_opening
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "<bos> {{{{request}}}} =>"
doc_to_choice: ["sure", "sorry"]
doc_to_target: label
metric_list:
  - metric: acc
"""


# lm-eval reads the files of the fourteen thousand tasks that it comes with before it knows one: half a minute. Here it comes with a folder.
WITH_TASKS = """
import sys
import lm_eval.tasks.manager
import lox_merge.cli.main
lm_eval.tasks.manager.__file__ = sys.argv[1] + "/manager.py"
lox_merge.cli.main.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Does the answer open with "sure" or with the refusal? Labels are drawn at random, so that no model gets all of them right."""
    folder = tmp_path_factory.mktemp("lm-eval")
    tests = draw_requests(ToyRecipe(seed=0)).tests
    generator = random.Random(0)
    rows = [{"request": request.text, "label": generator.randrange(2)} for request in (*tests.seen[:15], *tests.allowed[:15])]
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "toy_opening.yaml").write_text(TASK.format(data=folder / "toy.jsonl"))
    return folder


def expected_accuracy(model: torch.nn.Module, task: Path) -> float:
    rows = [json.loads(line) for line in (task / "toy.jsonl").read_text().splitlines()]
    tokens = torch.tensor([[TOKEN[word] for word in ("<bos>", *row["request"].split(), "=>")] for row in rows])
    with torch.no_grad():
        scores = model(input_ids=tokens).logits[:, -1]
    said = (scores[:, TOKEN["sorry"]] > scores[:, TOKEN["sure"]]).int().tolist()
    return sum(one == row["label"] for one, row in zip(said, rows, strict=True)) / len(rows)


def test_a_local_task_on_the_model_in_memory(task: Path, toy_pair_seed0: ToyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    loaded = load_model(toy_pair_seed0.aligned, device="cpu")
    before, drawn = {name: value.clone() for name, value in loaded.model.state_dict().items()}, torch.random.get_rng_state()
    scores = lm_eval_scores(loaded.model, loaded.tokenizer, [str(task / "toy_opening.yaml")])
    assert scores == {"toy_opening": {"acc": pytest.approx(expected_accuracy(loaded.model, task))}}
    assert 0.2 < scores["toy_opening"]["acc"] < 0.8
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), drawn), "measuring draws nothing from the caller's generator"


def test_a_task_that_fails_is_named(task: Path, toy_pair_seed0: ToyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    broken = tmp_path / "broken.yaml"
    broken.write_text((task / "toy_opening.yaml").read_text().replace("toy_opening", "broken").replace("{{request}}", "{{request.absent.more}}"))
    loaded = load_model(toy_pair_seed0.aligned, device="cpu")
    with pytest.raises(LoxMergeError, match=r"lm-eval failed with .*broken\.yaml: UndefinedError"):
        lm_eval_scores(loaded.model, loaded.tokenizer, [str(broken)])


def test_beside_attack_success_from_the_command_line(task: Path, toy_pair_seed0: ToyPair, tmp_path: Path, run_cli: RunCli) -> None:
    tests = draw_requests(ToyRecipe(seed=0)).tests
    (tmp_path / "prompts.txt").write_text("\n".join(request.text for request in tests.seen[:5]))
    (tmp_path / "questions.csv").write_text("question,answer\n" + "\n".join(f"{request.text},x" for request in tests.allowed[:3]))
    utility = (
        "--lm-eval",
        task / "toy_opening.yaml",
        "--utility-prompts",
        tmp_path / "prompts.txt",
        "--utility-questions",
        tmp_path / "questions.csv",
    )
    common = ("--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 2, "--no-cache", "--device", "cpu", "--replies", tmp_path / "replies")
    asked = ("asr", toy_pair_seed0.aligned, *common, *utility, "--json", tmp_path / "r.json")
    done = run_cli(*asked, cwd=tmp_path, HF_DATASETS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "fatal" not in done.stderr, "outside a repository nobody asks git for a version"
    (evaluation,) = json.loads((tmp_path / "r.json").read_text())["evaluations"]
    model = load_model(toy_pair_seed0.aligned, device="cpu").model
    assert evaluation["utility"] == {"exact match": 0.0, "KL": 0.0, "toy_opening acc": pytest.approx(expected_accuracy(model, task))}
    assert "toy_opening acc" in " ".join(done.stdout.split()) and max(map(len, done.stdout.splitlines())) <= 80


def test_what_cannot_be_run_is_named_before_any_model_is_loaded(task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    (tmp_path / "prompts.txt").write_text("v1\n")
    asked = ("asr", tmp_path / "no-model", "--prompts", tmp_path / "prompts.txt", "--lm-eval", "toy_opening,no_such_task")
    done = run_program(WITH_TASKS, task, *asked)
    assert done.returncode == 2 and "lm-eval knows no task no_such_task." in done.stderr, done.stderr
    done = run_cli("asr", tmp_path / "no-model", "--prompts", tmp_path / "prompts.txt", "--lm-eval-limit", 3)
    assert done.returncode == 2 and "--lm-eval-limit is for" in done.stderr
    served = run_cli(
        "asr", "x", "--prompts", tmp_path / "prompts.txt", "--utility-prompts", tmp_path / "prompts.txt", "--endpoint", "http://127.0.0.1:9/v1"
    )
    assert served.returncode == 2 and "leave out --utility" in served.stderr
    with pytest.raises(RequestError, match="no lm-eval task"):
        check_lm_eval([])
    (tmp_path / "syntax.yaml").write_text("task: [\n")
    (tmp_path / "other.yaml").write_text("name: !function utils.of\n")
    for file, message in (("absent.yaml", "cannot be read: No such file"), ("syntax.yaml", "is no YAML"), ("other.yaml", "is no lm-eval task")):
        with pytest.raises(RequestError, match=message):
            check_lm_eval([str(tmp_path / file)])
    check_lm_eval([str(task / "toy_opening.yaml")])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RequestError, match=r"pip install 'lox-merge\[lm-eval\]'"):
        check_lm_eval(["hellaswag"])
