"""Aligned and hardened toy models under the same fine-tuning attacks: in the process for figures, once from the command line."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attack_runs import attacked, settings_of
from conftest import RunCli
from tiny_models import make_pair

from lox_merge.checkpoint.checkpoint import open_checkpoint
from lox_merge.cli.main import cli
from lox_merge.errors import NumericalError, RequestError
from lox_merge.jobs.harden import harden, plan_hardening
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.safety.attack import AttackSettings, fine_tune
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import IGNORED, load_conversations, tokenised
from lox_merge.safety.decoding import Decoding, end_tokens
from lox_merge.safety.dispersion import Dispersion
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.loading import load_model
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.robustness import Robustness
from lox_merge.safety.starting_points import CONTROLS, set_starting_point
from lox_merge.safety.types import Prompt


def rate(result: Robustness, model: str, step: int, seed: int = 0) -> float:
    (figures,) = result.curve(result.attacks[0].name, model, seed).point(step).evaluation.attack_success.values()
    assert figures.rate is not None and figures.judged == 100
    return figures.rate


@pytest.fixture
def private_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary and working folder of their own, in which whatever is written would be found."""
    folder = tmp_path / "private"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.chdir(folder)
    yield folder


def test_lox_delays_a_harmful_attack_and_nothing_is_written(toy_pair_seed0: ToyPair, attack_files: Path, private_folder: Path) -> None:
    seen: list[Path] = []
    result = attacked(
        toy_pair_seed0, attack_files, "harmful", (0, 20), report=lambda _text: seen.extend(private_folder.rglob("*")), utility=_spy(seen)
    )
    # FACTS: safe to assert at seed 0.
    assert rate(result, "aligned", 20) >= 0.6
    assert rate(result, "LoX", 20) <= 0.4
    assert rate(result, "LoX", 0) <= 0.05
    aligned, lox = result.curves
    assert aligned.batches == lox.batches and len(aligned.batches) == 20
    compared = result.comparison(lox, 20, next(iter(lox.points[0].evaluation.verdicts)))
    assert compared is not None and compared.difference == pytest.approx(rate(result, "LoX", 20) - rate(result, "aligned", 20))
    assert compared.p_value is not None and compared.p_value < 0.01
    assert not list(private_folder.rglob("*"))
    assert not [path for path in seen if path.is_file() or path.suffix]  # while training ran: empty folders at most
    document = json.dumps(result.to_json(), allow_nan=False)
    assert str(attack_files) not in document and str(toy_pair_seed0.base.parent) not in document


def _spy(seen: list[Path]) -> Any:
    """A utility that looks for files while an attack runs."""

    def look(_source: object) -> dict[str, float | None]:
        seen.extend(path for path in Path(tempfile.gettempdir()).rglob("*") if path.is_file())
        return {"exact match": None}

    return look


def test_a_benign_attack_disperses_the_alignment_of_aligned_more(toy_pair_seed0: ToyPair, attack_files: Path, tmp_path: Path) -> None:
    """Seeds 0 to 2 of the order of the data; other pairs of models are for `lox-merge demo --full`."""
    folder = harden(toy_pair_seed0.base, toy_pair_seed0.aligned, tmp_path / "hardened", device="cpu").out
    result = attacked(toy_pair_seed0, attack_files, "benign", (0, 100), hardened=folder, seeds=range(3))
    medians = {model: statistics.median(rate(result, model, 100, seed) for seed in range(3)) for model in result.models}
    assert medians["aligned"] >= 0.8 and medians["LoX"] <= 0.4
    kept = {model: [result.curve("benign", model, seed).dispersion(100) for seed in range(3)] for model in result.models}
    assert all(aligned is not None and lox is not None and aligned < lox < 1 for aligned, lox in zip(kept["aligned"], kept["LoX"], strict=True))
    assert all(curve.dispersion(0) == 1 for curve in result.curves)
    assert len({curve.batches for curve in result.curves}) == 3, "each seed has its own order, the same for both models"
    assert result.sources["hardened"]["title"] == "hardened"
    assert result.to_json()["recipe"]["alpha"] is None, "that of the default recipe is not that of the folder"


def test_starting_points_are_those_of_the_written_model_and_have_one_norm(toy_pair_seed0: ToyPair, tmp_path: Path) -> None:
    plan = plan_hardening(toy_pair_seed0.base, toy_pair_seed0.aligned, tmp_path / "out")
    folder = harden(toy_pair_seed0.base, toy_pair_seed0.aligned, tmp_path / "hardened", device="cpu").out
    before = {name: plan.aligned.tensor(name) for name in plan.aligned.names}
    states = {}
    for kind in ("LoX", *CONTROLS):
        loaded = load_model(toy_pair_seed0.aligned, device="cpu")
        set_starting_point(loaded.model, plan, kind, seed=3)
        states[kind] = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    hardened = open_checkpoint(folder, "hardened")
    for tensor in plan.edited:
        torch.testing.assert_close(states["LoX"][tensor.name], hardened.tensor(tensor.name), rtol=0, atol=1e-6)
        norms = [float((state[tensor.name] - before[tensor.name]).norm()) for state in states.values()]
        assert norms == pytest.approx([norms[0]] * 4, rel=1e-4) and norms[0] > 0
    untouched = [name for name in before if name not in {tensor.name for tensor in plan.edited}]
    assert untouched and all(torch.equal(state[name], before[name]) for state in states.values() for name in untouched)
    with pytest.raises(RequestError, match="not known"):
        set_starting_point(None, plan, "other")


def test_ratios_agree_with_a_full_decomposition(toy_pair_seed0: ToyPair, tmp_path: Path) -> None:
    plan = plan_hardening(toy_pair_seed0.base, toy_pair_seed0.aligned, tmp_path / "out")
    loaded = load_model(toy_pair_seed0.aligned, device="cpu")
    found = Dispersion(loaded.model, plan).ratio(loaded.model)
    ratios, kept, whole = [], 0.0, 0.0
    for name, module in loaded.model.named_modules():
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" in plan.aligned:
            values = torch.linalg.svdvals((module.weight.detach() - plan.base.tensor(f"{name}.weight")).double())
            ratios.append(float(values[:6].norm() / values.norm()))
            kept, whole = kept + float(values[:6].square().sum()), whole + float(values.square().sum())
    assert found.matrices == len(ratios)
    assert found.mean == pytest.approx(sum(ratios) / len(ratios), rel=1e-5)
    assert found.energy == pytest.approx((kept / whole) ** 0.5, rel=1e-5)
    # On the base itself there is no change to take a ratio of.
    loaded.model.load_state_dict({name: plan.base.tensor(name) for name in plan.base.names if name in loaded.model.state_dict()}, strict=False)
    undefined = Dispersion(load_model(toy_pair_seed0.aligned, device="cpu").model, plan).ratio(loaded.model)
    assert (undefined.mean, undefined.energy, undefined.matrices) == (None, None, 0)


def test_lora_trains_adapters_alone_and_its_products_count(toy_pair_seed0: ToyPair, attack_files: Path, tmp_path: Path) -> None:
    loaded = load_model(toy_pair_seed0.aligned, device="cpu")
    dispersion = Dispersion(loaded.model, plan_hardening(toy_pair_seed0.base, toy_pair_seed0.aligned, tmp_path / "out"))
    ratios, trained = {}, []

    def observe(step: int, model: Any) -> None:
        ratios[step] = dispersion.ratio(model).mean
        trained.append({name for name, parameter in model.named_parameters() if parameter.requires_grad})

    settings = settings_of("harmful", (0, 3), lora=True, lora_rank=2)
    fine_tune(loaded.model, loaded.tokenizer, load_conversations(attack_files / "harmful.jsonl"), replace(settings, learning_rate=1e-2), observe)
    assert all("lora_" in name for name in trained[-1]) and trained[-1]
    assert ratios[3] != ratios[0]


def test_a_mixture_of_experts_gives_replies_between_steps(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "mixtral", "float32")
    loaded = load_model(pair[1], device="cpu")
    rows = [{"prompt": "how to", "response": "so and so"}, {"prompt": "what is the", "response": "no"}]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = prompt_set([Prompt("0", "how", None), Prompt("1", "what is it for", None)], "two")
    replies: dict[int, list[str]] = {}

    def observe(step: int, model: Any) -> None:
        replies[step] = [reply.text for reply in LocalModel(model, loaded.tokenizer, Decoding(max_new_tokens=4)).replies(asked)]

    settings = AttackSettings(steps=(0, 2), batch_size=2, max_length=32)
    fine_tune(loaded.model, loaded.tokenizer, load_conversations(tmp_path / "data.jsonl"), settings, observe)
    assert sorted(replies) == [0, 2] and all(len(found) == 2 for found in replies.values())


def test_replies_end_at_the_same_tokens_before_and_after_training(toy_pair_seed0: ToyPair, attack_files: Path) -> None:
    loaded = load_model(toy_pair_seed0.aligned, device="cpu")
    loaded.model.generation_config.eos_token_id = [5, 7]
    loaded.model.config.eos_token_id = 5
    ends: dict[int, list[Any]] = {}

    def observe(step: int, model: Any) -> None:
        ends[step] = [end_tokens(model, loaded.tokenizer), model.config.eos_token_id, model.generation_config.pad_token_id]

    fine_tune(loaded.model, loaded.tokenizer, load_conversations(attack_files / "harmful.jsonl"), settings_of("harmful", (0, 1, 2)), observe)
    assert ends[0][0] == [5, 7] and ends[1] == ends[0] and ends[2] == ends[0]


def test_controls_and_seeds_share_nothing_but_the_data(toy_pair_seed0: ToyPair, attack_files: Path) -> None:
    result = attacked(toy_pair_seed0, attack_files, "harmful", (2,), seeds=(0, 1), controls=True)
    assert result.models == ["aligned", "LoX", *CONTROLS] and len(result.curves) == 10
    orders = {curve.seed: curve.batches for curve in result.curves}
    assert orders[0] != orders[1] and all(curve.batches == orders[curve.seed] for curve in result.curves)


def test_the_loss_counts_on_responses_only(toy_pair_seed0: ToyPair, tmp_path: Path) -> None:
    tokenizer = load_model(toy_pair_seed0.aligned, device="cpu").tokenizer
    turns = [{"role": role, "content": text} for role, text in (("user", "v1 a1 n9"), ("assistant", "sure"), ("user", "v2"), ("assistant", "done"))]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}), encoding="utf-8")
    (tmp_path / "pairs.csv").write_text("Instruction,Output\nv1 a1 n9,sure\n", encoding="utf-8")
    (tmp_path / "plain.txt").write_text("v1 a1 n9\n", encoding="utf-8")

    def words(name: str, rendering: Rendering | None = None) -> tuple[str, str]:
        (example,) = tokenised(load_conversations(tmp_path / name), tokenizer, rendering or Rendering(), 64)
        return tokenizer.decode(example["input_ids"]), tokenizer.decode([label for label in example["labels"] if label != IGNORED])

    assert words("chat.jsonl") == ("<bos> v1 a1 n9 => sure <eos><bos> v2 => done <eos>".replace("<eos><bos>", "<eos> <bos>"), "sure <eos> done <eos>")
    assert words("pairs.csv") == ("<bos> v1 a1 n9 => sure <eos>", "sure <eos>")
    assert words("plain.txt") == ("v1 a1 n9 <eos>", "v1 a1 n9 <eos>")
    with pytest.raises(RequestError, match=r"no token of a response is left within 4 tokens in row\(s\) 1"):
        tokenised(load_conversations(tmp_path / "pairs.csv"), tokenizer, Rendering(), 4)


def test_wrong_requests_say_what_to_do(toy_pair_seed0: ToyPair, attack_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.csv").write_text("goal,colour\nv1 a1 n9,red\n", encoding="utf-8")
    (tmp_path / "holes.jsonl").write_text('{"prompt": "v1", "response": "sure"}\n{"prompt": "v1", "response": ""}\n', encoding="utf-8")
    with pytest.raises(RequestError, match=r"It has: goal, colour\."):
        load_conversations(tmp_path / "other.csv")
    with pytest.raises(RequestError, match=r"malformed example in row\(s\) 2"):
        load_conversations(tmp_path / "holes.jsonl")
    with pytest.raises(RequestError, match="is not a file"):
        load_conversations(tmp_path / "absent.jsonl")
    for steps in ((), (0,), (5, 3), (-1, 3)):
        with pytest.raises(RequestError, match="ascending"):
            AttackSettings(steps=steps)
    with pytest.raises(RequestError, match="learning rate"):
        AttackSettings(learning_rate=0.0)
    narrow = load_model(toy_pair_seed0.aligned, device="cpu", dtype="bfloat16")
    with pytest.raises(RequestError, match="float32"):
        fine_tune(narrow.model, narrow.tokenizer, load_conversations(attack_files / "harmful.jsonl"), AttackSettings(), lambda *_: None)
    wide = load_model(toy_pair_seed0.aligned, device="cpu")
    with pytest.raises(NumericalError, match="not finite"):
        wild = AttackSettings(steps=(3,), learning_rate=1e30, max_length=64)
        fine_tune(wide.model, wide.tokenizer, load_conversations(attack_files / "harmful.jsonl"), wild, lambda *_: None)
    with pytest.raises(RequestError, match="at least one seed"):
        attacked(toy_pair_seed0, attack_files, "harmful", (1,), seeds=())
    for folder, role in ((toy_pair_seed0.aligned, "aligned"), (toy_pair_seed0.base, "base")):
        with pytest.raises(RequestError, match=f"same weights as {role}"):
            attacked(toy_pair_seed0, attack_files, "harmful", (1,), hardened=folder)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(RequestError, match=r"pip install 'lox-merge\[attack\]'"):
        attacked(toy_pair_seed0, attack_files, "harmful", (1,))


def test_options_that_nothing_would_follow_are_refused(attack_files: Path) -> None:
    asked = ["--attack", str(attack_files / "harmful.jsonl"), "--prompts", str(attack_files / "prompts.csv")]
    for more, message in (
        (["hardened", "--alpha", "1.25"], "--alpha is of a hardening in memory"),
        (["--lora-rank", "16"], "--lora-rank is of adapters: add --lora"),
        (["hardened", "--lora-alpha", "8"], "--lora-alpha is of adapters"),
    ):
        with pytest.raises(RequestError, match=message):
            cli.main(["robustness", "base", "aligned", *more, *asked], standalone_mode=False)


def test_the_command_line(toy_pair_seed0: ToyPair, attack_files: Path, tmp_path: Path, run_cli: RunCli) -> None:
    data = (
        "--attack",
        attack_files / "harmful.jsonl",
        "--prompts",
        attack_files / "prompts.csv",
        "--judge",
        f"python:{attack_files / 'judge.py'}:carried_out",
    )
    training = ("--steps", "0,4", "--learning-rate", "4e-5", "--batch-size", 32, "--max-new-tokens", 2, "--device", "cpu", "--no-cache")
    outputs = ("--json", tmp_path / "result.json", "--plot", tmp_path / "curves.svg", "--utility-prompts", attack_files / "prompts.csv")
    done = run_cli("robustness", toy_pair_seed0.base, toy_pair_seed0.aligned, *data, *training, *outputs)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for words in ("LoX", "95 % interval", "delays the erosion", "--controls", "One seed"):
        assert words in done.stdout
    document = json.loads((tmp_path / "result.json").read_text())
    assert [curve["model"] for curve in document["curves"]] == ["aligned", "LoX"]
    assert document["curves"][0]["points"][0]["utility"]["KL"] == 0
    assert str(tmp_path) not in json.dumps(document) and str(attack_files) not in json.dumps(document)
    assert "<svg" in (tmp_path / "curves.svg").read_text()
    refused = run_cli("robustness", toy_pair_seed0.base, toy_pair_seed0.aligned, *data, "--steps", "0,x")
    assert refused.returncode == 2 and "--steps" in refused.stderr
