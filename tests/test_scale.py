"""Models of thousands of files: what planning and bookkeeping do grows with the model, not with its square. Counts of work, not times."""

from __future__ import annotations

import gc
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lox_merge import Recipe
from lox_merge.checkpoint import safetensors_format
from lox_merge.checkpoint.safetensors_format import build_header
from lox_merge.errors import CheckpointFormatError, PlanError
from lox_merge.jobs.ahead import Ahead
from lox_merge.jobs.atomic import json_bytes
from lox_merge.jobs.estimate import estimate
from lox_merge.jobs.executors.sizing import longest_first
from lox_merge.jobs.harden import open_checkpoints, plan_hardening
from lox_merge.jobs.manifest import build_manifest, job_description
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.work import Crew, CrewSize

# Twice the model may take this many times the calls: what does not grow makes it less than 2, a square 4.
LINEAR = 2.1
EXPERTS = 4


def tensors(layer: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """A layer of experts, as models of 671 billion parameters name them."""
    prefix = f"model.layers.{layer}."
    parts: list[tuple[str, tuple[int, ...]]] = [("input_layernorm.weight", (32,)), ("self_attn.o_proj.weight", (32, 32))]
    for expert in range(EXPERTS):
        parts += [(f"mlp.experts.{expert}.{name}_proj.weight", (16, 32)) for name in ("gate", "up")]
    return [(prefix + name, "BF16", shape) for name, shape in parts]


def make_headers(folder: Path, layers: int, note: str = "pt") -> tuple[Path, Path]:
    """base and aligned with one file a layer, all holes but for one weight."""
    for role in ("base", "aligned"):
        (folder / role).mkdir(parents=True)
        weight_map = {}
        for layer in range(layers):
            file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
            header = build_header(tensors(layer), {"format": note})
            weight_map |= dict.fromkeys(header.tensors, file)
            with (folder / role / file).open("wb") as stream:
                stream.write(header.raw)
                stream.truncate(header.file_size)
        (folder / role / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "hidden_size": 32}))
        (folder / role / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / "base", folder / "aligned"


def calls(work: Callable[[], object]) -> int:
    """Calls of functions and steps of generators, Python's own included."""
    total = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal total
        if event in ("call", "c_call"):
            total += 1

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return total


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[Plan]:
    """Of a model and of one that is twice as large."""
    folder = tmp_path_factory.mktemp("plans")
    return [plan_hardening(*make_headers(folder / str(layers), layers), folder / "out") for layers in (60, 120)]


def records(plan: Plan) -> list[dict[str, Any]]:
    """What a run would have recorded, with nothing in it."""
    found = []
    for shard in plan.shards:
        entries = [{"name": tensor.name, "shape": list(tensor.info.shape), "dtype": "BF16", "action": "copied"} for tensor in shard.tensors]
        sources = {role: {shard.file: "0" * 64} for role in plan.checkpoints}
        found.append({"output": {"file": shard.file, "size": 1, "sha256": "0" * 64}, "sources": sources, "tensors": entries})
    return found


def bookkeeping(plan: Plan) -> None:
    manifest = build_manifest(plan, job_description(plan, torch.device("cpu")), records(plan), {})
    json_bytes(manifest)


def workers_begin(plan: Plan) -> None:
    """A worker starts anew at every shard."""
    crew = Crew(torch.device("cpu"), CrewSize(1, 1))
    for position in longest_first(plan, range(len(plan.shards))):
        Ahead(plan, [position], crew)
    crew.close()


STEPS: dict[str, Callable[[Plan], object]] = {
    "sources of all shards": lambda plan: [shard.sources(plan.checkpoints) for shard in plan.shards],
    "estimate": estimate,
    "workers": workers_begin,
    "bookkeeping": bookkeeping,
}


@pytest.mark.parametrize("step", sorted(STEPS))
def test_twice_the_model_takes_twice_the_work(plans: list[Plan], step: str) -> None:
    small, large = (calls(lambda plan=plan: STEPS[step](plan)) for plan in plans)  # type: ignore[misc]
    assert small > 60
    assert large <= LINEAR * small, (small, large)


def test_opening_and_planning_grow_with_the_model(tmp_path: Path) -> None:
    counts = []
    for layers in (60, 120):
        base, aligned = make_headers(tmp_path / str(layers), layers)
        recipe = Recipe(exclude=("layers.3.",), rank_pattern=(("o_proj", 3),), alpha_pattern=(("gate", 0.5),))
        counts.append(calls(lambda base=base, aligned=aligned, recipe=recipe: plan_hardening(base, aligned, tmp_path / "out", recipe=recipe)))  # type: ignore[misc]
    assert counts[1] <= LINEAR * counts[0], counts


def test_a_plan_of_a_thousand_files_opens_each_of_them_once(tmp_path: Path) -> None:
    base, aligned = make_headers(tmp_path, 1000)
    opened: Counter[str] = Counter()
    watching = [True]

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching[0] and event == "open" and str(arguments[0]).endswith((".safetensors", ".json")):
            opened[str(arguments[0])] += 1

    sys.addaudithook(watch)  # stays for the process; it looks no further once `watching` is off
    try:
        plan = plan_hardening(base, aligned, tmp_path / "out")
    finally:
        watching[0] = False
    weights = {file: count for file, count in opened.items() if file.endswith(".safetensors")}
    assert len(weights) == 2000 and set(weights.values()) == {1}
    assert opened[str(base / "model.safetensors.index.json")] == 1
    assert len(plan.shards) == 1000 and len(plan.edited) == 1000 * (1 + 2 * EXPERTS)
    assert gc.isenabled()


def test_equal_headers_are_read_once_and_let_go(tmp_path: Path) -> None:
    base, aligned = make_headers(tmp_path, 2, "headers that no other test has")
    opened = open_checkpoints({"base": base, "aligned": aligned})
    one, two = (list(checkpoint.headers.values()) for checkpoint in opened.values())
    assert all(first is second for first, second in zip(one, two, strict=True)) and one[0] is not one[1]
    before = len(safetensors_format._SOUND)
    key = one[0].raw, one[0].file_size
    assert key in safetensors_format._SOUND
    with pytest.raises(CheckpointFormatError, match="bytes follow its last tensor"):
        safetensors_format.parse_header(key[0], key[1] + 1, "a longer file")
    del opened, one, two
    gc.collect()
    assert len(safetensors_format._SOUND) < before and key not in safetensors_format._SOUND


def test_every_missing_file_is_named_with_its_tensors(tmp_path: Path) -> None:
    base, aligned = make_headers(tmp_path, 40)
    for file in sorted(aligned.glob("*.safetensors"))[:30]:
        file.unlink()
    with pytest.raises(PlanError) as caught:
        open_checkpoints({"base": base, "aligned": aligned})
    missing = [problem for problem in caught.value.problems if f"which the index gives {len(tensors(0))} tensor(s)" in problem]
    assert len(missing) == 30
    assert gc.isenabled()


def test_manifests_are_the_json_of_the_library() -> None:
    value = {"name": "ü – \u2028", "numbers": [1, 0.1, 1e-300, None, True], "empty": {}, "nested": [{"a": []}]}
    assert json_bytes(value) == (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes({"figure": float("nan")})
