"""Decomposing and inspecting quantised checkpoints, and where the noise of two quantised models begins in their difference."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter
from conftest import RunCli
from quantised_models import FORMS, as_scales_apart, decoded_copy, pair_in_forms
from safetensors.torch import load_file, save_file
from tiny_models import read_tensors

from lox_merge.jobs.factors import Factors
from lox_merge.jobs.noise import PLAIN, RoundingNoise
from lox_merge.maths.grid import Codes, FloatCodes, Grid, WholeCodes, fresh_scales
from lox_merge.maths.precision import rounding_noise_edge, rounding_variance

UP = "model.layers.0.mlp.up_proj.weight"
Models = dict[str, Path]


@pytest.fixture(name="models", scope="module")
def models_fixture(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """base and aligned in three forms, beside float32 copies of what those stand for."""
    made = pair_in_forms(tmp_path_factory.mktemp("quantised"), ("fp8", "int4", "int8"))
    return made | {f"{name}-decoded": decoded_copy(folder, folder.with_name(f"{name}-decoded")) for name, folder in made.items() if "-" in name}


def grid_for(values: torch.Tensor, codes: Codes, largest: float, block: tuple[int, int]) -> Grid:
    return Grid.of_blocks(codes, fresh_scales(values, block, largest), None, (values.shape[0], values.shape[1]), block)


@pytest.mark.parametrize(
    ("codes", "largest", "block"),
    [(FloatCodes(torch.float8_e4m3fn), 448.0, (128, 128)), (WholeCodes(8), 127.0, (1, 512)), (WholeCodes(4), 7.0, (1, 128))],
)
def test_the_edge_is_a_little_above_the_noise_of_two_quantised_models(codes: Codes, largest: float, block: tuple[int, int]) -> None:
    """Independent weights, so that every entry of both is rounded: the largest singular value of what rounding adds to their difference."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        weights = [0.02 * torch.randn(384, 512, generator=generator) for _ in range(2)]
        grids = [grid_for(some, codes, largest, block) for some in weights]
        stored = [grid.round(some, slice(None)) for grid, some in zip(grids, weights, strict=True)]
        errors = [low - some for low, some in zip(stored, weights, strict=True)]
        noise, delta = errors[1] - errors[0], stored[1] - stored[0]
        for added, edge in (
            (noise, RoundingNoise(*grids).edge(*stored, delta)),
            (errors[1], RoundingNoise(None, grids[1]).edge(weights[0].double(), stored[1], stored[1] - weights[0])),
            (errors[0], RoundingNoise(grids[0], None).edge(stored[0], weights[1].double(), weights[1] - stored[0])),
            # A part of the matrix has its own scales.
            (
                noise[:200],
                RoundingNoise(*(grid.part(slice(0, 200), slice(None)) for grid in grids)).edge(stored[0][:200], stored[1][:200], delta[:200]),
            ),
        ):
            assert 0.75 < float(torch.linalg.matrix_norm(added.double(), 2)) / edge < 1


@pytest.mark.parametrize("change", [1e-2, 3e-3, 1e-3, 1e-4])
@pytest.mark.parametrize(
    ("codes", "largest", "block"),
    [(FloatCodes(torch.float8_e4m3fn), 448.0, (1, 512)), (WholeCodes(8), 127.0, (1, 512)), (WholeCodes(4), 7.0, (1, 128))],
)
def test_no_noise_passes_the_edge_where_steps_are_wider_than_the_change(codes: Codes, largest: float, block: tuple[int, int], change: float) -> None:
    """Few entries differ then, by much each, and scales that differ shift whole rows: less noise in all, and less even."""
    generator = torch.Generator().manual_seed(1)
    first = 0.02 * torch.randn(384, 512, generator=generator)
    weights = first, first + change * 0.02 * torch.randn(384, 512, generator=generator)
    grids = [grid_for(some, codes, largest, block) for some in weights]
    stored = [grid.round(some, slice(None)) for grid, some in zip(grids, weights, strict=True)]
    delta = stored[1] - stored[0]
    noise = delta - (weights[1] - weights[0])
    edge = RoundingNoise(*grids).edge(*stored, delta)
    assert 0.4 < float(torch.linalg.matrix_norm(noise.double(), 2)) / edge < 1
    if change == 1e-4:
        variances = [grid.rounding_variance(values) for grid, values in zip(grids, stored, strict=True)]
        rounded_everywhere = sum(float((variances[0][axis] + variances[1][axis]).max()) ** 0.5 for axis in (0, 1))
        assert edge < 0.7 * rounded_everywhere
    assert RoundingNoise(*grids).edge(stored[0], stored[0], torch.zeros_like(delta)) == 0.0


def mean_of(grid: Grid, values: torch.Tensor) -> float:
    """Variance per entry."""
    return float(grid.rounding_variance(values)[0].sum()) / values.numel()


def test_variance_of_each_kind_of_code() -> None:
    codes = torch.tensor([[0.0, 2.0**-9, 2.0**-6, 1.0, 1.75, 2.0, 448.0, -3.5]])
    floats = Grid.of_blocks(FloatCodes(torch.float8_e4m3fn), torch.tensor([[3.0]]), None, (1, 8), (1, 8))
    steps = np.array([2.0**-9, 2.0**-9, 2.0**-9, 0.125, 0.125, 0.25, 32.0, 0.25])
    # Below 1 and 2 the next number is nearer than above them; 448 counts like a number within its binade.
    shares = np.array([12, 12, 12, 16, 12, 16, 12, 12])
    assert mean_of(floats, 3 * codes) == pytest.approx(float(np.mean(9 * steps**2 / shares)), rel=1e-6)
    by_row, by_column = floats.rounding_variance(3 * codes)
    assert np.allclose(by_column.numpy(), 9 * steps**2 / shares, rtol=1e-6) and by_row.tolist() == pytest.approx([float(by_column.sum())])
    drawn = torch.empty(2, 200_000).uniform_(8, 60, generator=torch.Generator().manual_seed(0))
    unit = Grid.of_blocks(FloatCodes(torch.float8_e4m3fn), torch.tensor([[1.0]]), None, (2, 200_000), (2, 200_000))
    rounded = unit.round(drawn, slice(None))
    assert mean_of(unit, rounded) == pytest.approx(float((rounded - drawn).square().mean()), rel=0.01)
    # A negative scale is as wide as a positive one; a block of zeros has no steps.
    whole = Grid.of_blocks(WholeCodes(4), torch.tensor([[0.5, -2.0, 0.0]]), torch.tensor([[1.0, -3.0, 0.0]]), (2, 6), (2, 2))
    assert mean_of(whole, torch.zeros(2, 6)) == pytest.approx((0.25 + 4 + 0) / 3 / 12)
    plain = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert PLAIN.edge(plain, plain, torch.zeros(30, 20)) == rounding_noise_edge(plain)
    # The rounding of a plain model against a quantised one is even.
    fine = Grid.of_blocks(WholeCodes(8), torch.tensor([[1e-12]]), None, (30, 20), (30, 20))
    edge = RoundingNoise(fine, None).edge(torch.zeros(30, 20), plain, plain.float())
    assert edge == pytest.approx(rounding_variance(plain) ** 0.5 * (30**0.5 + 20**0.5))
    assert RoundingNoise(fine, None).edge(torch.zeros(0, 20), plain[:0], torch.zeros(0, 20)) == 0.0


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_factors_are_those_of_the_decoded_weights(models: Models, run_cli: RunCli, tmp_path: Path, form: str) -> None:
    pair = models[f"base-{form}"], models[f"aligned-{form}"]
    done = run_cli("decompose", *pair, tmp_path / "f.safetensors", "--rank", 7)
    assert done.returncode == 0 and "The error of that is part of every delta" in done.stderr.replace("\n", " "), done.stderr
    one, other = (read_tensors(models[f"{role}-{form}-decoded"]) for role in ("base", "aligned"))
    with Factors.open(tmp_path / "f.safetensors") as factors:
        assert factors.matrices
        for (name, part), record in factors.matrices.items():
            delta = (other[name].double() - one[name].double()).numpy()
            values = np.linalg.svd(delta, compute_uv=False)[:7]
            found = factors.subspace(name, part).singular_values.numpy()
            assert np.allclose(found, values, rtol=1e-4, atol=1e-4 * values[0]), name
            # The output head and the embedding are not quantised here.
            assert (record.noise_edge > 20 * rounding_noise_edge(other[name])) == ("_proj" in name)
    # The factors serve the edit: an adapter of them is the one that is computed without them, but for the error of either SVD.
    made = [tmp_path / "with", tmp_path / "without"]
    for out, options in zip(made, (["--factors", tmp_path / "f.safetensors"], []), strict=True):
        assert run_cli("harden", *pair, out, "--rank", 5, *options).returncode == 0
        assert run_cli("verify", out, "--base", pair[0], "--aligned", pair[1]).returncode == 0
    first, second = (load_file(out / "adapter_model.safetensors") for out in made)
    for name in (name for name in first if "lora_B" in name):
        down = name.replace("lora_B", "lora_A")
        expected = second[name] @ second[down]
        assert float((first[name] @ first[down] - expected).norm()) < 1e-3 * float(expected.norm()), name
    # Other weights are another pair.
    refused = run_cli("harden", pair[0], models["aligned"], tmp_path / "refused", "--factors", tmp_path / "f.safetensors")
    assert refused.returncode == 2 and "another pair" in refused.stderr.replace("\n", " ")


def figures(run_cli: RunCli, folder: Path, *models: object) -> tuple[dict[str, Any], str]:
    done = run_cli("inspect", *models, "--rank", 3, "--json", folder / "r.json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "r.json").read_text())
    return found, done.stderr.replace("\n", " ")


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_an_inspection_measures_what_the_codes_stand_for(models: Models, run_cli: RunCli, tmp_path: Path, form: str) -> None:
    """Fine-tuned models of two kinds: quantised itself, and an adapter over the quantised aligned model."""
    tuned = tmp_path / "tuned"
    shutil.copytree(models["aligned"], tuned)
    for file in tuned.glob("*.safetensors"):
        generator = torch.Generator().manual_seed(3)
        tensors = {name: value + 0.01 * torch.randn(value.shape, generator=generator).to(value) for name, value in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    quantised = FORMS[form](tuned, tmp_path / "tuned-low")
    adapter = make_adapter(models["aligned"], tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(models[f"aligned-{form}"])}))
    over = Path(shutil.copytree(adapter, tmp_path / "over"))
    (over / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(models[f"aligned-{form}-decoded"])}))
    low, warning = figures(run_cli, tmp_path, models[f"base-{form}"], models[f"aligned-{form}"], quantised, adapter)
    high, silence = figures(
        run_cli,
        tmp_path,
        models[f"base-{form}-decoded"],
        models[f"aligned-{form}-decoded"],
        decoded_copy(quantised, tmp_path / "tuned-decoded"),
        over,
    )
    forms = [source.get("quantised") for source in (low["sources"]["base"], low["sources"]["aligned"], *low["sources"]["finetuned"])]
    assert all(forms) and not any("quantised" in source for source in (high["sources"]["base"], high["sources"]["aligned"]))
    assert "quantised (" in warning and "quantised (" not in silence
    assert len(low["matrices"]) == len(high["matrices"]) > 10
    for one, other in zip(low["matrices"], sorted(high["matrices"], key=lambda record: order(low, record)), strict=True):
        assert one["name"] == other["name"]
        for found, expected in zip([one["aligned"], *one["finetuned"]], [other["aligned"], *other["finetuned"]], strict=True):
            assert found["norm"] == pytest.approx(expected["norm"], rel=1e-6)
            assert found["r"] == expected["r"] or found["r"] == pytest.approx(expected["r"], rel=1e-4)
        edges = [found["noise_edge"] for found in (one["aligned"], *one["finetuned"])]
        quantised_there = "_proj" in one["name"]
        assert (edges[0] > 1e3 * edges[2]) == quantised_there and (edges[1] > 1e3 * edges[2]) == quantised_there
    # Noise of the storage would pass for directions of the update where it is not told from it.
    kept = [
        (one["aligned"]["noise_floor_rank"], other["aligned"]["noise_floor_rank"]) for one, other in zip_by_name(low, high) if "_proj" in one["name"]
    ]
    assert all(few is not None and (many is None or few < many) for few, many in kept)


def order(document: dict[str, Any], record: dict[str, Any]) -> int:
    return [one["name"] for one in document["matrices"]].index(record["name"])


def zip_by_name(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    known = {record["name"]: record for record in other["matrices"]}
    return [(record, known[record["name"]]) for record in one["matrices"]]


def test_scales_in_a_file_of_their_own_are_read_and_damage_is_named(models: Models, run_cli: RunCli, tmp_path: Path) -> None:
    apart = as_scales_apart(models["aligned-fp8"], tmp_path / "aligned-fp8")
    one, _ = figures(run_cli, tmp_path, models["base-fp8"], models["aligned-fp8"])
    other, _ = figures(run_cli, tmp_path, models["base-fp8"], apart)
    assert one["matrices"] == other["matrices"]
    tensors = load_file(apart / "scales.safetensors")
    tensors[UP + "_scale_inv"][0, 1] = float("nan")
    save_file(tensors, apart / "scales.safetensors", metadata={"format": "pt"})
    done = run_cli("inspect", models["base-fp8"], apart)
    assert done.returncode == 1 and f"{UP}: 256 in aligned" in done.stderr.replace("\n", " ") and "Traceback" not in done.stderr
    del tensors[UP + "_scale_inv"]
    save_file(tensors, apart / "scales.safetensors", metadata={"format": "pt"})
    for command, extra in (("inspect", []), ("decompose", [tmp_path / "f.safetensors"])):
        done = run_cli(command, models["base-fp8"], apart, *extra)
        assert done.returncode == 2 and "Traceback" not in done.stderr, command
    assert not (tmp_path / "f.safetensors").exists()


def test_settings_of_a_grid_are_moved_with_it() -> None:
    grid = grid_for(torch.randn(8, 8), WholeCodes(8), 127.0, (2, 4))
    moved = replace(grid, zeros=torch.zeros_like(grid.scales)).to(torch.device("cpu"))
    assert moved.zeros is not None and mean_of(moved, torch.zeros(8, 8)) == pytest.approx(mean_of(grid, torch.zeros(8, 8)))
