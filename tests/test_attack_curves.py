"""Curves under attack that are kept: taken again for the same request, and for no other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from attack_runs import attacked, settings_of
from conftest import RunCli
from safetensors.torch import load_file, save_file

from lox_merge.errors import Interrupted, LoxMergeError, RequestError
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.safety.conversations import load_conversations
from lox_merge.safety.decoding import Decoding
from lox_merge.safety.judges.factory import make_judge
from lox_merge.safety.prompts import load_prompts
from lox_merge.safety.robustness import compare_under_attack
from lox_merge.safety.search_utility import UtilityMeasures

STEPS = (0, 2)


def test_a_run_goes_on_from_the_curves_that_are_there(toy_pair_seed0: ToyPair, attack_files: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def stopped(text: str) -> None:
        if "LoX" in text:
            raise KeyboardInterrupt
        said.append(text)

    with pytest.raises(Interrupted, match=r"Finished curves are kept in .*kept; run the same command again"):
        attacked(toy_pair_seed0, attack_files, "harmful", STEPS, curves=tmp_path / "kept", report=stopped)
    (file,) = (tmp_path / "kept").iterdir()
    assert file.name.startswith("harmful-aligned-0-")
    before = file.read_bytes()
    resumed = attacked(toy_pair_seed0, attack_files, "harmful", STEPS, curves=tmp_path / "kept", report=said.append)
    assert said == [
        "harmful, seed 0: aligned, 2 steps",
        "harmful, seed 0: aligned, kept from before",
        "harmful, seed 0: LoX, 2 steps",
    ]
    assert file.read_bytes() == before and len(list((tmp_path / "kept").iterdir())) == 2
    assert resumed.to_json() == attacked(toy_pair_seed0, attack_files, "harmful", STEPS).to_json()


def test_only_what_was_asked_in_the_same_way_is_taken(toy_pair_seed0: ToyPair, attack_files: Path, tmp_path: Path) -> None:
    pair = ToyPair(toy_pair_seed0.base, tmp_path / "aligned")
    shutil.copytree(toy_pair_seed0.aligned, pair.aligned)

    def trained(**changed: Any) -> list[str]:
        said: list[str] = []
        attacked(pair, attack_files, "harmful", STEPS, curves=tmp_path / "kept", report=said.append, **changed)
        return [text.split(": ")[1].split(",")[0] for text in said if "kept" not in text]

    assert trained() == ["aligned", "LoX"]
    assert trained() == [], "all is there"
    assert trained(seeds=(0, 1), controls=["gaussian"]) == ["gaussian", "aligned", "LoX", "gaussian"], "only what is new"
    assert trained(settings=settings_of("harmful", (0, 3))) == ["aligned", "LoX"]
    assert trained(utility=UtilityMeasures(texts=("v1 a1 n9",))) == ["aligned", "LoX"]
    (file, *_) = sorted(pair.aligned.glob("*.safetensors"))
    weights = load_file(file)
    weights[min(name for name in weights if name.endswith("proj.weight"))][0, 0] += 0.5
    save_file(weights, file, metadata={"format": "pt"})
    assert trained() == ["aligned", "LoX"], "the same names of other weights"
    with pytest.raises(RequestError, match=r"identity\(\)"):
        trained(utility=lambda _source: {})


def test_a_damaged_curve_is_named(toy_pair_seed0: ToyPair, attack_files: Path, tmp_path: Path) -> None:
    attacked(toy_pair_seed0, attack_files, "harmful", STEPS, curves=tmp_path)
    file = next(tmp_path.glob("harmful-LoX-*"))
    whole = json.loads(file.read_text())
    curve = whole["curve"]
    without = {key: value for key, value in curve.items() if key != "batches"}
    wrong = curve | {"r_align": curve["r_align"] | {"mean": "much"}}
    fewer = curve | {"points": curve["points"][:1]}
    changed = [{"format": "other"}, {"about": {}}, {"curve": without}, {"curve": wrong}, {"curve": fewer}, {"curve": None}]
    for text in ("", "{", "[]", "\udc80", *(json.dumps(whole | change) for change in changed)):
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(RequestError, match=rf"{file.name} is not a curve as it was kept .* Remove it"):
            attacked(toy_pair_seed0, attack_files, "harmful", STEPS, curves=tmp_path)
    with pytest.raises(RequestError, match="is a file; name a folder"):
        attacked(toy_pair_seed0, attack_files, "harmful", STEPS, curves=file / "below")


def test_a_judge_that_decides_nothing_is_told_before_training(toy_pair_seed0: ToyPair, attack_files: Path, tmp_path: Path) -> None:
    (tmp_path / "mute.py").write_text("def nothing(prompt, reply):\n    return None\n")
    said: list[str] = []
    with pytest.raises(LoxMergeError, match="decided on none of 100 replies of aligned before the attack"):
        compare_under_attack(
            toy_pair_seed0.base,
            toy_pair_seed0.aligned,
            None,
            [load_conversations(attack_files / "harmful.jsonl")],
            load_prompts(attack_files / "prompts.csv"),
            [make_judge(f"python:{tmp_path / 'mute.py'}:nothing")],
            settings=settings_of("harmful", STEPS),
            model={"decoding": Decoding(max_new_tokens=2), "batch_size": 100},
            device="cpu",
            report=said.append,
        )
    assert len(said) == 1


def test_the_command_keeps_curves(toy_pair_seed0: ToyPair, attack_files: Path, tmp_path: Path, run_cli: RunCli) -> None:
    data = ("--attack", attack_files / "harmful.jsonl", "--prompts", attack_files / "prompts.csv", "--steps", "0,2", "--batch-size", 32)
    how = ("--max-new-tokens", 2, "--device", "cpu", "--no-cache", "--curves", tmp_path / "kept", "--utility-prompts", attack_files / "prompts.csv")
    results = []
    for _ in range(2):
        done = run_cli("robustness", toy_pair_seed0.base, toy_pair_seed0.aligned, *data, *how, "--json", tmp_path / "result.json")
        assert done.returncode == 0, done.stderr
        results.append((tmp_path / "result.json").read_text())
    assert "kept from before" in done.stderr and ", 2 steps" not in done.stderr
    assert results[0] == results[1]
