"""`project` on checkpoints: values against float64, files, figures."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RunCli
from finetuned import filtered_tensor
from project_fixtures import Three, make_three
from reference import assert_equals_to_rounding, header, load
from safetensors.torch import save_file

from lox_merge import FilterRecipe, filter_matrix, project
from lox_merge.jobs.verify import verify


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
