"""`project` as a job: resumption, verify, factors, adapters, dry run."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from adapters import make_adapter, merge
from conftest import RunCli, start_cli
from finetuned import filtered_tensor, finetune
from project_fixtures import Three
from reference import load
from safetensors.torch import load_file, save_file
from tiny_models import make_pair

from lox_merge import FilterRecipe, harden, project
from lox_merge.errors import OutputError, RecipeError, RequestError, SourceError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.verify import verify

UP = "model.layers.0.mlp.up_proj.weight"


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path, run_cli: RunCli) -> None:
    base, aligned = make_pair(tmp_path, "llama", base_shards=3, aligned_shards=8, hidden=256, layers=6, vocabulary=1000)
    models = (base, aligned, finetune(aligned, tmp_path / "finetuned"))
    options = ["--fraction", "0.05", "--layers", "9", "--rounding", "stochastic", "--device", "cpu"]
    recipe = FilterRecipe(fraction=0.05, layers=9, rounding="stochastic")
    project(*models, tmp_path / "expected", recipe=recipe, device="cpu")
    kills = 0
    for attempt in range(8):
        out = tmp_path / f"out{attempt}"
        for wanted in (1, 4):
            process = start_cli("project", *models, out, *options)
            while process.poll() is None and (
                len(list((out / ".lox_merge").glob("*.safetensors.json"))) < wanted or not (out / ".lox_merge" / "job.json").exists()
            ):
                time.sleep(0.001)
            process.kill()
            process.finish()
            kills += not (out / "lox_merge.json").exists()
        if kills >= 2:
            break
        shutil.rmtree(out)
    assert kills >= 2
    done = run_cli("project", *models, out, *options)
    assert done.returncode == 0, done.stderr
    assert hashes(out) == hashes(tmp_path / "expected")


def test_finished_and_foreign_outputs(three: Three, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = project(*three, out, recipe=FilterRecipe(fraction=0.2))
    again = project(*three, out, recipe=FilterRecipe(fraction=0.2))
    assert again.manifest == first.manifest and again.bytes_written == 0
    with pytest.raises(OutputError, match=r"recipe.fraction was 0.2, is now 0.3"):
        project(*three, out, recipe=FilterRecipe(fraction=0.3))
    with pytest.raises(OutputError, match="holds another job"):
        harden(*three[:2], out)
    project(*three, out, recipe=FilterRecipe(fraction=0.3), overwrite=True)


def test_verify_recomputes_and_finds_what_differs(three: Three, tmp_path: Path, run_cli: RunCli) -> None:
    base, aligned, finetuned = three
    out = tmp_path / "out"
    project(*three, out, recipe=FilterRecipe(fraction=0.2, basis="random", rounding="stochastic"))
    sources = ["--base", base, "--aligned", aligned, "--finetuned", finetuned]
    done = run_cli("verify", out, *sources)
    assert done.returncode == 0 and "made again from the sources: equal" in done.stdout, done.stderr
    with pytest.raises(SourceError, match="say where it is with --finetuned"):
        verify(out, base=base, aligned=aligned)
    other = finetune(aligned, tmp_path / "other", seed=6)
    assert "is not the file that was used" in verify(out, base=base, aligned=aligned, finetuned=other).problems[0]
    file = next(file for file in sorted(out.glob("*.safetensors")) if UP in load_file(file))
    tensors = load_file(file)
    tensors[UP] = load(finetuned)[UP]
    save_file(tensors, file, metadata={"format": "pt"})
    manifest = json.loads((out / "lox_merge.json").read_text())
    entry = next(entry for entry in manifest["output"]["shards"] if entry["file"] == file.name)
    entry.update(sha256=hashlib.sha256(file.read_bytes()).hexdigest(), size=file.stat().st_size)
    (out / "lox_merge.json").write_text(json.dumps(manifest))
    (problem,) = verify(out, base=base, aligned=aligned, finetuned=finetuned).problems
    assert UP in problem and "is not what the recipe gives" in problem


def test_factors_spare_the_decomposition(floats: Three, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned, finetuned = floats
    factors = decompose(base, aligned, tmp_path / "f.safetensors", recipe=Recipe(rank=9), device="cpu").path
    recipe = FilterRecipe(rank=4, include=("weight",))
    project(*floats, tmp_path / "own", recipe=recipe, device="cpu")
    with pytest.raises(RecipeError, match="they go with basis 'top'"):
        project(*floats, tmp_path / "refused", recipe=FilterRecipe(rank=4, basis="random"), factors=factors)
    with pytest.raises(RequestError, match="needs more than the 9 triplets"):
        project(*floats, tmp_path / "refused", recipe=FilterRecipe(fraction=0.5), factors=factors)
    with monkeypatch.context() as patched:
        patched.setattr("lox_merge.jobs.triplets.truncated_svd", lambda *_, **__: pytest.fail("an SVD was taken"))
        project(*floats, tmp_path / "held", recipe=recipe, factors=factors, device="cpu")
    own, held = load(tmp_path / "own"), load(tmp_path / "held")
    for name in own:
        torch.testing.assert_close(held[name], own[name], rtol=0, atol=1e-5)
    assert verify(tmp_path / "held", base=base, aligned=aligned, finetuned=finetuned).ok


def test_an_adapter_over_aligned(tmp_path: Path, run_cli: RunCli) -> None:
    base, aligned = make_pair(tmp_path, "llama", "float32", base_shards=2)
    adapter = make_adapter(aligned, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    out = tmp_path / "out"
    project(base, aligned, adapter, out, recipe=FilterRecipe(fraction=0.3, side="right"), device="cpu")
    merged, before, after, written = merge(aligned, adapter), load(base), load(aligned), load(out)
    for name, tensor in written.items():
        exact = filtered_tensor(name, before[name], after[name], merged[name], 0.3, "orthogonal", side="right")
        torch.testing.assert_close(tensor.double(), exact, rtol=0, atol=2e-6, msg=name)
        assert torch.equal(tensor, after[name]) == ("q_proj" not in name and "down_proj" not in name), name
    assert verify(out, base=base, aligned=aligned, finetuned=adapter).problems == []
    project(base, aligned, adapter, tmp_path / "layers", recipe=FilterRecipe(fraction=0.3, layers=1), device="cpu")
    other = aligned.rename(tmp_path / "another-model")
    done = run_cli("project", base, other, adapter, tmp_path / "refused", "--fraction", "0.3")
    assert done.returncode == 2 and "is an adapter over aligned and was given over another-model" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "refused").exists()


def test_the_dry_run_writes_nothing(three: Three, tmp_path: Path, run_cli: RunCli) -> None:
    done = run_cli("project", *three, tmp_path / "out", "--fraction", "0.2", "--dry-run", "--json", tmp_path / "plan.json")
    assert done.returncode == 0, done.stderr
    assert "orthogonal, fraction 0.2 (top, left)" in " ".join(done.stdout.split()) and not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["command"] == "project --dry-run" and report["edited_tensors"] == len(load(three[2]))
