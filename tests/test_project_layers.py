"""Safe LoRA and SafeMERGE: `project` by layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetuned import filtered_tensor
from project_fixtures import Three
from reference import assert_equals_to_rounding, load
from safetensors.torch import load_file, save_file

from lox_merge import FilterRecipe, project
from lox_merge.errors import Interrupted, RequestError, SourceChangedError
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


class Interrupting:
    """Ctrl-C at the first bytes."""

    def advance(self, count: int) -> None:
        raise KeyboardInterrupt


def begun(models: Three, out: Path, recipe: FilterRecipe) -> None:
    with pytest.raises(Interrupted):
        project(*models, out, recipe=recipe, progress=Interrupting())


def save_again(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        changed = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
        save_file(changed, file.with_suffix(".new"), metadata={"format": "pt"})
        file.with_suffix(".new").replace(file)


@pytest.fixture
def own(floats: Three, tmp_path: Path) -> Three:
    """Models that a test may change."""
    base, aligned, finetuned = (Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in floats)
    return base, aligned, finetuned


def test_layers_belong_to_the_sources_they_were_found_in(own: Three, tmp_path: Path) -> None:
    """Training went on after an interruption, and was saved over the same files: the layers of then are not those of now."""
    recipe, out = FilterRecipe(fraction=0.25, layers=3), tmp_path / "out"
    base, aligned = load(own[0]), load(own[1])
    before = sorted(cosines(own, 0.25), key=cosines(own, 0.25).__getitem__)
    begun(own, out, recipe)
    # What was least similar is now along the alignment delta.
    save_again(own[2], lambda name, tensor: tensor + 5 * (aligned[name] - base[name]) if name in before[:3] else tensor)
    now = cosines(own, 0.25)
    assert set(sorted(now, key=now.__getitem__)[:3]) != set(before[:3])
    with pytest.raises(SourceChangedError, match="least similar are not those"):
        project(*own, out, recipe=recipe)
    project(*own, out, recipe=recipe, overwrite=True)
    expected = project(*own, tmp_path / "expected", recipe=recipe).out
    assert all(torch.equal(tensor, load(expected)[name]) for name, tensor in load(out).items())


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"least_similar": 5}', '{"least_similar": [[1]], "sources": {}}'])
def test_layers_whose_file_is_damaged_are_found_again(own: Three, tmp_path: Path, text: str) -> None:
    recipe, out = FilterRecipe(fraction=0.25, layers=3), tmp_path / "out"
    begun(own, out, recipe)
    (out / ".lox_merge" / "layers.json").write_text(text)
    project(*own, out, recipe=recipe)
    assert verify(out, base=own[0], aligned=own[1], finetuned=own[2]).problems == []


def test_a_direction_that_was_turned_after_an_interruption_is_seen(own: Three, tmp_path: Path) -> None:
    recipe, out = FilterRecipe(fraction=0.25), tmp_path / "out"
    base, aligned = load(own[0]), load(own[1])
    begun(own, out, recipe)
    save_again(own[2], lambda name, tensor: aligned[name] - 0.9 * (aligned[name] - base[name]))
    with pytest.raises(RequestError, match="points back"):
        project(*own, out, recipe=recipe)


def test_a_confirmed_order_is_on_record(own: Three, tmp_path: Path) -> None:
    (own[0] / "chat_template.jinja").write_text("{{ messages }}")
    for folder in own[1:]:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(RequestError, match="look swapped"):
        project(*own, tmp_path / "out", recipe=FilterRecipe(fraction=0.25))
    assert project(*own, tmp_path / "out", recipe=FilterRecipe(fraction=0.25), order_is_right=True).manifest["confirmed"] == ["order"]
