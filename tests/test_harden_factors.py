"""Hardening from a file of factors: no SVD, the same model, and an output that verify makes again without the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import RunCli
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import make_pair, read_tensors

from lox_merge import Recipe, harden
from lox_merge.errors import OutputError, RequestError
from lox_merge.jobs import triplets
from lox_merge.jobs.adapter import execute_adapter
from lox_merge.jobs.adapter_plan import plan_adapter
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.factors import open_factors
from lox_merge.jobs.harden import execute, plan_hardening
from lox_merge.jobs.verify import verify
from lox_merge.maths.spectral import truncated_svd

HELD = 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("factors")
    base, aligned = make_pair(folder, "mixtral", "float32")
    return base, aligned, decompose(base, aligned, folder / "f.safetensors", recipe=Recipe(rank=HELD)).path


@pytest.mark.parametrize("rank", ["3", "energy:0.4", "full"])
def test_the_model_is_that_of_its_own_decompositions(pair: tuple[Path, Path, Path], tmp_path: Path, rank: str) -> None:
    base, aligned, factors = pair
    recipe = Recipe(rank=rank, rank_pattern=(("q_proj", 2),), alpha=0.8)
    result = harden(base, aligned, tmp_path / "held", recipe=recipe, factors=factors, device="cpu")
    own = harden(base, aligned, tmp_path / "own", recipe=recipe, device="cpu")
    before, expected = read_tensors(aligned), read_tensors(tmp_path / "own")
    for name, values in read_tensors(tmp_path / "held").items():
        scale = float((expected[name] - before[name]).abs().max())
        torch.testing.assert_close(values, expected[name], rtol=0, atol=1e-4 * scale + 1e-9, msg=name)
    assert result.summary.mean_rank == own.summary.mean_rank
    assert result.summary.mean_r_align == pytest.approx(own.summary.mean_r_align, rel=1e-5)
    assert result.manifest["job"]["factors"] == {"rank": str(HELD), "tolerance": 1e-3, "seed": 0} and "factors" not in own.manifest["job"]


def test_no_svd_is_spent(pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spent(*_: object, **__: object) -> None:
        raise AssertionError("an SVD was taken")

    for place in ("lox_merge.maths.edits.truncated_svd", "lox_merge.maths.spectral._solve"):
        monkeypatch.setattr(place, spent)
    monkeypatch.setattr(triplets, "truncated_svd", spent)
    assert harden(*pair[:2], tmp_path / "out", factors=pair[2], device="cpu").summary.edited_matrices > 0
    with pytest.raises(AssertionError, match="an SVD was taken"):
        harden(*pair[:2], tmp_path / "own", device="cpu")


def test_verify_makes_the_weights_again_without_the_file(pair: tuple[Path, Path, Path], tmp_path: Path, run_cli: RunCli) -> None:
    base, aligned, factors = pair
    done = run_cli("harden", base, aligned, tmp_path / "out", "--factors", factors, "--rank", "4", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    checked = verify(tmp_path / "out", base=base, aligned=aligned)
    assert checked.ok and not checked.rounded_apart and checked.tensors_recomputed > 0
    # Another rank of the file gives other last digits, so the record of it matters.
    document = json.loads((tmp_path / "out" / "lox_merge.json").read_text())
    document["job"]["factors"]["rank"] = "2"
    (tmp_path / "out" / "lox_merge.json").write_text(json.dumps(document))
    assert not verify(tmp_path / "out", base=base, aligned=aligned).ok


def test_what_the_file_cannot_give_is_refused_before_anything_is_written(pair: tuple[Path, Path, Path], tmp_path: Path, run_cli: RunCli) -> None:
    base, aligned, factors = pair
    for rank in ("9", "energy:0.999", "noise-floor"):
        done = run_cli("harden", base, aligned, tmp_path / "out", "--factors", factors, "--rank", rank)
        assert done.returncode == 2 and f"rank {rank} of" in done.stderr and "needs more than the 8 triplets" in done.stderr, done.stderr
    other = make_pair(tmp_path / "other", "mixtral", "float32", seed=1)
    done = run_cli("harden", *other, tmp_path / "out", "--factors", factors)
    assert done.returncode == 2 and "another pair" in done.stderr
    some = decompose(base, aligned, tmp_path / "some.safetensors", recipe=Recipe(rank=HELD, include=("q_proj",))).path
    with pytest.raises(RequestError, match=r"holds no factors of .* Decompose again"):
        harden(base, aligned, tmp_path / "out", factors=some)
    harden(base, aligned, tmp_path / "some", recipe=Recipe(include=("layers.0.*q_proj",)), factors=some, device="cpu")
    assert not (tmp_path / "out").exists()


def test_an_output_of_other_triplets_is_another_job(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    harden(*pair[:2], tmp_path / "out", device="cpu")
    with pytest.raises(OutputError, match=r"factors"):
        harden(*pair[:2], tmp_path / "out", factors=pair[2], device="cpu")


def test_a_stacked_expert_takes_its_own_triplets(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned, factors = pair
    from lox_merge.jobs.factors import Factors

    with Factors.open(factors) as held:
        plan = plan_hardening(base, aligned, tmp_path / "out", recipe=Recipe(rank=3), factors=held)
        tensor = next(tensor for tensor in plan.edited if "expert" in tensor.name)
        for view in tensor.views:
            earlier, stored = view.select(plan.base.tensor(tensor.base_name)), view.select(plan.aligned.tensor(tensor.name))
            delta = stored - earlier
            found = plan.triplets.subspace(tensor, view, delta, earlier, stored)
            left, values, right = torch.linalg.svd(delta.double())
            torch.testing.assert_close(found.low_rank().double(), (left[:, :3] * values[:3]) @ right[:3], rtol=0, atol=1e-5)


# Values that no decomposition gives are seen when they are read, others when they meet their delta.
REFUSED = "does not hold singular triplets of the delta of|changed.safetensors is damaged"
CHANGES = [("left", -1.0), ("right", -1.0), ("values", -1.0), ("values", 3.0), ("left", 2.0), ("right", torch.nan)]


@pytest.mark.parametrize("what, factor", CHANGES, ids=str)
@pytest.mark.parametrize("as_adapter", [False, True])
def test_factors_that_were_changed_write_nothing(pair: tuple[Path, Path, Path], tmp_path: Path, what: str, factor: float, as_adapter: bool) -> None:
    """With flipped signs an edit would take alignment away; nobody has to believe a file that came from elsewhere."""
    base, aligned, factors = pair
    with safe_open(factors, "pt") as file:
        metadata = file.metadata()
    changed = {name: values * factor if name.endswith(f".{what}") else values for name, values in load_file(factors).items()}
    save_file(changed, tmp_path / "changed.safetensors", metadata=metadata)
    with open_factors(tmp_path / "changed.safetensors") as held, pytest.raises(RequestError, match=REFUSED):
        plan = plan_hardening(base, aligned, tmp_path / "out", recipe=Recipe(rank=4), factors=held, form="adapter" if as_adapter else "model")
        execute_adapter(plan_adapter(plan)) if as_adapter else execute(plan, device="cpu")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("shape", [(1024, 300), (300, 1024), (400, 400), (40, 30)])
@pytest.mark.parametrize("tolerance", [1e-3, 0.5])
def test_factors_of_any_shape_and_tolerance_are_of_their_delta(shape: tuple[int, int], tolerance: float) -> None:
    """One residual of block Lanczos vanishes by construction, on the short side; the other one is as large as was allowed."""
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = truncated_svd(delta, 6, tolerance=tolerance)
    assert triplets.spans_part_of(delta, found)
    assert not triplets.spans_part_of(-delta, found)
    assert not triplets.spans_part_of(delta, replace(found, singular_values=found.singular_values * 1.01))
