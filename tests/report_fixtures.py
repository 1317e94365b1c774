"""Real runs of the commands on the toy pair, as the JSON that a report is made of."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    import click

    from lox_merge.lab.checkpoints import ToyPair

JUDGE = "def complied(prompt, reply):\n    return not reply.startswith('sorry')\n"


@pytest.fixture(scope="session")
def report_runs(toy_pair_seed0: ToyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with NAME.json of harden, verify, inspect, decompose, search, asr, robustness, and one_seed.json. Read it only."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return _make(tmp_path_factory.mktemp("runs"), toy_pair_seed0)
    shared = tmp_path_factory.getbasetemp().parent / "report_runs"  # of all processes of this session
    with FileLock(f"{shared}.lock"):
        return shared if shared.exists() else _make(shared.with_suffix(".part"), toy_pair_seed0).rename(shared)


def _make(folder: Path, toy_pair_seed0: ToyPair) -> Path:
    from inspect_models import fine_tuned

    from lox_merge.cli.asr import asr_command
    from lox_merge.cli.decompose import decompose_command
    from lox_merge.cli.harden import harden_command
    from lox_merge.cli.inspect import inspect_command
    from lox_merge.cli.robustness import robustness_command
    from lox_merge.cli.search import search_command
    from lox_merge.cli.verify import verify_command
    from lox_merge.lab.language import comply
    from lox_merge.lab.recipe import ToyRecipe
    from lox_merge.lab.requests import draw_requests

    folder.mkdir(exist_ok=True)
    requests, pair = draw_requests(ToyRecipe(seed=0)), (toy_pair_seed0.base, toy_pair_seed0.aligned)
    rows = [{"prompt": request.text, "response": " ".join(comply(request)[:-1])} for request in requests.harmful]
    (folder / "harmful.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    asked = [*requests.tests.seen[:15], *requests.tests.unseen[:15]]
    (folder / "prompts.csv").write_text("goal\n" + "".join(f"{request.text}\n" for request in asked), encoding="utf-8")
    (folder / "judge.py").write_text(JUDGE, encoding="utf-8")

    def run(command: click.Command, *arguments: object) -> None:
        command.main([str(argument) for argument in arguments], standalone_mode=False)

    measured = ("--prompts", folder / "prompts.csv", "--judge", f"python:{folder / 'judge.py'}:complied", "--no-cache", "--device", "cpu")
    run(harden_command, *pair, folder / "hardened", "--json", folder / "harden.json")
    run(verify_command, folder / "hardened", "--offline", "--json", folder / "verify.json")
    finetuned = [fine_tuned(toy_pair_seed0.aligned, folder / label, seed, 0.002) for seed, label in enumerate(("useful", "style"))]
    shown = ("--fractions", "0.05,0.25", "--etas", "0.5,0.9", "--rank", 6, "--exclude", r"layers\.[12]\.mlp", "--device", "cpu")
    run(inspect_command, *pair, *finetuned, *shown, "--json", folder / "inspect.json")
    run(decompose_command, *pair, folder / "factors.safetensors", "--rank", 16, "--json", folder / "decompose.json")
    factors = ("--factors", folder / "factors.safetensors", "--utility-prompts", folder / "prompts.csv")
    run(search_command, *pair, *measured, *factors, "--max-new-tokens", 2, "--ranks", "0,2,16", "--rho", 0.5, "--json", folder / "search.json")
    models = (toy_pair_seed0.aligned, folder / "hardened")
    run(asr_command, *models, *measured, "--judge", "keyword", "--max-new-tokens", 2, "--json", folder / "asr.json")
    training = ("--batch-size", 32, "--warmup-steps", 3, "--max-length", 64, "--max-new-tokens", 2, "--learning-rate", 2e-4)
    options = ("--steps", "0,3", "--controls", "--judge", "keyword", "--utility-prompts", folder / "prompts.csv")
    attack = ("--attack", folder / "harmful.jsonl")
    run(robustness_command, *pair, folder / "hardened", *measured, *training, *attack, *options, "--json", folder / "one_seed.json")
    several = several_seeds(json.loads((folder / "one_seed.json").read_text(encoding="utf-8")))
    (folder / "robustness.json").write_text(json.dumps(several), encoding="utf-8")
    return folder


def several_seeds(document: dict[str, Any]) -> dict[str, Any]:
    """A comparison of one attack and seed as one of two attacks and seeds with other figures: training them all would take long."""
    document["attacks"].append(document["attacks"][0] | {"name": "benign", "source": "benign.jsonl"})
    document["seeds"] = [0, 1]
    curves = []
    for attack in ("harmful", "benign"):
        for seed in document["seeds"]:
            for curve in copy.deepcopy(document["curves"]):
                for point in curve["points"]:
                    point["r_ft_over_r_align"] *= 0.9**seed
                    for rate in point["attack_success"].values():
                        rate["rate"] *= 0.8**seed if attack == "harmful" else 0.5
                curves.append(curve | {"attack": attack, "seed": seed})
    return document | {"curves": curves}


@pytest.fixture
def documents(report_runs: Path) -> dict[str, dict[str, Any]]:
    """The same by name, to be changed freely."""
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(report_runs.glob("*.json"))}
