"""The noise floor of quantised pairs in the edit, and the projection filter over quantised checkpoints."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCli
from finetuned import finetune
from quantised_models import as_block_fp8, as_scales_apart, decoded_copy, pair_in_forms
from safetensors.torch import load_file
from tiny_models import read_tensors

from lox_merge import harden
from lox_merge.errors import LoxMergeWarning
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.recipe import Recipe

Models = dict[str, Path]


@pytest.fixture(name="models", scope="module")
def models_fixture(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """base, aligned and a model fine-tuned from aligned, in fp8 and int4, beside float32 copies of what those stand for."""
    made = pair_in_forms(tmp_path_factory.mktemp("quantised"), ("fp8", "int4"))
    made["finetuned"] = finetune(made["aligned"], made["base"].with_name("finetuned"))
    made["finetuned-fp8"] = as_block_fp8(made["finetuned"], made["base"].with_name("finetuned-fp8"))
    return made | {f"{name}-decoded": decoded_copy(folder, folder.with_name(f"{name}-decoded")) for name, folder in made.items() if "-" in name}


def matrices(out: Path) -> dict[str, dict[str, Any]]:
    record = json.loads((out / "lox_merge.json").read_text())
    return {tensor["name"].removesuffix("_packed") + matrix["part"]: matrix for tensor in record["tensors"] for matrix in tensor.get("matrices", ())}


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_the_noise_floor_counts_what_stands_above_the_storage_s_error(models: Models, run_cli: RunCli, tmp_path: Path, form: str) -> None:
    pair = models[f"base-{form}"], models[f"aligned-{form}"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoxMergeWarning)  # the pair is quantised
        factors = decompose(*pair, tmp_path / "f.safetensors", recipe=Recipe(rank=32)).factors
    with factors:
        values = {key: factors.subspace(*key).singular_values for key in factors.matrices}
        expected = {"".join(key): int((values[key] > record.noise_edge).sum()) for key, record in factors.matrices.items()}
    assert len(set(expected.values())) > 2 and all((rank < 8) == ("_proj" in name) for name, rank in expected.items())
    made = {"alone": [], "factors": ["--factors", tmp_path / "f.safetensors"], "workers": ["--dtype", "float32", "--workers", 2]}
    for name, options in made.items():
        out = tmp_path / name
        done = run_cli("harden", *pair, out, "--rank", "noise-floor", *options)
        assert done.returncode == 0, done.stderr
        # An adapter has no module for a matrix with nothing above the edge.
        there = expected if "--dtype" in options else {matrix: rank for matrix, rank in expected.items() if rank}
        assert {matrix: found["rank"] for matrix, found in matrices(out).items()} == there
        assert run_cli("verify", out, "--base", pair[0], "--aligned", pair[1]).returncode == 0
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "factors"))
    assert one.keys() == two.keys()


def test_a_noise_floor_reads_scales_of_another_file(models: Models, run_cli: RunCli, tmp_path: Path) -> None:
    """Threads that edit ask for them while files are opened and closed."""
    pair = models["base-fp8"], as_scales_apart(models["aligned-fp8"], tmp_path / "apart")
    for out, aligned in ((tmp_path / "one", pair[1]), (tmp_path / "two", models["aligned-fp8"])):
        assert run_cli("harden", pair[0], aligned, out, "--rank", "noise-floor", "--dtype", "bfloat16").returncode == 0
    assert {name: found["rank"] for name, found in matrices(tmp_path / "one").items()} == {
        name: found["rank"] for name, found in matrices(tmp_path / "two").items()
    }


def test_one_quantised_model_is_enough_for_its_edge(models: Models, tmp_path: Path) -> None:
    """Of a base in fp8 the error is in the delta too; the plain rule would take it for alignment."""
    recipe = Recipe(rank="noise-floor", dtype="float32")
    with pytest.warns(LoxMergeWarning, match="part of every delta"):
        harden(models["base-fp8"], models["aligned"], tmp_path / "fp8", recipe=recipe)
    harden(models["base-fp8-decoded"], models["aligned"], tmp_path / "plain", recipe=recipe)
    found, plain = (matrices(tmp_path / name) for name in ("fp8", "plain"))
    up = "model.layers.0.mlp.up_proj.weight"
    assert found[up]["rank"] < 10 and plain[up]["rank"] > 20
    assert found["lm_head.weight"]["rank"] == plain["lm_head.weight"]["rank"]  # not quantised


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("base-fp8", "aligned-int4", "finetuned"), []),
        (("base-fp8", "aligned-fp8", "finetuned"), ["--layers", 3]),
        (("base", "aligned-fp8", "finetuned-fp8"), ["--dtype", "float32"]),
    ],
)
def test_the_filter_reads_what_the_codes_stand_for(
    models: Models, run_cli: RunCli, tmp_path: Path, names: tuple[str, ...], options: list[object]
) -> None:
    quantised = [models[name] for name in names]
    plain = [models.get(f"{name}-decoded", models[name]) for name in names]
    for sources, out in ((quantised, tmp_path / "out"), (plain, tmp_path / "plain")):
        done = run_cli("project", *sources, out, "--rank", 4, *options)
        assert done.returncode == 0, done.stderr
        assert ("The error of that is part of every delta" in done.stderr.replace("\n", " ")) == (sources is quantised)
        given = zip(("--base", "--aligned", "--finetuned"), sources, strict=True)
        assert run_cli("verify", out, *(part for pair in given for part in pair)).returncode == 0
    found, expected = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "plain")
    assert found.keys() == expected.keys() and all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_filtered_model_is_not_rounded_to_codes(models: Models, run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("project", models["base"], models["aligned"], models["finetuned-fp8"], tmp_path / "out", "--rank", 2)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not any(tmp_path.iterdir())
    text = " ".join(done.stderr.split())
    assert "finetuned (finetuned-fp8) is quantised (fp8, 16×16 blocks), and project writes plain weights only" in text
    assert "--dtype bfloat16" in text and "--requantise" not in text
