"""Hardening quantised checkpoints from the command line: as an adapter, in their own form, as a plain model, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter
from conftest import RunCli
from quantised_models import FORMS, as_scales_apart, block_fp8, pair_in_forms
from reference import header, lox_matrix, stored_bytes
from safetensors.torch import load_file, save_file
from tiny_models import make_pair, read_tensors

from lox_merge import harden
from lox_merge.checkpoint.checkpoint import open_checkpoint
from lox_merge.checkpoint.quantised.view import as_quantised
from lox_merge.errors import PlanError

UP = "model.layers.0.mlp.up_proj.weight"
Models = dict[str, Path]


@pytest.fixture(name="models", scope="module")
def models_fixture(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """base and aligned, plain and in every form."""
    return pair_in_forms(tmp_path_factory.mktemp("quantised"))


def values(folder: Path) -> dict[str, torch.Tensor]:
    """float32 values of every tensor; how they are decoded is what test_quantised_formats is about."""
    found = as_quantised(open_checkpoint(folder, "model"))
    return {name: found.tensor(name).float().clone() for name in found.names}


def edit_of(base: Path, aligned: Path) -> dict[str, torch.Tensor]:
    """The hardened matrices in float64, from decoded weights."""
    one, other = values(base), values(aligned)
    return {name: lox_matrix(one[name], other[name], 6, 1.25) for name in other if other[name].ndim == 2}


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "lox_merge.json").read_text())
    return found


def test_the_usual_form_is_an_adapter_and_said_to_be(models: Models, run_cli: RunCli, tmp_path: Path) -> None:
    pair, out, asked = (models["base-fp8"], models["aligned-fp8"]), tmp_path / "out", tmp_path / "asked"
    planned = run_cli("harden", *pair, out, "--dry-run")
    done = run_cli("harden", *pair, out)
    for run in (planned, done):
        assert run.returncode == 0, run.stderr
        for text in ("aligned (aligned-fp8) is quantised (fp8, 16×16 blocks)", "is written as an adapter", "--dtype bfloat16", "--requantise"):
            assert text in run.stderr
    assert "Plan of an adapter" in planned.stdout
    wanted = run_cli("harden", *pair, asked, "--as-adapter")
    assert wanted.returncode == 0 and "is written as an adapter" not in wanted.stderr
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (asked / name).read_bytes()
    wrong = run_cli("harden", *pair, tmp_path / "wrong", "--workers", 2)
    assert wrong.returncode == 2 and "It is one file, which one worker writes" in wrong.stderr and not (tmp_path / "wrong").exists()


def test_a_whole_model_is_refused_with_the_ways_out(models: Models, tmp_path: Path) -> None:
    """From Python a model is what was asked for."""
    with pytest.raises(PlanError) as caught:
        harden(models["base-fp8"], models["aligned-fp8"], tmp_path / "out")
    for text in ("aligned (aligned-fp8) is quantised (fp8, 16×16 blocks)", "--as-adapter", "--dtype bfloat16", "--requantise", "docs/quantised.md"):
        assert text in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_merged_by_peft_is_the_edit(models: Models, run_cli: RunCli, tmp_path: Path, form: str) -> None:
    """transformers decodes the weights on a CPU; PEFT puts the adapter on them and merges it in float32."""
    from peft import PeftModel

    base, aligned, out = models[f"base-{form}"], models[f"aligned-{form}"], tmp_path / "adapter"
    done = run_cli("harden", base, aligned, out, "--as-adapter")
    assert done.returncode == 0, done.stderr
    assert "would have kept" in done.stdout and f"quantised ({'fp8' if form == 'fp8' else 'compressed-tensors'}" in done.stderr
    assert run_cli("verify", out, "--base", base, "--aligned", aligned).returncode == 0
    model, start = _decoded(aligned, form), values(aligned)
    before = {name: tensor.double().clone() for name, tensor in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, str(out)).merge_and_unload().state_dict()
    for name, exact in edit_of(base, aligned).items():
        # The library multiplies in bf16 where scales are: a rounding of the weights, not of the edit.
        assert float((before[name] - start[name].double()).norm()) <= (0.0 if form == "fp8" else 4e-3) * float(before[name].norm()), name
        edit = exact - start[name].double()
        assert float((merged[name].double() - before[name] - edit).abs().max()) <= 2e-6 * float(exact.abs().max()), name
    record = manifest(out)
    assert list(record["quantised"]["sources"]) == ["base", "aligned"] and "requantised" not in record["quantised"]
    assert 0 < record["adapter"]["nearest_gain"] < 1 and record["summary"]["realised_gain"] == pytest.approx(1, abs=1e-6)


def _decoded(folder: Path, form: str) -> Any:
    """The model in float32 as transformers decodes it."""
    from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

    if form == "fp8":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).float()
    if sys.version_info >= (3, 11):
        settings = CompressedTensorsConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings).float()
    # Older ones have no compressed-tensors beside this transformers: the decoded values go in.
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(values(folder))
    return model


@pytest.mark.parametrize("form", FORMS)
def test_requantised_output_has_the_same_layout_and_its_figures_are_true(models: Models, run_cli: RunCli, tmp_path: Path, form: str) -> None:
    base, aligned, out = models[f"base-{form}"], models[f"aligned-{form}"], tmp_path / "out"
    done = run_cli("harden", base, aligned, out, "--requantise", "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    assert "written in the quantised form, the edit has a gain of" in done.stderr and "--as-adapter" in done.stderr
    before, after = stored_bytes(aligned), stored_bytes(out)
    for file in sorted(aligned.glob("*.safetensors")):
        assert header(file) == header(out / file.name)
    for name in ("config.json", "model.safetensors.index.json", "tokenizer_config.json"):
        assert (aligned / name).read_bytes() == (out / name).read_bytes()
    changed = {name for name in before if before[name] != after[name]}
    codes = {name for name in before if name.endswith("proj.weight_packed" if form == "int4" else "proj.weight")}
    assert changed == codes | {"lm_head.weight", "model.embed_tokens.weight"}  # scales, shapes and vectors are what they were
    exact, start, written = edit_of(base, aligned), values(aligned), values(out)
    record = {tensor["name"]: tensor for tensor in manifest(out)["tensors"]}
    for name in codes:
        plain = name.replace("weight_packed", "weight")
        intended, kept = exact[plain] - start[plain].double(), written[plain].double() - start[plain].double()
        (matrix,) = record[name]["matrices"]
        assert matrix["realised"]["gain"] == pytest.approx(float((intended * kept).sum() / intended.square().sum()), abs=1e-3)
        assert matrix["realised"]["cosine"] == pytest.approx(float((intended * kept).sum() / (intended.norm() * kept.norm())), abs=1e-3)
    found = manifest(out)["quantised"]["requantised"]
    assert found["scales"] == "kept" and 0.9 < found["gain"] < 1.05 and 0 < found["noise"] < 1.5
    checked = run_cli("verify", out, "--base", base, "--aligned", aligned)
    assert checked.returncode == 0 and "made again from the sources: equal" in checked.stdout
    # The same command again has nothing to do, and other settings are another job.
    assert "nothing to do" in run_cli("harden", base, aligned, out, "--requantise").stdout
    assert "holds another job" in run_cli("harden", base, aligned, out, "--dtype", "bfloat16").stderr


def test_verify_finds_a_changed_code(models: Models, run_cli: RunCli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_cli("harden", models["base-int4"], models["aligned-int4"], out, "--requantise").returncode == 0
    file = next(file for file in sorted(out.glob("*.safetensors")) if UP + "_packed" in load_file(file))
    start = len(header(file)) + json.loads(header(file)[8:])[UP + "_packed"]["data_offsets"][0]
    data = bytearray(file.read_bytes())
    data[start] ^= 0x55
    file.write_bytes(data)
    changed = manifest(out)
    from hashlib import sha256

    next(entry for entry in changed["output"]["shards"] if entry["file"] == file.name)["sha256"] = sha256(data).hexdigest()
    (out / "lox_merge.json").write_text(json.dumps(changed))
    done = run_cli("verify", out, "--base", models["base-int4"], "--aligned", models["aligned-int4"])
    assert done.returncode == 1 and f"tensor {UP}_packed" in done.stderr and "codes differ, by up to" in done.stderr


@pytest.mark.parametrize("form", ["fp8", "int4"])
def test_a_plain_model_of_a_quantised_one(models: Models, run_cli: RunCli, tmp_path: Path, form: str) -> None:
    from transformers import AutoModelForCausalLM

    base, aligned, out = models[f"base-{form}"], models[f"aligned-{form}"], tmp_path / "out"
    done = run_cli("harden", base, aligned, out, "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    written = read_tensors(out)
    assert written.keys() == read_tensors(models["aligned"]).keys() and {tensor.dtype for tensor in written.values()} == {torch.float32}
    for name, exact in edit_of(base, aligned).items():
        assert float((written[name].double() - exact).abs().max()) <= 2e-6 * float(exact.abs().max()), name
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == written.keys()
    loaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert torch.equal(loaded[UP], written[UP])
    assert run_cli("verify", out, "--base", base, "--aligned", aligned).returncode == 0


def test_a_plain_base_and_a_plain_aligned(models: Models, run_cli: RunCli, tmp_path: Path) -> None:
    """Of two models one alone may be quantised, and a plain aligned one is written as ever."""
    for base, aligned, extra in (("base", "aligned-fp8", ["--dtype", "float32"]), ("base-fp8", "aligned", [])):
        out = tmp_path / aligned
        done = run_cli("harden", models[base], models[aligned], out, *extra)
        assert done.returncode == 0, done.stderr
        exact, written = edit_of(models[base], models[aligned]), read_tensors(out)
        for name in exact:
            assert float((written[name].double() - exact[name]).norm()) <= (4e-3 if not extra else 2e-6) * float(exact[name].norm())
        assert run_cli("verify", out, "--base", models[base], "--aligned", models[aligned]).returncode == 0
    assert stored_bytes(tmp_path / "aligned").keys() == stored_bytes(models["aligned"]).keys()


def test_workers_and_resumption_give_the_same_bytes(models: Models, run_cli: RunCli, tmp_path: Path) -> None:
    base, aligned = models["base-fp8"], models["aligned-fp8"]
    one, other = tmp_path / "one", tmp_path / "other"
    for out, workers in ((one, 1), (other, 2)):
        assert run_cli("harden", base, aligned, out, "--requantise", "--rounding", "stochastic", "--workers", workers).returncode == 0
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {file.name: file.read_bytes() for file in other.iterdir()}


def test_an_adapter_over_a_quantised_base(models: Models, run_cli: RunCli, tmp_path: Path) -> None:
    """As QLoRA leaves it: the delta is the adapter's own, whatever the base is stored in."""
    adapter = make_adapter(models["base"], tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    given = [models["base-fp8"], adapter, "--base-is-right"]
    refused = run_cli("harden", *given[:2], tmp_path / "refused", given[2], "--requantise")
    assert refused.returncode == 2 and "is an adapter over quantised weights" in refused.stderr
    out = tmp_path / "out"
    done = run_cli("harden", *given[:2], out, given[2], "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    plain = tmp_path / "plain"
    assert run_cli("harden", models["base"], adapter, plain, "--dtype", "float32", "--base-is-right").returncode == 0
    one, other = read_tensors(out), read_tensors(plain)
    low, high = values(models["base-fp8"]), values(models["base"])
    for name in one:
        assert torch.allclose(one[name] - low[name], other[name] - high[name], atol=1e-6), name
    assert run_cli("verify", out, "--base", models["base-fp8"], "--aligned", adapter).returncode == 0


def test_nan_in_a_scale(models: Models, run_cli: RunCli, tmp_path: Path) -> None:
    aligned = Path(shutil.copytree(models["aligned-fp8"], tmp_path / "aligned"))
    file = next(file for file in sorted(aligned.glob("*.safetensors")) if UP in load_file(file))
    tensors = load_file(file)
    tensors[UP + "_scale_inv"][0, 1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    out = tmp_path / "out"
    done = run_cli("harden", models["base-fp8"], aligned, out, "--requantise")
    assert done.returncode == 1 and f"{UP}: 256 of them" in done.stderr and not any(out.glob("*.safetensors"))
    done = run_cli("harden", models["base-fp8"], aligned, out, "--requantise", "--skip-non-finite", "--overwrite")
    assert done.returncode == 0 and stored_bytes(out)[UP] == stored_bytes(aligned)[UP]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (("base-fp8", "aligned-fp8"), ["--requantise", "--as-adapter"], "--requantise writes the model's own weights anew"),
        (("base-fp8", "aligned-fp8"), ["--requantise", "--dtype", "bfloat16"], "requantise keeps the quantised form"),
        (("base-fp8", "aligned"), ["--requantise"], "aligned (aligned) is not quantised"),
        (("base-fp8", "aligned-fp8"), ["--requantise", "--rank", "full"], "needs a limited rank"),
    ],
)
def test_requests_that_make_no_sense(
    models: Models, run_cli: RunCli, tmp_path: Path, names: tuple[str, str], options: list[str], message: str
) -> None:
    done = run_cli("harden", *(models[name] for name in names), tmp_path / "out", *options)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_all_problems_of_both_models_in_one_message(models: Models, run_cli: RunCli, tmp_path: Path) -> None:
    spoilt = {}
    for role, spoil in (("base", lambda t: t.pop(UP + "_scale_inv")), ("aligned", lambda t: t.update({UP + "_scale_inv": torch.ones(9, 9)}))):
        spoilt[role] = Path(shutil.copytree(models[f"{role}-fp8"], tmp_path / role))
        file = next(file for file in sorted(spoilt[role].glob("*.safetensors")) if UP in load_file(file))
        tensors = load_file(file)
        spoil(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
    done = run_cli("harden", spoilt["base"], spoilt["aligned"], tmp_path / "out")
    assert done.returncode == 2 and "2 problems, nothing was written" in done.stderr
    for text in (f"base (base): tensor {UP} (F8_E4M3) has no scale", f"the scale {UP}_scale_inv is F32 [9, 9]"):
        assert text in done.stderr


def test_merge_methods_say_what_reads_the_form(models: Models, run_cli: RunCli, tmp_path: Path) -> None:
    sources = {"base_model": str(models["base-fp8"]), "models": [{"model": str(models["aligned-int4"])}]}
    (tmp_path / "merge.yaml").write_text(json.dumps({"merge_method": "lox", **sources}))  # JSON is YAML
    done = run_cli("yaml", tmp_path / "merge.yaml", tmp_path / "out")
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    text = " ".join(done.stderr.split())
    for said in (
        "base-fp8 is quantised, which is not supported by merge methods (fp8, 16×16 blocks)",
        "`lox-merge harden` and `project` read this form",
        "dequantize=True",
        "aligned-int4 is quantised",
    ):
        assert said in text, text


def test_scales_keep_their_file(models: Models, run_cli: RunCli, tmp_path: Path) -> None:
    """A shard of nothing but scales is copied where the form is kept, and is gone from a plain model."""
    aligned = as_scales_apart(models["aligned-fp8"], tmp_path / "aligned")
    for out, options in ((tmp_path / "kept", ["--requantise"]), (tmp_path / "plain", ["--dtype", "float32"])):
        assert run_cli("harden", models["base-fp8"], aligned, out, *options).returncode == 0
        hashed = manifest(out)["sources"]["aligned"]["files"]
        assert "scales.safetensors" in hashed
        assert run_cli("verify", out, "--base", models["base-fp8"], "--aligned", aligned).returncode == 0
    assert (tmp_path / "kept" / "scales.safetensors").read_bytes() == (aligned / "scales.safetensors").read_bytes()
    assert not (tmp_path / "plain" / "scales.safetensors").exists()
    assert {name: tensor.shape for name, tensor in read_tensors(tmp_path / "plain").items()} == {
        name: tensor.shape for name, tensor in read_tensors(models["aligned"]).items()
    }


def test_stacked_experts_in_their_own_form(run_cli: RunCli, tmp_path: Path) -> None:
    """Experts as one fp8 tensor, gate and up fused in it: each matrix on its own part of the grid."""
    base, aligned = make_pair(tmp_path, "gpt_oss", base_shards=1, aligned_shards=1, change=0.2)
    for folder in (base, aligned):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            parts = [block_fp8(expert) for expert in tensors[name]]
            tensors |= {name: torch.stack([part[0] for part in parts]), name + "_scale_inv": torch.stack([part[1] for part in parts])}
        save_file(tensors, file, metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    done = run_cli("harden", base, aligned, out, "--requantise", "--include", "experts")
    assert done.returncode == 0, done.stderr
    before, start, after = values(base), values(aligned), values(out)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for expert in range(3):
        for first in (0, 1):
            one, other = before[name][expert][:, first::2], start[name][expert][:, first::2]
            intended = lox_matrix(one, other, 6, 1.25) - other.double()
            kept = (after[name][expert][:, first::2] - other).double()
            assert float((intended * kept).sum() / intended.square().sum()) == pytest.approx(1, abs=0.05)
            assert float((kept - intended).norm()) < 0.6 * float(intended.norm())
    assert run_cli("verify", out, "--base", base, "--aligned", aligned).returncode == 0
