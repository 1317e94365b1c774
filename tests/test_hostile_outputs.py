"""What the fuzz campaign found in files that this program wrote once: each once, with what the message says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetuned import finetune
from fuzz.materials import Materials, split_header, with_header

from lox_merge import Recipe, harden, project
from lox_merge.errors import OutputError, RecipeError, RequestError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.factors import METADATA_KEY, Factors
from lox_merge.jobs.filter_recipe import FilterRecipe
from lox_merge.jobs.recorded import record_damage
from lox_merge.jobs.verify import verify
from lox_merge.publish.output import open_output

MANIFEST = "lox_merge.json"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def hardened(materials: Materials, tmp_path: Path) -> Path:
    return shutil.copytree(materials.hardened, tmp_path / "hardened")


def change_json(file: Path, change: Change) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["job"].pop("method"), "job.method: missing"),
        (lambda m: m["job"].update(tool=[]), "job.tool"),
        (lambda m: m["output"].update(files=[1]), "output.files"),
        (lambda m: m["output"]["files"].update({"../x": "0"}), "outside the checkpoint's folder"),
        (lambda m: m["output"]["shards"][0].pop("sha256"), "output.shards.0.sha256: missing"),
        (lambda m: m["output"]["shards"][0].update(size="12"), "output.shards.0.size"),
        (lambda m: m["sources"]["base"].update(kind="hub"), "without its commit"),
        (lambda m: m["sources"].pop("aligned"), "sources.aligned: missing"),
        (lambda m: m["sources"].update(other=1.0), "sources.other"),
        (lambda m: m["tensors"].append(None), "tensors"),
        (lambda m: m["tensors"][0].update(action="sold"), "tensors.0.action"),
        (lambda m: m["tensors"][0].update(shape=[True]), "tensors.0.shape"),
        (lambda m: m["summary"].pop("realised_gain"), "summary.realised_gain: missing"),
    ],
)
def test_manifests(materials: Materials, hardened: Path, change: Change, words: str) -> None:
    change_json(hardened / MANIFEST, change)
    before = {path.name: path.read_bytes() for path in hardened.iterdir()}
    for use in (
        lambda: verify(hardened, base=materials.base, aligned=materials.aligned),
        lambda: open_output(hardened),
        lambda: harden(materials.base, materials.aligned, hardened, recipe=Recipe(rank=2)),
    ):
        with pytest.raises(RequestError, match="is damaged") as caught:
            use()
        assert words in str(caught.value)
    assert {path.name: path.read_bytes() for path in hardened.iterdir()} == before


def test_a_manifest_that_is_no_json_is_not_written_over(materials: Materials, hardened: Path) -> None:
    """What output it was is not known any more, so it is not this job's to replace."""
    (hardened / MANIFEST).write_text("{")
    with pytest.raises(OutputError, match=r"is damaged .* pass --overwrite"):
        harden(materials.base, materials.aligned, hardened, recipe=Recipe(rank=3))
    assert (hardened / MANIFEST).read_text() == "{"
    harden(materials.base, materials.aligned, hardened, recipe=Recipe(rank=2), overwrite=True)
    assert verify(hardened, base=materials.base, aligned=materials.aligned).ok


@pytest.mark.parametrize("changes", [{"alpha": "x"}, {"tolerance": None}, {"rank_pattern": [1]}, {"alpha": 10**400}, {"include": [5]}])
def test_recipes_on_record(hardened: Path, changes: dict[str, Any]) -> None:
    change_json(hardened / MANIFEST, lambda manifest: manifest["job"]["recipe"].update(changes))
    with pytest.raises(RecipeError, match="on record is damaged"):
        open_output(hardened)
    with pytest.raises(RecipeError, match="on record is damaged"):
        verify(hardened, offline=True)
    with pytest.raises(RecipeError, match="on record is damaged"):
        FilterRecipe.from_json({"fraction": "x"})


def test_seeds_are_what_torch_takes() -> None:
    for seed in (-(2**63), 2**64 - 1):
        assert Recipe(seed=seed).seed == seed
    for seed in (-(2**63) - 1, 2**64, 10**30):
        with pytest.raises(RecipeError, match="use a whole number from"):
            Recipe(seed=seed)


def test_an_output_of_another_command_has_no_card(materials: Materials, tmp_path: Path) -> None:
    finetuned = finetune(materials.aligned, tmp_path / "finetuned")
    project(materials.base, materials.aligned, finetuned, tmp_path / "out", recipe=FilterRecipe(fraction=0.1))
    with pytest.raises(OutputError, match="only those of lox-merge harden have a model card"):
        open_output(tmp_path / "out")


def test_an_output_of_other_shapes_is_not_compared_entry_by_entry(materials: Materials, hardened: Path) -> None:
    """Whoever makes an output may make its manifest fit: the sources say what shapes it has to have."""
    import torch
    from safetensors.torch import load_file, save_file

    from lox_merge.jobs.atomic import sha256_of

    name = "model.norm.weight"
    file = next(path for path in hardened.glob("*.safetensors") if name in load_file(path))
    save_file(load_file(file) | {name: torch.zeros(3, dtype=torch.bfloat16)}, file, metadata={"format": "pt"})

    def fit(manifest: dict[str, Any]) -> None:
        next(tensor for tensor in manifest["tensors"] if tensor["name"] == name)["shape"] = [3]
        shard = next(shard for shard in manifest["output"]["shards"] if shard["file"] == file.name)
        shard.update(sha256=sha256_of(file), size=file.stat().st_size)

    change_json(hardened / MANIFEST, fit)
    problems = verify(hardened, base=materials.base, aligned=materials.aligned).problems
    assert problems == [f"tensor {name} is BF16 [3], in aligned BF16 [16]"]


def of_certificate(name: str, value: float | None) -> Change:
    return lambda document: document["matrices"][0]["certificate"].update({name: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d["job"].update(recipe=[]), "job.recipe"),
        (lambda d: d["job"]["recipe"].pop("seed"), "job.recipe.seed: missing"),
        (lambda d: d["matrices"][0].update(rank=2), "is not F32"),
        (lambda d: d["matrices"][0].update(name="nothing"), "is not F32"),
        (lambda d: d["matrices"][0].update(shape=[1, 2, 3]), "matrices.0.shape"),
        (lambda d: d["matrices"][0].update(certificate=None), "matrices.0.certificate"),
        (lambda d: d.update(non_finite=None), "non_finite"),
        (lambda d: d["sources"]["base"].pop("files"), "sources.base.files: missing"),
        *((lambda d, rank=rank: d["job"]["recipe"].update(rank=rank), "job.recipe.rank") for rank in ("x", "6.5", "0", "-1", "9" * 5000, "٣", 3)),
        *((lambda d, seed=seed: d["job"]["recipe"].update(seed=seed), "job.recipe.seed") for seed in (2**64, -(2**63) - 1, 10**4000)),
        *((lambda d, norm=norm: d["matrices"][0].update(norm=norm), "matrices.0.norm") for norm in (-1.0, 1e-200, 1e300, None)),
        (lambda d: d["matrices"][0].update(norm=0.0), "directions of a matrix whose norm is 0"),
        (lambda d: d["matrices"][0].update(noise_edge=-1.0), "matrices.0.noise_edge"),
        *((of_certificate("residual", value), "certificate.residual") for value in (None, -1.0, 1e308)),
        *((of_certificate("next_singular_value", value), "certificate.next_singular_value") for value in (-1.0, 1e300)),
        (of_certificate("passes", -1), "certificate.passes"),
    ],
)
def test_factors(materials: Materials, tmp_path: Path, change: Change, words: str) -> None:
    header, data = split_header(materials.factors)
    document = json.loads(header["__metadata__"][METADATA_KEY])
    change(document)
    file = tmp_path / "factors.safetensors"
    file.write_bytes(with_header(json.dumps(header | {"__metadata__": {METADATA_KEY: json.dumps(document)}}).encode(), data))
    with pytest.raises(RequestError, match="is damaged") as caught:
        Factors.open(file)
    assert words in str(caught.value)
    with pytest.raises(RequestError):
        decompose(materials.base, materials.aligned, file, recipe=Recipe(rank=3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0, 1e30])
def test_singular_values_that_no_such_matrix_has(materials: Materials, tmp_path: Path, value: float) -> None:
    from safetensors.torch import load_file, save_file

    header, _ = split_header(materials.factors)
    tensors = load_file(materials.factors)
    name = next(key for key in tensors if key.endswith("q_proj.weight.values"))
    tensors[name][-1] = value
    save_file(tensors, tmp_path / "factors.safetensors", metadata=header["__metadata__"])
    with pytest.raises(RequestError, match=r"is damaged \(the singular values of .*q_proj"):
        harden(materials.base, materials.aligned, tmp_path / "out", recipe=Recipe(rank=2), factors=tmp_path / "factors.safetensors")
    assert not (tmp_path / "out").exists()


def test_records_of_a_working_state() -> None:
    output = {"file": "a", "size": 1, "sha256": "0"}
    sound = {"output": output, "sources": {"base": {"a": "0"}}, "tensors": [{"name": "x", "shape": [1], "dtype": "F32", "action": "copied"}]}
    assert record_damage(sound) is None
    assert record_damage(sound | {"skipped": [], "matrices": []}) is None
    for changes in (
        {"output": None},
        {"sources": {"base": []}},
        {"sources": {"other": {}}},
        {"tensors": [None]},
        {"output": output | {"file": "/x"}},
        {"of no interest": [{"deep": float("inf")}]},
        {"of no interest": float("nan")},
    ):
        assert record_damage(sound | changes)
    assert record_damage({"output": output, "sources": {}, "skipped": []})
