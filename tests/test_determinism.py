"""Same inputs, recipe, seed, device kind and threads: same bytes. Other thread counts: no further apart than the certificates say."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import RunCli
from safetensors.torch import load_file
from tiny_models import make_pair

from lox_merge import Recipe, harden
from lox_merge.jobs.executors.writer import ShardWriter, WorkerTask
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.journal import Journal
from lox_merge.jobs.work import CrewSize

Pair = tuple[Path, Path]
Written = dict[str, torch.Tensor]
ALPHA, RANK = 1.25, 6
CREWS = [CrewSize(1, 1), CrewSize(2, 1), CrewSize(1, 2)]


def _agreement() -> ModuleType:
    file = Path(__file__).parent.parent / "benchmarks" / "agreement.py"
    specification = importlib.util.spec_from_file_location("agreement", file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["agreement"] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


agreement = _agreement()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), "llama", aligned_shards=3, hidden=512, layers=1, vocabulary=600, intermediate_size=1024)


@pytest.fixture
def affinity() -> Iterator[set[int]]:
    """The cores of this process, given back afterwards."""
    cores = os.sched_getaffinity(0)
    yield cores
    os.sched_setaffinity(0, cores)


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def write(pair: Pair, folder: Path, size: CrewSize, recipe: Recipe) -> tuple[Written, dict[str, Any]]:
    """Every shard as a worker with this crew writes it: tensors, and the records of the edited ones by name."""
    plan = plan_hardening(*pair, folder / "out", recipe=recipe)
    journal = Journal(plan.out)
    journal.folder.mkdir(parents=True)
    records: dict[str, Any] = {}

    def tell(kind: str, *values: Any) -> None:
        assert kind != "failed", values
        if kind == "written":
            records.update({tensor["name"]: tensor for tensor in values[1]["tensors"] if tensor["action"] == "edited"})

    writer = ShardWriter(WorkerTask(plan, torch.device("cpu"), size, None), tell)
    for position in range(len(plan.shards)):
        writer.write(position, [])
    writer.wait()
    writer.close()
    tensors = {name: tensor for shard in plan.shards for name, tensor in load_file(journal.partial(shard.file)).items()}
    shutil.rmtree(plan.out)
    return tensors, records


def same(one: Written, other: Written) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_same_bytes_twice_on_fewer_cores_and_by_several_processes(
    pair: Pair, tmp_path: Path, affinity: set[int], rounding: str, run_cli: RunCli
) -> None:
    """A matrix takes one thread wherever there are as many matrices as cores, so that fewer cores make the same sums."""
    recipe = Recipe(rounding=rounding, seed=3)  # type: ignore[arg-type]
    expected = hashes(harden(*pair, tmp_path / "one", recipe=recipe).out)
    assert hashes(harden(*pair, tmp_path / "again", recipe=recipe).out) == expected
    assert hashes(harden(*pair, tmp_path / "processes", recipe=recipe, workers=2).out) == expected
    if rounding == "nearest":
        done = run_cli("harden", *pair, tmp_path / "threads", "--seed", "3", OMP_NUM_THREADS="2", MKL_NUM_THREADS="2")
        assert done.returncode == 0, done.stderr
        assert hashes(tmp_path / "threads") == expected
    os.sched_setaffinity(0, {min(affinity)})
    assert hashes(harden(*pair, tmp_path / "fewer", recipe=recipe).out) == expected


def test_another_seed_is_another_result(pair: Pair, tmp_path: Path) -> None:
    """What the comparisons above would not see if the seed did nothing."""
    one, two = (harden(*pair, tmp_path / str(seed), recipe=Recipe(rounding="stochastic", seed=seed)).out for seed in (0, 1))
    assert hashes(one) != hashes(two)


def test_crews_of_other_sizes_stay_within_the_certificates(pair: Pair, tmp_path: Path, record_property: Any) -> None:
    wide = {crew: write(pair, tmp_path / "wide", crew, Recipe(dtype="float32")) for crew in CREWS}
    narrow = {crew: write(pair, tmp_path / "narrow", crew, Recipe())[0] for crew in CREWS}
    before, records = wide[CREWS[0]]
    assert len(records) == 9
    # As many threads for each matrix, however many matrices are in work: the same sums.
    assert same(wide[CrewSize(2, 1)][0], before) and same(narrow[CrewSize(2, 1)], narrow[CREWS[0]])
    worst = {"share of what is allowed": 0.0, "of the update": 0.0, "bf16 entries that differ": 0.0, "units in the last place": 0.0}
    for crew in CREWS[1:]:
        after, others = wide[crew]
        for name, record in records.items():
            (one,), (two,) = record["matrices"], others[name]["matrices"]
            bounds = one["certificate"]["projection_error_bound"], two["certificate"]["projection_error_bound"]
            limit = agreement.allowed(before[name], one["delta_norm"], ALPHA, RANK, bounds)
            assert limit is not None and limit < 0.05 * one["realised"]["intended_norm"]  # a bound that says something
            found = agreement.apart(before[name], after[name])
            assert found.difference <= limit, (name, crew)
            rounded = agreement.apart(narrow[CREWS[0]][name], narrow[crew][name], (before[name], after[name]))
            assert rounded.neighbours <= 1, (name, crew)
            # An entry crosses a midpoint where it lies no further from it than both differ.
            assert rounded.differing <= 1e-3, (name, crew)
            figures = found.difference / limit, found.difference / one["realised"]["intended_norm"], rounded.differing, rounded.neighbours
            worst = {what: max(worst[what], figure) for what, figure in zip(worst, figures, strict=True)}
    for what, figure in worst.items():
        record_property(what, figure)


@pytest.mark.parametrize("threads", [3])
def test_thread_counts_stay_within_the_certificates(threads: int, record_property: Any) -> None:
    """Large enough that the sums of a product are made in another order."""
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(1024, 4096, generator=generator)).bfloat16()
    low = torch.randn(1024, 32, generator=generator) * torch.arange(1, 33) ** -0.8
    aligned = (base.float() + 1e-4 * low @ torch.randn(32, 4096, generator=generator)).bfloat16()
    one, two = (agreement.computed(base, aligned, torch.float32, "cpu", count, rank=RANK, alpha=ALPHA) for count in (1, threads))
    narrow = [agreement.computed(base, aligned, torch.bfloat16, "cpu", count, rank=RANK, alpha=ALPHA)[0] for count in (1, threads)]
    limit = agreement.allowed(one[0], one[2], ALPHA, RANK, (one[1], two[1]))
    size = float((one[0] - aligned.float()).norm())
    found = agreement.apart(one[0], two[0])
    rounded = agreement.apart(*narrow, (one[0], two[0]))
    assert found.difference <= limit < 0.05 * size
    assert rounded.neighbours <= 1 and rounded.differing <= 1e-3
    for what, figure in (("of the update", found.difference / size), ("bf16 entries that differ", rounded.differing)):
        record_property(what, figure)


def test_copied_tensors_have_the_same_bytes_for_any_crew(pair: Pair, tmp_path: Path) -> None:
    stored = {name: tensor for file in pair[1].glob("*.safetensors") for name, tensor in load_file(file).items()}
    written, records = write(pair, tmp_path, CrewSize(1, 3), Recipe())
    copied = written.keys() - records.keys()
    assert len(copied) == 3 and all(torch.equal(written[name], stored[name]) for name in copied)


def test_the_comparison_sees_what_is_too_far_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(64, 64, generator=generator)
    moved = values.clone()
    moved[3, 5] += 0.1
    limit = agreement.allowed(values, 0.5, ALPHA, RANK, (1e-4, 1e-4))
    assert limit < 1e-3 < agreement.apart(values, moved).difference
    assert agreement.allowed(values, 0.5, ALPHA, RANK, (None, 1e-4)) is None
    rounded, other = values.bfloat16(), values.bfloat16()
    other[0, 0] = other[0, 0] * (1 + 4 * torch.finfo(torch.bfloat16).eps)
    assert agreement.apart(rounded, other, (values, values)).neighbours > 1
    assert agreement.apart(rounded, rounded, (values, values)).same_bytes
