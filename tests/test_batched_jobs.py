"""Jobs whose matrices are edited as on a GPU: in batches, through a pipeline; the CPU stands in the GPU's place."""

from __future__ import annotations

import itertools
import math
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from batched_runs import Batched, shards
from finetuned import finetune
from reference import load, lox_tensor
from safetensors.torch import load_file, save_file
from tiny_models import make_pair

from lox_merge import FilterRecipe, Recipe, harden, project
from lox_merge.errors import LoxMergeWarning, NonFiniteDeltaError
from lox_merge.jobs import batches
from lox_merge.jobs.ahead import Ahead
from lox_merge.jobs.batches import BATCH_ENTRIES, LARGEST_BATCH, batch_bytes, batch_size, batches_of, outputs_bytes
from lox_merge.jobs.estimate import PROCESS_BYTES, peak_memory
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.lookahead import look_ahead
from lox_merge.jobs.lox_edit import LoxEdit
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.project import plan_projection
from lox_merge.jobs.transfers import BUFFER_BYTES, BUFFERS
from lox_merge.jobs.triplets import TakenNow
from lox_merge.jobs.work import Crew, CrewSize

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Sides above and below those that go in batches, float32: what the SVD loses is seen, not the rounding."""
    options: dict[str, Any] = {"hidden": 256, "layers": 3, "vocabulary": 200, "intermediate_size": 192, "aligned_shards": 2}
    return make_pair(tmp_path_factory.mktemp("pair"), "llama", "float32", **options)


def plan_of(pair: Pair, out: Path, **settings: Any) -> Plan:
    return plan_hardening(*pair, out, recipe=Recipe(**settings))


def batched(pair: Pair, out: Path, pipeline_settings: dict[str, Any] | None = None, **settings: Any) -> dict[str, bytes]:
    Batched(pipeline_settings or {}).write(plan_of(pair, out, **settings))
    return shards(out)


def test_batches_hold_every_matrix_once_in_the_order_of_the_file(pair: Pair, tmp_path: Path) -> None:
    plan = plan_of(pair, tmp_path / "out", rank_pattern=((r"layers\.0\.", 3),))
    for position, shard in enumerate(plan.shards):
        found = batches_of(plan, position)
        assert found == batches_of(plan, position)
        members = [(member.tensor.name, member.index) for batch in found for member in batch.members]
        expected = [(tensor.name, index) for tensor in shard.tensors if tensor.action == "edit" for index in range(len(tensor.views))]
        assert sorted(members) == sorted(expected)
        assert any(len(batch.members) > 1 for batch in found)
        for batch in found:
            assert {(member.view.shape, member.tensor.rank) for member in batch.members} == {(batch.shape, batch.members[0].tensor.rank)}
        firsts = [members.index((batch.members[0].tensor.name, 0)) for batch in found]
        assert firsts == sorted(firsts)


def test_batches_are_bounded(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert batch_size((4096, 14336)) == 4 and batch_size((4096, 4096)) == LARGEST_BATCH and batch_size((128256, 8192)) == 1
    assert batch_size((8192, 28672)) == 1 and BATCH_ENTRIES == 2**28
    plan = plan_of(pair, tmp_path / "out")
    whole = batches_of(plan, 0)
    monkeypatch.setattr(batches, "WINDOW_BYTES", 2**20)
    cut = batches_of(plan, 0)
    assert len(cut) > len(whole) and cut[-1].window > 1
    for window in range(cut[-1].window + 1):
        tensors = {member.tensor.name: member.tensor.info.bytes for batch in cut if batch.window == window for member in batch.members}
        assert sum(tensors.values()) <= 2**20
    monkeypatch.setattr(batches, "LARGEST_BATCH", 2)
    assert max(len(batch.members) for batch in batches_of(plan, 0)) == 2


def test_outputs_of_two_stretches_count_as_memory_of_the_host(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(pair, tmp_path / "out")
    edited = [sum(tensor.info.bytes for tensor in shard.tensors if tensor.action == "edit") for shard in plan.shards]
    neighbours = [one + other for one, other in itertools.pairwise(edited)]
    assert outputs_bytes(plan) == max(neighbours)
    on_gpu, buffers = torch.device("cuda"), 2 * BUFFERS * BUFFER_BYTES
    assert peak_memory(plan, on_gpu) >= peak_memory(plan) and peak_memory(plan, on_gpu) >= PROCESS_BYTES + buffers + max(neighbours)
    monkeypatch.setattr(batches, "WINDOW_BYTES", 2**20)
    assert 2**20 < outputs_bytes(plan) <= 2**21


def test_a_batch_is_counted_with_all_that_it_takes(pair: Pair, tmp_path: Path) -> None:
    plan = plan_of(pair, tmp_path / "out")
    for batch in batches_of(plan, 0):
        entries = len(batch.members) * batch.shape[0] * batch.shape[1]
        assert batch_bytes(plan, batch) > 4 * 4 * entries  # base, aligned, delta, output


def test_weights_are_hardened_within_the_certificate(pair: Pair, tmp_path: Path) -> None:
    records = Batched().write(plan_of(pair, tmp_path / "out"))
    before, after, out = load(pair[0]), load(pair[1]), load(tmp_path / "out")
    assert out.keys() == after.keys()
    matrices = {tensor["name"]: matrix for record in records for tensor in record["tensors"] for matrix in tensor.get("matrices", ())}
    methods = [matrix["certificate"]["method"] for matrix in matrices.values()]
    assert set(methods) == {"lanczos", "exact"}  # keys and values have small sides
    for name, tensor in after.items():
        exact = lox_tensor(name, before[name], tensor)
        if tensor.ndim < 2:
            assert torch.equal(out[name], tensor)
            continue
        edit = (exact - tensor.double()).norm()
        assert (out[name].double() - exact).norm() <= 1e-3 * edit + 1e-6 * exact.norm()
        values = torch.linalg.svdvals(tensor.double() - before[name].double())
        assert matrices[name]["singular_values"] == pytest.approx(values[:6].tolist(), rel=1e-5)
        assert matrices[name]["delta_norm"] == pytest.approx(float(values.norm()), rel=1e-5)
        assert matrices[name]["realised"]["gain"] == pytest.approx(1, abs=1e-3)


def test_same_bytes_however_much_is_in_flight(pair: Pair, tmp_path: Path) -> None:
    expected = batched(pair, tmp_path / "one")
    plan = plan_of(pair, tmp_path / "none")
    largest = max(batch_bytes(plan, batch) for position in range(len(plan.shards)) for batch in batches_of(plan, position))
    for number, settings in enumerate(({"editors": 1, "buffers": 1, "buffer_bytes": 1000}, {"budget": largest})):
        assert batched(pair, tmp_path / str(number), settings) == expected


def test_records_are_those_of_the_usual_way(pair: Pair, tmp_path: Path) -> None:
    records = Batched().write(plan_of(pair, tmp_path / "out", skip_non_finite=True))
    usual = harden(*pair, tmp_path / "usual", recipe=Recipe(skip_non_finite=True))
    ours = [tensor for record in records for tensor in record["tensors"]]
    assert [tensor["name"] for tensor in ours] == [tensor["name"] for tensor in usual.manifest["tensors"]]
    for one, other in zip(ours, usual.manifest["tensors"], strict=True):
        assert one.keys() == other.keys() and one["action"] == other["action"]
        for mine, theirs in zip(one.get("matrices", ()), other.get("matrices", ()), strict=True):
            assert mine.keys() == theirs.keys() and mine["rank"] == theirs["rank"]
            assert mine["r_align"] == pytest.approx(theirs["r_align"], rel=1e-6)
            assert mine["certificate"]["ambiguous"] == theirs["certificate"]["ambiguous"]


@pytest.mark.parametrize("settings", [{"rank": "full"}, {"rank": "noise-floor"}, {"rank": 3, "include": ("k_proj",)}])
def test_what_does_not_go_in_batches_has_the_bytes_of_the_usual_way(pair: Pair, tmp_path: Path, settings: dict[str, Any]) -> None:
    small = {"exclude": ("embed", "lm_head", "self_attn.[qo]")} if settings["rank"] != 3 else {}
    if settings["rank"] == 3:  # sides of 128 and less are exact
        pair = make_pair(tmp_path, "llama", aligned_shards=2)
    harden(*pair, tmp_path / "usual", recipe=Recipe(**settings, **small))
    assert batched(pair, tmp_path / "out", **settings, **small) == shards(tmp_path / "usual")


@pytest.mark.parametrize("architecture", ["gpt_oss", "llava"])
def test_parts_of_tensors_are_sent_and_fetched_where_they_belong(tmp_path: Path, architecture: str) -> None:
    pair = make_pair(tmp_path, architecture)
    harden(*pair, tmp_path / "usual")
    assert batched(pair, tmp_path / "out") == shards(tmp_path / "usual")


def test_filters_pass_through_the_pipeline_with_their_bytes(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", hidden=160)
    finetuned = finetune(aligned, tmp_path / "finetuned")
    recipe = FilterRecipe(mode="orthogonal", fraction=0.05)
    project(base, aligned, finetuned, tmp_path / "usual", recipe=recipe)
    Batched().write(plan_projection(base, aligned, finetuned, tmp_path / "out", recipe=recipe))
    assert shards(tmp_path / "out") == shards(tmp_path / "usual")


class Cramped(LoxEdit):
    """On a device where batches find no room."""

    def batch(self, *given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_batch_that_does_not_fit_is_edited_one_by_one(pair: Pair, tmp_path: Path) -> None:
    plan = plan_of(pair, tmp_path / "out", include=("mlp", "o_proj"))
    plan.edit = Cramped(plan.recipe)  # type: ignore[arg-type]
    with pytest.warns(LoxMergeWarning, match=r"did not fit on cpu together; they were edited one by one"):
        Batched().write(plan)
    harden(*pair, tmp_path / "usual", recipe=Recipe(include=("mlp", "o_proj")))
    assert shards(tmp_path / "out") == shards(tmp_path / "usual")


def test_a_batch_that_cannot_fit_is_not_tried(pair: Pair, tmp_path: Path) -> None:
    with pytest.warns(LoxMergeWarning, match=r"and \d more of this shape need .* GB together and cpu has .* GB for them"):
        found = batched(pair, tmp_path / "out", {"budget": 1}, include=("mlp", "o_proj"))
    harden(*pair, tmp_path / "usual", recipe=Recipe(include=("mlp", "o_proj")))
    assert found == shards(tmp_path / "usual")


def with_aligned(pair: Pair, folder: Path, change: Any) -> Pair:
    """The pair with `change(name, aligned, base)` for aligned's tensors."""
    aligned = shutil.copytree(pair[1], folder / "aligned")
    before = load(pair[0])
    for file in aligned.glob("*.safetensors"):
        tensors = {name: change(name, tensor, before[name]) for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    return pair[0], aligned


def test_empty_and_damaged_deltas_leave_their_company_alone(pair: Pair, tmp_path: Path) -> None:
    def change(name: str, tensor: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        if "layers.1.mlp" in name:
            return before.clone()
        if "layers.2.mlp.up_proj" in name:
            tensor = tensor.clone()
            tensor[3, 4] = math.nan
        return tensor

    changed = with_aligned(pair, tmp_path, change)
    only = {"include": ("mlp",)}
    with pytest.raises(NonFiniteDeltaError, match=r"layers\.2\.mlp\.up_proj"):
        batched(changed, tmp_path / "refused", **only)
    records = Batched().write(plan_of(changed, tmp_path / "out", skip_non_finite=True, **only))
    reasons = {tensor["name"]: tensor.get("reason") for record in records for tensor in record["tensors"]}
    assert reasons["model.layers.1.mlp.down_proj.weight"] == "the delta is zero"
    assert reasons["model.layers.2.mlp.up_proj.weight"] == "NaN or Inf in the delta"
    out, after, sound = load(tmp_path / "out"), load(changed[1]), load(pair[0])
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(out[name].nan_to_num(7), after[name].nan_to_num(7))
    name = "model.layers.0.mlp.up_proj.weight"
    exact = lox_tensor(name, sound[name], after[name])
    assert (out[name].double() - exact).norm() <= 1e-3 * (exact - after[name].double()).norm() + 1e-6 * exact.norm()


class Broken(LoxEdit):
    def batch(self, *given: Any) -> Any:
        raise ZeroDivisionError("a fault of the program")


def test_an_error_ends_the_job_and_its_threads(pair: Pair, tmp_path: Path) -> None:
    plan = plan_of(pair, tmp_path / "out")
    plan.edit = Broken(plan.recipe)  # type: ignore[arg-type]
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        Batched().write(plan)
    left = {thread.name.split("_")[0] for thread in set(threading.enumerate()) - before}
    assert not left & {"read", "edit", "fetch", "copy", "solve", "finish"}


def test_an_interrupted_job_goes_on_to_the_same_bytes(pair: Pair, tmp_path: Path) -> None:
    expected = batched(pair, tmp_path / "whole")
    plan = plan_of(pair, tmp_path / "out")

    class Stops(LoxEdit):
        def batch(self, sources: Any, out: Any, members: Any, *rest: Any) -> Any:
            if members[0][0].name in {tensor.name for tensor in plan.shards[1].tensors}:
                raise KeyboardInterrupt
            return super().batch(sources, out, members, *rest)

    sound, plan.edit = plan.edit, Stops(plan.recipe)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        Batched().write(plan)
    assert len(shards(tmp_path / "out")) == 1
    Batched().write(replace(plan_of(pair, tmp_path / "out"), edit=sound))
    assert shards(tmp_path / "out") == expected


def test_outputs_of_two_stretches_at_most_are_in_memory(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "WINDOW_BYTES", 2**19)
    plan = plan_of(pair, tmp_path / "out")
    held: list[int] = []

    class Watched(Batched):
        def look_ahead(self, plan: Plan, todo: list[int], crew: Crew) -> Any:
            ahead = super().look_ahead(plan, todo, crew)
            take = ahead.take

            def watched(tensor: Any, *others: Any) -> Any:
                found = take(tensor, *others)
                held.append(sum(4 * one.out.numel() for one in ahead._tensors.values()))
                return found

            ahead.take = watched  # type: ignore[method-assign]
            return ahead

    Watched().write(plan)
    assert 0 < max(held) <= 2 * max(2**19, plan.largest_tensor_bytes)


def test_the_cpu_goes_matrix_by_matrix(pair: Pair, tmp_path: Path) -> None:
    plan, crew = plan_of(pair, tmp_path / "out"), Crew(torch.device("cpu"), CrewSize(1, 1))
    assert isinstance(look_ahead(plan, [0], crew), Ahead)
    crew.close()


def test_triplets_that_are_there_already_are_taken(pair: Pair, tmp_path: Path) -> None:
    asked: list[str] = []

    class Known(TakenNow):
        def subspace(self, tensor: Any, *rest: Any) -> Any:
            asked.append(tensor.name)
            return super().subspace(tensor, *rest)

    plan = plan_of(pair, tmp_path / "out", include=("mlp",))
    plan.triplets = Known(1e-3, 0)
    Batched().write(plan)
    assert sorted(asked) == sorted(tensor.name for tensor in plan.edited)
    harden(*pair, tmp_path / "usual", recipe=Recipe(include=("mlp",)))
    assert shards(tmp_path / "out") == shards(tmp_path / "usual")
