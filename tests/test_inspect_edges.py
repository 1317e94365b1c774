"""Inspections of what is undefined, wrong or of another layout, and the command line."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RunCli
from inspect_models import fine_tuned, rewritten
from tiny_models import make_pair, read_tensors

from lox_merge import InspectSettings, inspect
from lox_merge.cli.inspect import inspect_command
from lox_merge.diagnostics.measures import measure
from lox_merge.diagnostics.places import layer_of, module_kinds
from lox_merge.diagnostics.records import r_align, r_ft, random_share
from lox_merge.errors import LoxMergeWarning, NumericalError, PlanError, RecipeError, RequestError
from lox_merge.jobs.layout import is_transposed
from lox_merge.maths.precision import rounding_noise_edge


def test_a_model_that_was_not_fine_tuned(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    copy = rewritten(aligned, tmp_path / "copy", lambda _name, values: values)
    found = inspect(base, aligned, copy, device="cpu")
    assert found.notes[0].startswith("copy has the weights of aligned") and found.document["reverting"] == []
    for figures in [found.document["linear"]["finetuned"][0], *(record["finetuned"][0] for record in found.document["matrices"])]:
        ratio = figures["ratio"]
        assert (ratio["mean"] if isinstance(ratio, dict) else ratio) == 1.0
        assert figures["cosines"]["safety_angle"] is None and figures["cosines"]["update_to_total"] is None
        top = figures["energy_kept"][0]["top"]
        assert (top["mean"] if isinstance(top, dict) else top) is None
        assert all(entry.get("mso", entry.get("mean")) is None for entry in figures["mso"])
    assert found.document["linear"]["finetuned"][0]["mso"][0]["undecided"] == 0  # undefined, which more singular values would not change


def test_a_model_that_went_back_to_base_or_most_of_the_way(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", dtype="float32")
    start = read_tensors(base)
    back = rewritten(aligned, tmp_path / "back", lambda name, values: start[name])
    most = rewritten(aligned, tmp_path / "most", lambda name, values: values - 0.9 * (values - start[name]))
    found = inspect(base, aligned, [back, most], device="cpu")
    assert found.document["reverting"] == ["back", "most"]
    assert found.notes[0].startswith("back has the weights of base") and "most points back along −Δ_align (cosine 1.000 over" in found.notes[1]
    assert found.document["linear"]["finetuned"][0]["ratio"]["mean"] is None and found.document["matrices"][0]["finetuned"][0]["r"] is None
    assert found.document["whole"]["finetuned"][0]["cosines"]["update_to_total"] is None
    # Less of the same directions: their share of the energy is as it was.
    assert found.document["linear"]["finetuned"][1]["ratio"]["mean"] == pytest.approx(1, abs=1e-3)
    assert found.document["whole"]["finetuned"][1]["cosines"]["safety_angle"] == pytest.approx(1, abs=1e-6)


def test_a_model_that_goes_back_in_a_few_modules_only(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", dtype="float32")
    start = read_tensors(base)
    part = rewritten(aligned, tmp_path / "part", lambda name, values: start[name] if "v_proj" in name else values)
    found = inspect(base, aligned, part, device="cpu")
    assert found.document["reverting"] == ["part"] and found.document["reversals"] == [pytest.approx(1, abs=1e-6)]
    assert found.document["whole"]["finetuned"][0]["cosines"]["safety_angle"] < 0.5  # over all parameters it would pass unnoticed


def test_matrices_that_alignment_left_alone_are_undefined(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    start = read_tensors(base)
    partly = rewritten(aligned, tmp_path / "partly", lambda name, values: start[name] if "q_proj" in name else values)
    found = inspect(base, partly, fine_tuned(partly, tmp_path / "ft"), device="cpu")
    record = next(record for record in found.document["matrices"] if record["kind"] == "q_proj")
    assert record["aligned"]["r"] is None and record["finetuned"][0]["r"] is None and record["finetuned"][0]["ratio"] is None
    assert record["k"] == 0 and record["aligned"]["r_expected"] is None and record["finetuned"][0]["energy_kept"][0]["top"] is None
    assert record["finetuned"][0]["cosines"]["safety_angle"] is None
    assert found.document["linear"]["aligned"]["r"]["matrices"] == found.document["linear"]["matrices"] - 2
    assert any(note.startswith("Alignment left 2 of 16 matrices as they were") for note in found.notes)
    with pytest.raises(RequestError, match="hold the same weights"):
        inspect(base, rewritten(base, tmp_path / "same", lambda _name, values: values))


def test_a_rank_above_the_short_side_is_clipped_and_said(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", dtype="float32")
    found = inspect(base, aligned, settings=InspectSettings(rank=1000), device="cpu")
    assert {record["k"] for record in found.document["matrices"]} == {16, 32}
    assert "Rank 1000 is above the short side of 16 matrices" in " ".join(found.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": (0.0,)}, r"fraction 0 is outside \(0, 1\)"),
        ({"fractions": (0.5, 1.0)}, r"fraction 1 is outside"),
        ({"etas": (1.5,)}, r"eta 1.5 is outside"),
        ({"etas": (float("nan"),)}, r"eta nan is outside"),
        ({"rank": "energy:0.9"}, "depends on the spectrum"),
        ({"rank": 0}, "not a whole number"),
        ({"side": "top"}, "side 'top' is not known"),
        ({"draws": 1}, "at least 2"),
        ({"include": ("(",)}, "not a regular expression"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        InspectSettings(**options)


def test_models_of_another_architecture_or_vocabulary(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "one", "llama")
    _, wider = make_pair(tmp_path / "wider", "llama", hidden=48)
    _, deeper = make_pair(tmp_path / "deeper", "llama", layers=3)
    _, larger = make_pair(tmp_path / "larger", "llama", aligned_vocabulary=104)
    with pytest.raises(PlanError, match=r"q_proj.weight: aligned has \[32, 32\] \(aligned\), finetuned has \[48, 48\] .*not of one architecture"):
        inspect(base, aligned, wider)
    with pytest.raises(PlanError, match=r"9 tensor\(s\) of finetuned 2 \(aligned\) are missing in aligned"):
        inspect(base, aligned, [aligned, deeper])
    with pytest.raises(PlanError, match=r"9 tensor\(s\) of aligned \(aligned\) are missing in finetuned"):
        inspect(tmp_path / "deeper" / "base", deeper, aligned)
    with pytest.raises(PlanError, match=r"finetuned: .*no-such"):
        inspect(base, aligned, tmp_path / "no-such")
    with pytest.warns(LoxMergeWarning, match=r"(lm_head|embed_tokens).weight: aligned has \[96, 32\].*\[104, 32\].*vocabularies differ"):
        found = inspect(base, aligned, larger, device="cpu")
    assert {"name": "model.embed_tokens.weight", "reason": "vocabularies differ"} in found.document["left_out"] and found.document["linear"][
        "matrices"
    ] == 14
    with pytest.raises(PlanError, match="same checkpoint"):
        inspect(aligned, aligned)


def test_values_that_are_not_finite_are_named_or_left_out(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")

    def broken(name: str, values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        if name in ("lm_head.weight", "model.norm.weight"):
            values.view(-1)[:3] = float("inf")
        return values

    damaged = rewritten(aligned, tmp_path / "damaged", broken)
    with pytest.raises(NumericalError, match=r"2 matrices or vectors: lm_head.weight: 3 in damaged − aligned; model.norm.weight: 3 in damaged"):
        inspect(base, aligned, damaged, device="cpu")
    found = inspect(base, aligned, damaged, settings=InspectSettings(skip_non_finite=True), device="cpu")
    assert found.document["left_out"] == [{"name": name, "reason": "NaN or Inf in a delta"} for name in ("lm_head.weight", "model.norm.weight")]
    assert found.document["whole"]["matrices"] == 15


def test_stacks_of_experts_and_kinds_of_modules(tmp_path: Path) -> None:
    config = {"model_type": "gpt_oss", "hidden_size": 32, "num_local_experts": 3}
    assert is_transposed("model.layers.0.mlp.experts.gate_up_proj", (3, 32, 64), config)
    assert is_transposed("model.layers.0.mlp.experts.down_proj", (3, 32, 32), config)  # square: the model's name decides
    plain = {"model_type": "qwen3_moe", "hidden_size": 32, "num_experts": 3}
    assert not is_transposed("model.layers.0.mlp.experts.gate_up_proj", (3, 64, 32), plain)
    assert not is_transposed("model.layers.0.mlp.experts.down_proj", (3, 32, 24), plain)
    assert is_transposed("model.layers.0.mlp.experts.down_proj", (3, 24, 32), plain)  # the shape itself says so
    assert not is_transposed("transformer.h.0.attn.c_proj.weight", (32, 32), {"model_type": "gpt_bigcode"})
    assert is_transposed("transformer.h.0.attn.c_proj.weight", (32, 32), {"text_config": {"model_type": "gpt2"}})
    assert layer_of("model.layers.11.mlp.experts.3.w1.weight") == ("model.layers", 11) and layer_of("0.weight") == ("", 0)
    assert layer_of("projector.linear_1.weight") is None
    names = ["a.layers.0.attn.c_proj.weight", "a.layers.0.mlp.c_proj.weight", "a.layers.0.moe.experts.2.w1.weight", "a.wte.weight"]
    assert list(module_kinds(names).values()) == ["attn.c_proj", "mlp.c_proj", "experts.w1", "wte"]
    towers = ["vision.layers.0.q_proj.weight", "text.layers.0.q_proj.weight"]
    assert list(module_kinds(towers).values()) == ["vision.q_proj", "text.q_proj"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_noise_edge_of_every_dtype_by_frexp(dtype: torch.dtype) -> None:
    values = (torch.randn(70, 40, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    values[0, :3], values[1, :3] = 0.0, torch.finfo(dtype).tiny / 4
    numbers = values.double().numpy()
    spacing = np.exp2(np.floor(np.log2(np.maximum(np.abs(numbers), torch.finfo(dtype).tiny)))) * torch.finfo(dtype).eps
    for stored, part in ((values, spacing), (values[:, ::2], spacing[:, ::2])):
        rows, columns = (math.sqrt(side - 0.5) for side in stored.shape)
        largest = (rows + columns) ** 2 + 2.0234 * (rows + columns) * (1 / rows + 1 / columns) ** (1 / 3)
        assert rounding_noise_edge(stored) == pytest.approx(math.sqrt(np.mean(part**2) / 12 * largest), rel=1e-5)


def test_the_command_line(tmp_path: Path, run_cli: RunCli) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    finetuned = fine_tuned(aligned, tmp_path / "a-fine-tuned-model-with-a-rather-long-name")
    done = run_cli("inspect", base, aligned, finetuned, aligned, "--rank", 3, "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    document = json.loads((tmp_path / "r.json").read_text())
    ratio = document["linear"]["finetuned"][0]["ratio"]
    assert f"{ratio['mean']:.3f}   {ratio['expected']:.3f}" in re.sub(" +", "   ", done.stdout)
    assert str(tmp_path) not in json.dumps(document)
    assert document["labels"] == [finetuned.name, "aligned"]
    again = [str(part) for part in (base, aligned, finetuned, aligned, "--rank", 3, "--json", tmp_path / "again.json", "--by", "none")]
    inspect_command.main(again, standalone_mode=False)
    second = json.loads((tmp_path / "again.json").read_text())
    assert {**second, "seconds": 0} == {**document, "seconds": 0}, "the same seed gives the same figures"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fractions", "x"), "--fractions: 'x' is not a number"),
        (("--fractions", "0,0.5"), r"fraction 0 is outside \(0, 1\)"),
        (("--by", "row"), "--by 'row' is not known"),
        (("--include", "nothing"), "matches no tensor"),
        (("--exclude", "."), "edits no tensor|no matrix"),
        (("--factors", "none.safetensors"), "there is no file of factors"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: tuple[str, str], message: str) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    with pytest.raises(RequestError, match=message):
        inspect_command.main([str(base), str(aligned), *arguments], standalone_mode=False)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (2, 2), (150, 160)])
@pytest.mark.parametrize("transposed", [False, True])
def test_thin_square_and_scattered_matrices(shape: tuple[int, int], transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    base, aligned, other = (torch.randn(*shape, generator=generator) for _ in range(3))
    options = {"label": "m", "transposed": transposed, "device": torch.device("cpu")}
    settings = InspectSettings(rank=2, etas=(0.3,))
    found = measure(base, aligned, [other], settings, **options)  # type: ignore[arg-type]
    scattered = [torch.stack([values, values], -1).transpose(0, 1)[..., 0].T for values in (base, aligned, other)]
    assert shape == (1, 40) or not any(values.is_contiguous() for values in scattered)
    again = measure(scattered[0], scattered[1], scattered[2:], settings, **options)  # type: ignore[arg-type]
    rank = min(2, *shape)
    turned = [(values.T if transposed else values).double().numpy() for values in (aligned - base, other - base)]
    basis = np.linalg.svd(turned[0], full_matrices=False)[0][:, :rank]
    for one in (found, again):
        assert (one.rank, one.dimension) == (rank, shape[1] if transposed else shape[0])
        assert r_align(one) == pytest.approx(np.linalg.norm(basis.T @ turned[0]) / np.linalg.norm(turned[0]), rel=1e-3)
        assert r_ft(one, one.updates[0]) == pytest.approx(np.linalg.norm(basis.T @ turned[1]) / np.linalg.norm(turned[1]), rel=2e-2)
        assert one.drawn is not None and one.drawn.shape == (20,)


def test_ties_leave_the_energy_defined_whatever_the_directions() -> None:
    base, size = torch.zeros(64, 64), 64
    found = measure(base, torch.eye(size), [2 * torch.eye(size)], InspectSettings(rank=16), label="m", transposed=False, device=torch.device("cpu"))
    assert r_align(found) == pytest.approx(0.5) and r_ft(found, found.updates[0]) == pytest.approx(0.5)
    mean, variance = random_share(found, None, 16)
    assert mean == 0.25 and variance == pytest.approx(0, abs=1e-9)  # every subspace keeps the same of the identity
