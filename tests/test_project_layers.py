"""Safe LoRA and SafeMERGE: `project` by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from finetuned import filtered_tensor
from project_fixtures import Three
from reference import assert_equals_to_rounding, load

from lox_merge import FilterRecipe, project
from lox_merge.jobs.verify import verify


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
