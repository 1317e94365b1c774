"""`project` on checkpoints: values against float64, files, figures, resumption, verify, Safe LoRA, adapters, and wrong input."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter, merge
from click.testing import CliRunner
from conftest import RunCli, start_cli
from finetuned import filtered_tensor, finetune
from reference import assert_equals_to_rounding, header, load
from safetensors.torch import load_file, save_file
from tiny_models import make_pair

from lox_merge import FilterRecipe, filter_matrix, harden, project
from lox_merge.cli.main import cli
from lox_merge.errors import LoxMergeError, LoxMergeWarning, NonFiniteDeltaError, OutputError, PlanError, RecipeError, RequestError, SourceError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.filter_checks import measure_direction
from lox_merge.jobs.project import plan_projection
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.verify import verify
from lox_merge.maths.geometry import REVERTING_COSINE

Three = tuple[Path, Path, Path]
UP = "model.layers.0.mlp.up_proj.weight"


def make_three(folder: Path, architecture: str = "llama", dtype: str = "bfloat16", **settings: Any) -> Three:
    base, aligned = make_pair(folder, architecture, dtype, base_shards=2, **settings)
    return base, aligned, finetune(aligned, folder / "finetuned")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Three:
    return make_three(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Three:
    return make_three(tmp_path_factory.mktemp("floats"), dtype="float32")


def copies(three: Three, folder: Path) -> Three:
    base, aligned, finetuned = (shutil.copytree(model, folder / model.name) for model in three)
    return base, aligned, finetuned


@pytest.mark.parametrize(
    ("architecture", "dtype", "mode", "side"),
    [
        ("llama", "bfloat16", "orthogonal", "left"),
        ("llama", "float32", "parallel", "right"),
        ("gpt2", "float32", "orthogonal", "left"),
        ("gpt2", "float32", "parallel", "right"),
        ("gpt_oss", "float32", "orthogonal", "left"),
        ("gpt_oss", "float32", "parallel", "right"),
        ("mixtral", "bfloat16", "parallel", "left"),
        ("qwen2_vl", "float32", "orthogonal", "left"),
    ],
)
def test_every_tensor_equals_the_float64_formula(architecture: str, dtype: str, mode: str, side: str, tmp_path: Path) -> None:
    models = make_three(tmp_path, architecture, dtype)
    recipe = FilterRecipe(mode=mode, fraction=0.2, side=side)  # type: ignore[arg-type]
    result = project(*models, tmp_path / "out", recipe=recipe, device="cpu")
    base, aligned, finetuned, out = (load(folder) for folder in (*models, tmp_path / "out"))
    assert list(out) == list(finetuned)
    changed = 0
    for name, tensor in finetuned.items():
        exact = filtered_tensor(name, base[name], aligned[name], tensor, 0.2, mode, side=side, kind=architecture)
        assert out[name].dtype == tensor.dtype
        assert_equals_to_rounding(out[name], exact, name)
        changed += not torch.equal(out[name], tensor)
    assert changed > 10 and result.summary.edited_tensors >= changed


def test_stacked_experts_on_disk(tmp_path: Path) -> None:
    """A Mixtral as transformers 5 holds it in memory: (experts, gate and up, hidden)."""
    models = make_three(tmp_path, "mixtral", "float32", layers=1)
    folders = []
    for folder in models:
        tensors = load(folder)
        prefix = "model.layers.0.block_sparse_moe.experts."
        w1, w2, w3 = ([tensors.pop(f"{prefix}{expert}.w{part}.weight") for expert in range(3)] for part in (1, 2, 3))
        gate_up = torch.stack([torch.cat(both) for both in zip(w1, w3, strict=True)])
        stacked = {"model.layers.0.mlp.experts.gate_up_proj": gate_up, "model.layers.0.mlp.experts.down_proj": torch.stack(w2)}
        target = tmp_path / f"stacked-{folder.name}"
        target.mkdir()
        shutil.copy(folder / "config.json", target)
        save_file(tensors | stacked, target / "model.safetensors", metadata={"format": "pt"})
        folders.append(target)
    project(*folders, tmp_path / "out", recipe=FilterRecipe(fraction=0.3))
    base, aligned, finetuned, out = (load(folder) for folder in (*folders, tmp_path / "out"))
    for name in out:
        exact = filtered_tensor(name, base[name], aligned[name], finetuned[name], 0.3, "orthogonal", kind="stacked")
        assert_equals_to_rounding(out[name], exact, name)


@pytest.mark.parametrize("basis", ["top", "random-k", "random"])
def test_same_values_as_the_pure_function_and_modes_share_the_update(floats: Three, basis: str, tmp_path: Path) -> None:
    from lox_merge.jobs.filter_edit import direction_seed

    for mode in ("parallel", "orthogonal"):
        project(*floats, tmp_path / mode, recipe=FilterRecipe(mode=mode, rank=4, basis=basis, seed=3), device="cpu")  # type: ignore[arg-type]
    base, aligned, finetuned, parallel, orthogonal = (load(folder) for folder in (*floats, tmp_path / "parallel", tmp_path / "orthogonal"))
    for name, tensor in finetuned.items():
        stored = [part.reshape(len(part), -1) for part in (base[name], aligned[name], tensor)]
        seed = 3 if basis == "top" else direction_seed(3, name)
        expected = filter_matrix(*stored, 4 if tensor.ndim > 1 else 1, "orthogonal", basis=basis, seed=seed)  # type: ignore[arg-type]
        assert torch.equal(orthogonal[name], expected.view(tensor.shape)), name
        both = (parallel[name] - aligned[name]) + (orthogonal[name] - aligned[name])
        torch.testing.assert_close(both, tensor - aligned[name], rtol=0, atol=1e-6)


def test_every_matrix_draws_its_own_directions() -> None:
    from lox_merge.jobs.filter_edit import direction_seed
    from lox_merge.jobs.work import matrix_seed

    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(50)]
    seeds = {found for seed in (0, 1) for name in names for found in (direction_seed(seed, name), matrix_seed(seed, name))}
    assert len(seeds) == 4 * len(names)  # other matrices, other seeds, and directions apart from rounding noise


def test_the_output_mirrors_the_fine_tuned_checkpoint(three: Three, tmp_path: Path) -> None:
    finetuned = shutil.copytree(three[2], tmp_path / "ft")
    (finetuned / "chat_template.jinja").write_text("{{ 'the fine-tuned one' }}")
    (finetuned / "README.md").write_text("not this model's card")
    out = tmp_path / "out"
    result = project(*three[:2], finetuned, out, recipe=FilterRecipe(fraction=0.2, exclude=("lm_head", "norm")))
    assert {path.name for path in out.iterdir()} == {path.name for path in finetuned.iterdir()} - {"README.md"} | {"lox_merge.json"}
    for path in out.iterdir():
        if path.suffix == ".safetensors":
            assert header(path) == header(finetuned / path.name)
        elif path.name != "lox_merge.json":
            assert path.read_bytes() == (finetuned / path.name).read_bytes()
    theirs, ours = load(finetuned), load(out)
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]) == ("lm_head" in name or "norm" in name), name
    text = (out / "lox_merge.json").read_text()
    assert str(tmp_path) not in text and json.loads(text) == result.manifest
    assert result.manifest["job"]["method"] == "project" and list(result.manifest["sources"]) == ["base", "aligned", "finetuned"]
    for role, folder in zip(("base", "aligned", "finetuned"), (*three[:2], finetuned), strict=True):
        for file, entry in result.manifest["sources"][role]["files"].items():
            assert entry["sha256"] == hashlib.sha256((folder / file).read_bytes()).hexdigest()


def test_figures_of_the_manifest(floats: Three, tmp_path: Path) -> None:
    result = project(*floats, tmp_path / "out", recipe=FilterRecipe(fraction=0.25))
    base, aligned, finetuned = (load(folder) for folder in floats)
    total = kept_total = random_total = 0.0
    for tensor in result.manifest["tensors"]:
        name = tensor["name"]
        for matrix in tensor.get("matrices", ()):
            rows, columns = matrix["shape"]
            change = (finetuned[name].double() - aligned[name].double()).view(rows, columns).numpy()
            left, _, _ = np.linalg.svd((aligned[name].double() - base[name].double()).view(rows, columns).numpy(), full_matrices=False)
            k = max(1, round(0.25 * min(rows, columns))) if finetuned[name].ndim > 1 else 1
            inside = left[:, :k].T @ change
            ratio = np.linalg.norm(inside) / np.linalg.norm(change)
            assert matrix["rank"] == k and matrix["kept"] == pytest.approx(ratio, rel=1e-4)
            assert matrix["kept_random"] == pytest.approx(math.sqrt(k / rows)) and matrix["energy_kept"] == pytest.approx(ratio**2, rel=1e-4)
            assert matrix["finetuned_norm"] == pytest.approx(np.linalg.norm(change), rel=1e-5) and matrix["decision"] == "filtered"
            total, kept_total = total + np.linalg.norm(change) ** 2, kept_total + np.linalg.norm(inside) ** 2
            random_total += k / rows * np.linalg.norm(change) ** 2
    summary = result.summary
    assert summary.energy_kept == pytest.approx(kept_total / total, rel=1e-4)
    assert summary.energy_kept_random == pytest.approx(random_total / total, rel=1e-4)
    assert summary.realised_gain == pytest.approx(1.0, abs=1e-4)


def test_large_ranks_take_the_dense_path_and_say_so(tmp_path: Path, run_cli: RunCli) -> None:
    models = make_three(tmp_path, "llama", "float32", hidden=192, layers=1)
    done = run_cli("project", *models, "out", "--fraction", "0.5", "--device", "cpu", "--include", "mlp|q_proj", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "dense decompositions" in done.stdout and "random subspace" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    manifest = json.loads((tmp_path / "out" / "lox_merge.json").read_text())
    methods = {matrix["method"] for tensor in manifest["tensors"] for matrix in tensor.get("matrices", ())}
    assert methods == {"gram"} and manifest["summary"]["dense"] == 4
    base, aligned, finetuned, out = (load(folder) for folder in (*models, tmp_path / "out"))
    for name in (name for name in out if "mlp" in name or "q_proj" in name):
        assert_equals_to_rounding(out[name], filtered_tensor(name, base[name], aligned[name], finetuned[name], 0.5, "orthogonal"), name)
    assert verify(tmp_path / "out", base=models[0], aligned=models[1], finetuned=models[2]).ok


# --- Safe LoRA and SafeMERGE ------------------------------------------------------------------------------------------


def cosines(models: Three, fraction: float) -> dict[str, float]:
    base, aligned, finetuned = (load(folder) for folder in models)
    found = {}
    for name, tensor in finetuned.items():
        if tensor.ndim == 2:
            change = tensor.double() - aligned[name].double()
            left = torch.linalg.svd(aligned[name].double() - base[name].double()).U
            k = max(1, round(fraction * min(tensor.shape)))
            found[name] = float((left[:, :k].T @ change).norm() / change.norm())
    return found


def test_a_threshold_projects_dissimilar_layers_only(floats: Three, tmp_path: Path) -> None:
    known = cosines(floats, 0.25)
    threshold = sorted(known.values())[6] + 1e-4
    result = project(*floats, tmp_path / "out", recipe=FilterRecipe(fraction=0.25, threshold=threshold))
    assert (result.summary.filtered, result.summary.left_as_finetuned) == (7, len(known) - 7)
    base, aligned, finetuned, out = (load(folder) for folder in (*floats, tmp_path / "out"))
    for name, tensor in finetuned.items():
        if name in known and known[name] <= threshold:
            assert_equals_to_rounding(out[name], filtered_tensor(name, base[name], aligned[name], tensor, 0.25, "parallel"), name)
        else:
            assert torch.equal(out[name], tensor), name
    recorded = {tensor["name"]: tensor["matrices"][0]["cosine"] for tensor in result.manifest["tensors"] if "matrices" in tensor}
    assert recorded == pytest.approx(known, rel=1e-4)


@pytest.mark.parametrize("below", ["project", "merge"])
def test_the_least_similar_layers(floats: Three, below: str, tmp_path: Path) -> None:
    known = cosines(floats, 0.25)
    least = sorted(known, key=known.__getitem__)[:3]
    recipe = FilterRecipe(fraction=0.25, layers=3, below=below)  # type: ignore[arg-type]
    result = project(*floats, tmp_path / "out", recipe=recipe)
    base, aligned, finetuned, out = (load(folder) for folder in (*floats, tmp_path / "out"))
    for name, tensor in finetuned.items():
        if name not in least:
            assert torch.equal(out[name], tensor)
        elif below == "merge":
            torch.testing.assert_close(out[name], 0.2 * aligned[name] + 0.8 * tensor, rtol=0, atol=1e-6)
        else:
            assert_equals_to_rounding(out[name], filtered_tensor(name, base[name], aligned[name], tensor, 0.25, "parallel"), name)
    assert (result.summary.merged if below == "merge" else result.summary.filtered) == 3
    assert verify(tmp_path / "out", base=floats[0], aligned=floats[1], finetuned=floats[2]).problems == []


def test_the_authors_projector(floats: Three, tmp_path: Path) -> None:
    project(*floats, tmp_path / "out", recipe=FilterRecipe(projector="safe-lora", threshold=0.5))
    base, aligned, finetuned, out = (load(folder) for folder in (*floats, tmp_path / "out"))
    projected = 0
    for name, tensor in finetuned.items():
        if tensor.ndim == 1:
            assert torch.equal(out[name], tensor)
            continue
        delta, change = aligned[name].double() - base[name].double(), tensor.double() - aligned[name].double()
        inside = delta @ delta.T @ change / delta.norm()
        if float((inside * change).sum() / inside.norm() / change.norm()) <= 0.5:
            torch.testing.assert_close(out[name].double(), aligned[name].double() + inside, rtol=0, atol=1e-6)
            projected += 1
        else:
            assert torch.equal(out[name], tensor)
    assert projected > 3
    assert verify(tmp_path / "out", base=floats[0], aligned=floats[1], finetuned=floats[2]).ok


# --- the job ----------------------------------------------------------------------------------------------------------


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


# --- wrong input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Runs the command, asserts its error's exit code and that there is no output folder; returns the message."""

    def run(*arguments: object, code: int = 2) -> str:
        models, options = [str(model) for model in arguments[:3]], [str(option) for option in arguments[3:]]
        done = CliRunner().invoke(cli, ["project", *models, str(tmp_path / "out"), *(options or ["--fraction", "0.2"])])
        assert isinstance(done.exception, LoxMergeError) and done.exception.exit_code == code, (done.output, done.exception)
        assert not (tmp_path / "out").exists()
        return str(done.exception)

    return run


def test_a_model_with_its_alignment_removed_is_not_written(three: Three, refused: Callable[..., str], tmp_path: Path) -> None:
    base, aligned, _ = three
    assert "base and finetuned are the same checkpoint" in refused(base, aligned, base)
    before = load(base)
    copy = finetune(aligned, tmp_path / "copy", lambda name, _: before[name])
    message = refused(base, aligned, copy, "--fraction", "0.2", "--mode", "parallel")
    assert "the cosine of finetuned − aligned with base − aligned is 1.000" in message and "alignment removed" in message
    half = finetune(aligned, tmp_path / "half", lambda name, tensor: 0.5 * (tensor.float() + before[name].float()))
    assert "points back along the alignment delta" in refused(base, aligned, half, "--rank", "2")
    some = finetune(aligned, tmp_path / "some", lambda name, tensor: before[name] if "q_proj" in name else tensor)
    for options in (["--fraction", "0.2"], ["--fraction", "0.2", "--dry-run"], ["--threshold", "0.9", "--projector", "safe-lora"]):
        assert "points back along the alignment delta" in refused(base, aligned, some, *options)


def test_the_limit_lies_where_half_of_the_update_points_back(floats: Three, tmp_path: Path) -> None:
    base, aligned, _ = floats
    before, after = load(base), load(aligned)
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in after.items()}
    scale = math.sqrt(
        sum(float((after[name] - before[name]).square().sum()) for name in after) / sum(float(part.square().sum()) for part in noise.values())
    )
    for share, allowed in ((0.75, False), (0.6, True)):
        # −share·Δ_align + √(1−share²)·noise of the same norm: the cosine is `share`.
        rest = math.sqrt(1 - share**2) * scale
        change = lambda name, tensor, share=share, rest=rest: tensor - share * (tensor - before[name]) + rest * noise[name]  # noqa: E731
        folder = finetune(aligned, tmp_path / str(share), change)
        plan = plan_projection(base, aligned, folder, tmp_path / "plan", recipe=FilterRecipe(fraction=0.2))
        found = measure_direction(plan).reversal
        assert found == pytest.approx(share, abs=0.03) and (found < REVERTING_COSINE) == allowed


def test_nothing_was_fine_tuned(three: Three, refused: Callable[..., str], tmp_path: Path) -> None:
    base, aligned, _ = three
    assert "aligned and finetuned are the same checkpoint" in refused(base, aligned, aligned)
    copy = shutil.copytree(aligned, tmp_path / "copy")
    assert "fine-tuning deltas are zero" in refused(base, aligned, copy)


def test_order_and_architecture(three: Three, refused: Callable[..., str], tmp_path: Path) -> None:
    base, aligned, finetuned = three
    assert "aligned (aligned) has a chat template and finetuned (base) has none: they look swapped" in refused(finetuned, aligned, base)
    assert "base (aligned) has a chat template and aligned (base) has none" in refused(aligned, base, finetuned)
    other = make_pair(tmp_path / "gpt2", "gpt2")[1]
    assert "tensor(s) of aligned (aligned) are missing in finetuned" in refused(base, aligned, other)
    grown = make_pair(tmp_path / "grown", "llama", aligned_vocabulary=101)[1]
    message = refused(base, aligned, grown)
    assert "aligned has [96, 32]" in message and "finetuned has [101, 32]" in message and "vocabularies differ" in message
    wide = make_pair(tmp_path / "wide", "llama", hidden=64)[1]
    assert "give the checkpoint that finetuned was trained from" in refused(base, aligned, wide)
    with pytest.raises(PlanError) as caught:
        plan_projection(base, aligned, grown, aligned / "out", recipe=FilterRecipe(fraction=0.2))
    assert len(caught.value.problems) >= 3  # all of them in one message


def test_a_vocabulary_that_alignment_changed_is_left_as_fine_tuned(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", aligned_vocabulary=101)
    finetuned = finetune(aligned, tmp_path / "finetuned")
    with pytest.warns(LoxMergeWarning) as caught:
        project(base, aligned, finetuned, tmp_path / "out", recipe=FilterRecipe(fraction=0.2))
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2 and any("embed_tokens.weight is copied, not edited: base has [96, 32] and finetuned [101, 32]" in text for text in texts)
    out, after = load(tmp_path / "out"), load(finetuned)
    assert torch.equal(out["lm_head.weight"], after["lm_head.weight"]) and not torch.equal(out[UP], after[UP])


def test_quantised_and_broken_weights(three: Three, refused: Callable[..., str], tmp_path: Path) -> None:
    base, aligned, _ = three
    fp8 = finetune(three[2], tmp_path / "fp8")
    config = json.loads((fp8 / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (fp8 / "config.json").write_text(json.dumps(config))
    assert "finetuned (fp8) is quantised (fp8, one scale a tensor), and project writes plain weights only" in refused(base, aligned, fp8)
    broken = finetune(three[2], tmp_path / "nan", lambda name, tensor: torch.full_like(tensor, math.nan) if name == UP else tensor)
    assert f"{UP}: 2,048 of them" in refused(base, aligned, broken, code=1)
    with pytest.raises(NonFiniteDeltaError):
        project(base, aligned, broken, tmp_path / "out", recipe=FilterRecipe(fraction=0.2, layers=2))
    result = project(base, aligned, broken, tmp_path / "skipped", recipe=FilterRecipe(fraction=0.2, layers=2, skip_non_finite=True))
    assert load(tmp_path / "skipped")[UP].isnan().all() and result.summary.filtered == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give either a fraction"),
        (["--fraction", "0.2", "--rank", "3"], "give either a fraction"),
        (["--fraction", "1"], "fraction is 1; use a number in (0, 1)"),
        (["--fraction", "0"], "fraction is 0"),
        (["--fraction", "nan"], "fraction is nan"),
        (["--fraction", "half"], "not a number"),
        (["--rank", "0"], "rank 0 is not a whole number"),
        (["--rank", "33"], "rank 33 is above the short side of"),
        (["--fraction", "0.2", "--mode", "sideways"], "mode 'sideways' is not known"),
        (["--fraction", "0.2", "--basis", "best"], "basis 'best' is not known"),
        (["--fraction", "0.2", "--side", "up"], "side 'up' is not known"),
        (["--fraction", "0.2", "--threshold", "2"], "threshold is 2; it is a cosine"),
        (["--fraction", "0.2", "--threshold", "0.3", "--layers", "2"], "give one of them"),
        (["--fraction", "0.2", "--layers", "0"], "layers is 0"),
        (["--fraction", "0.2", "--threshold", "0.3", "--mode", "orthogonal"], "go with mode parallel"),
        (["--fraction", "0.2", "--below", "merge"], "give threshold or layers too"),
        (["--fraction", "0.2", "--merge-weight", "0.3"], "it goes with below 'merge'"),
        (["--fraction", "0.2", "--layers", "2", "--below", "merge", "--merge-weight", "1.5"], "merge_weight is 1.5"),
        (["--fraction", "0.2", "--layers", "2", "--below", "merge", "--rounding", "feedback"], "needs a limited rank"),
        (["--fraction", "0.2", "--projector", "safe-lora"], "it takes no fraction"),
        (["--fraction", "0.2", "--include", "no_such_layer"], "matches no tensor"),
        (["--fraction", "0.2", "--dtype", "int4"], "dtype 'int4' is not supported"),
        (["--fraction", "0.2", "--device", "tpu"], "device 'tpu' is not known"),
    ],
)
def test_settings(three: Three, refused: Callable[..., str], options: list[str], words: str) -> None:
    assert words in refused(*three, *(options or ["--seed", "0"]))


def test_outputs_in_the_way(three: Three, tmp_path: Path) -> None:
    models = copies(three, tmp_path)
    for place, words in ((models[2] / "out", "lies inside finetuned"), (tmp_path, "lies inside the output")):
        with pytest.raises(PlanError, match=words):
            project(*models, place, recipe=FilterRecipe(fraction=0.2))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not written by lox-merge"):
        project(*models, mine, recipe=FilterRecipe(fraction=0.2), overwrite=True)
