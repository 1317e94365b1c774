"""harden --as-adapter: PEFT loads it on the aligned model, and merged it is the hardened model."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import warnings
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_models
import torch
import transformers
from adapters import load_model, make_adapter
from click.testing import CliRunner
from conftest import RunCli
from peft.tuners.lora import LoraLayer
from reference import load, lox_tensor
from safetensors.torch import load_file, save_file
from tiny_models import make_pair

from lox_merge.checkpoint.adapter import open_adapter
from lox_merge.checkpoint.checkpoint import open_checkpoint
from lox_merge.cli.main import cli
from lox_merge.errors import Interrupted, LoxMergeWarning, NonFiniteDeltaError, OutputError, PlanError, RequestError
from lox_merge.jobs.adapter import execute_adapter
from lox_merge.jobs.adapter_check import check_loads
from lox_merge.jobs.adapter_plan import plan_adapter
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.factors import open_factors
from lox_merge.jobs.harden import HardenResult, harden, plan_hardening
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.verify import verify

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "lox_merge.json"


def _write(base: Path, aligned: Path, out: Path, *, overwrite: bool = False, **recipe: Any) -> HardenResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoxMergeWarning)
        return execute_adapter(plan_adapter(plan_hardening(base, aligned, out, recipe=Recipe(**recipe))), overwrite=overwrite)


def _load_strictly(aligned: Path, adapter: Path) -> Any:
    """As PeftModel.from_pretrained does, and an error for any key too many or too few."""
    with warnings.catch_warnings():
        # On the two kinds of GPT-2's layers, and on tied models, whose embedding is not touched here.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("error", message=".*(missing|unexpected|not find|unused).*")
        model = peft.PeftModel.from_pretrained(load_model(aligned), adapter)
        state = peft.utils.load_peft_weights(str(adapter), device="cpu")
        result = peft.utils.set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys and not [name for name in result.missing_keys if "lora_" in name]
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma", "mixtral", "qwen3_moe", "gpt_oss", "llava"])
def test_merged_by_peft_it_is_the_hardened_model(architecture: str, tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, architecture)
    result = _write(base, aligned, tmp_path / "adapter")
    harden(base, aligned, tmp_path / "whole", recipe=Recipe(dtype="float32"))
    model = _load_strictly(aligned, tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, whole, before = load(tmp_path / "merged"), load(tmp_path / "whole"), load(aligned)
    left_out = result.manifest["adapter"]["left_out"]
    # Tied embeddings, and a class token beside a vision tower's patches: as said, and nothing else.
    allowed = {"qwen3": ["model.embed_tokens.weight"], "gemma": ["model.embed_tokens.weight"], "gpt2": ["transformer.wte.weight"]}
    assert list(left_out) == allowed.get(architecture, [])
    assert merged.keys() >= whole.keys() - {"lm_head.weight"}
    for name, tensor in whole.items():
        expected = before[name] if name in left_out else tensor
        assert torch.allclose(merged[name].float(), expected.float(), atol=2e-6, rtol=1e-5), name
    assert any(not torch.equal(merged[name].float(), before[name].float()) for name in whole)


def test_factors_are_alpha_u_s_and_v(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", "float32")
    _write(base, aligned, tmp_path / "adapter", rank=3, alpha=0.7)
    factors, before, after = load_file(tmp_path / "adapter" / WEIGHTS), load(base), load(aligned)
    for module in ("model.layers.0.self_attn.q_proj", "lm_head"):
        first, second = (factors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
        values = torch.linalg.svdvals(after[f"{module}.weight"].double() - before[f"{module}.weight"].double())[:3]
        assert torch.allclose(first @ first.T, torch.eye(3, dtype=torch.float64), atol=1e-5)
        assert torch.allclose(second.norm(dim=0), 0.7 * values, rtol=1e-5)
        exact = lox_tensor(module, before[f"{module}.weight"], after[f"{module}.weight"], 3, 0.7) - after[f"{module}.weight"].double()
        assert torch.allclose(second @ first, exact, atol=1e-6)


def test_layout_is_what_vllm_reads(tmp_path: Path) -> None:
    """Fields and names that vLLM 0.11 and later checks (vllm/lora/peft_helper.py, parse_fine_tuned_lora_name): it takes one scale,
    lora_alpha/r, for all modules, compares r alone with --max-lora-rank, and ignores patterns."""
    base, aligned = make_pair(tmp_path, "llama")
    _write(base, aligned, tmp_path / "adapter", rank_pattern=(("mlp", 2), ("k_proj", 5)), linear_only=True)
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys() and config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == 6 <= 16
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"] and not config["use_rslora"]
    assert not config["target_parameters"] and not config["lora_bias"]
    names = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    found = load_file(tmp_path / "adapter" / WEIGHTS)
    for name, tensor in found.items():
        prefix, module, end = name[:17], *name[17:].rsplit(".lora_", 1)
        assert prefix == "base_model.model." and module in config["target_modules"] and module.rsplit(".", 1)[1] in names
        rank = tensor.shape[0] if end == "A.weight" else tensor.shape[1]
        assert end in ("A.weight", "B.weight") and rank == (2 if "mlp" in name else 5 if "k_proj" in name else 6) <= config["r"]
    assert len(found) == 28 == 2 * len(config["target_modules"])
    # PEFT reads the patterns: every scale is 1 there as well.
    model = _load_strictly(aligned, tmp_path / "adapter")
    scales = {scale for module in model.modules() if isinstance(module, LoraLayer) for scale in module.scaling.values()}
    assert scales == {1.0}


def test_bfloat16_factors_and_what_rounding_would_have_lost(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", change=0.002)
    fine = _write(base, aligned, tmp_path / "fine").manifest
    coarse = _write(base, aligned, tmp_path / "coarse", dtype="bfloat16").manifest
    whole = harden_quietly(base, aligned, tmp_path / "whole")
    assert fine["summary"]["realised_gain"] == pytest.approx(1, abs=1e-6)
    assert coarse["summary"]["realised_gain"] == pytest.approx(1, abs=0.01) and coarse["summary"]["smallest_gain"] != 1
    # The figure is that of the whole model which this adapter replaces.
    assert fine["adapter"]["nearest_gain"] == pytest.approx(whole.summary.realised_gain, rel=1e-6)
    assert whole.summary.realised_gain is not None and whole.summary.realised_gain < 0.9
    sizes = [(tmp_path / name / WEIGHTS).stat().st_size for name in ("fine", "coarse")]
    assert sizes == [fine["adapter"]["bytes"], coarse["adapter"]["bytes"]] and sizes[1] < 0.6 * sizes[0]
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(tmp_path / "coarse" / WEIGHTS).values())
    assert verify(tmp_path / "coarse", base=base, aligned=aligned).ok


def harden_quietly(base: Path, aligned: Path, out: Path) -> HardenResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoxMergeWarning)
        return harden(base, aligned, out)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_what_was_written_is_read_back(architecture: str, tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, architecture, aligned_shards=2)
    result = _write(base, aligned, tmp_path / "adapter", rank="energy:0.9")
    before, after = load(base), load(aligned)
    read = open_adapter(tmp_path / "adapter", "finetuned", open_checkpoint(aligned, "aligned"))
    edited = {tensor["name"]: tensor for tensor in result.manifest["tensors"] if tensor["action"] == "edited"}
    assert set(read.changes) == set(edited)
    for name, entry in edited.items():
        ranks = {matrix["part"]: matrix["rank"] for matrix in entry["matrices"]}
        assert read.tensor(name).shape == after[name].shape
        if after[name].ndim == 2:
            exact = lox_tensor(name, before[name], after[name], ranks[""])
            assert torch.allclose(read.tensor(name).double(), exact, atol=2e-6), name
    assert len({rank for entry in edited.values() for rank in (matrix["rank"] for matrix in entry["matrices"])}) > 1


def test_tied_and_left_out_tensors_are_said(run_cli: RunCli, tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "qwen3")
    run = run_cli("harden", base, aligned, tmp_path / "out", "--as-adapter", "--json", tmp_path / "result.json")
    assert run.returncode == 0, run.stderr
    result, manifest = (json.loads(file.read_text()) for file in (tmp_path / "result.json", tmp_path / "out" / MANIFEST))
    before, after = load(base), load(aligned)

    def square(name: str) -> float:
        values = torch.linalg.svdvals(after[name].double() - before[name].double())
        return float(values[:6].square().sum())

    matrices = [name for name, tensor in after.items() if tensor.ndim == 2]
    share = square("model.embed_tokens.weight") / sum(map(square, matrices))
    assert manifest["adapter"]["left_out_share"] == pytest.approx(share, rel=1e-6)
    for text in (run.stdout, run.stderr):
        assert "model.embed_tokens.weight" in text and f"{share:.1%}" in text
    assert "14 as 14 modules" in run.stdout and "of the model's 45.9 kB" in run.stdout
    assert max(map(len, run.stdout.splitlines()[1:-1])) <= 80  # but for the folder's name, which is the test's
    assert result["adapter"] == manifest["adapter"] and manifest["output"]["form"] == "adapter"
    entry = next(tensor for tensor in manifest["tensors"] if tensor["name"] == "model.embed_tokens.weight")
    assert entry["action"] == "copied" and "matrices" not in entry and "output head are one tensor" in entry["left_out"]["reason"]
    assert str(tmp_path) not in (tmp_path / "out" / MANIFEST).read_text() + (tmp_path / "out" / CONFIG).read_text()


def test_dry_run_and_wrong_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    arguments = ["harden", base, aligned, tmp_path / "out", "--as-adapter", "--dry-run", "--json", tmp_path / "plan.json"]
    run = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert run.exit_code == 0 and "16 tensors as 16 modules" in run.output and not (tmp_path / "out").exists()
    written = _write(base, aligned, tmp_path / "written").manifest["adapter"]
    report = json.loads((tmp_path / "plan.json").read_text())
    assert report["bytes_written"] == 4 * written["parameters"] and report["modules"] == written["modules"] == 16
    over = make_adapter(base, tmp_path / "over", target_modules=["q_proj"])
    for words, settings, second in (
        ("rank full is no low-rank update", {"rank": "full"}, aligned),
        ("weights that are written anew", {"rounding": "stochastic"}, aligned),
        ("is itself an adapter", {}, over),
        ("all 16 deltas are zero", {}, tmp_path / "copy"),
    ):
        if not second.exists():
            shutil.copytree(base, second)
        with pytest.raises(RequestError, match=words):
            _write(base, second, tmp_path / "refused", **settings)
    assert not (tmp_path / "refused").exists()
    full = namedtuple("full", "total used free")(10, 10, 0)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: full)
        with pytest.raises(OutputError, match="GB are needed"):
            _write(base, aligned, tmp_path / "refused")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(RequestError, match=r"lox-merge\[adapter\]"):
        _write(base, aligned, tmp_path / "refused")


def test_modules_that_peft_would_not_load_are_found_before_writing(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    made = plan_adapter(plan_hardening(base, aligned, tmp_path / "out"))
    ranks = {source.key: 2 for pair in made.pairs for source in pair.sources}
    pair = made.pairs[3]
    made.pairs[3] = replace(pair, place=replace(pair.place, module="model.layers.9.mlp.gate_proj"))
    with pytest.raises(PlanError, match=r"no place for .*layers\.9"):
        check_loads(made, ranks)
    made.pairs[3] = replace(pair, shape=(5, 5))
    with pytest.raises(PlanError, match="PEFT cannot load"):
        check_loads(made, ranks)


def test_interrupted_it_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", aligned_shards=4)
    whole = _write(base, aligned, tmp_path / "whole")

    class Stop:
        left = 2

        def advance(self, count: int) -> None:
            self.left -= 1
            if self.left < -4:
                raise KeyboardInterrupt

    out = tmp_path / "out"
    plan = plan_hardening(base, aligned, out)
    with pytest.raises(Interrupted, match="run the same command again"):
        execute_adapter(plan_adapter(plan), progress=Stop())
    assert list(out.glob("*.piece")) and not (out / CONFIG).exists()
    with pytest.raises(ValueError, match=CONFIG):
        peft.PeftConfig.from_pretrained(str(out))
    with pytest.raises(OutputError, match=r"alpha was 1\.25, is now 2"):
        _write(base, aligned, out, alpha=2)
    result = _write(base, aligned, out)
    assert result.resumed_shards >= 1
    for file in (WEIGHTS, CONFIG, MANIFEST):
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert sorted(path.name for path in out.iterdir()) == sorted([WEIGHTS, CONFIG, MANIFEST])
    assert _write(base, aligned, out).bytes_written == 0 and whole.bytes_written
    (out / WEIGHTS).write_bytes(b"")
    with pytest.raises(OutputError, match="missing or not what was written"):
        _write(base, aligned, out)
    assert _write(base, aligned, out, overwrite=True, alpha=2).manifest["job"]["recipe"]["alpha"] == 2


def test_verify_an_adapter(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "mixtral")
    out = tmp_path / "out"
    _write(base, aligned, out)
    sources = {"base": base, "aligned": aligned}
    sound = verify(out, **sources)
    assert sound.ok and sound.sources_checked and sound.tensors_recomputed == 30 and sound.files == 2
    assert verify(out, **sources, sample=3).tensors_recomputed >= 3 and verify(out, offline=True).tensors_recomputed == 0

    def forge(change: Any) -> list[str]:
        """The problems of a copy whose factors are changed, and whose manifest is made to fit by hash."""
        copy = tmp_path / "forged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(out, copy)
        tensors, manifest, config = load_file(copy / WEIGHTS), json.loads((copy / MANIFEST).read_text()), json.loads((copy / CONFIG).read_text())
        change(tensors, manifest, config)
        save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
        (copy / CONFIG).write_text(json.dumps(config))
        manifest["output"]["shards"][0]["sha256"] = hashlib.sha256((copy / WEIGHTS).read_bytes()).hexdigest()
        manifest["output"]["files"][CONFIG] = hashlib.sha256((copy / CONFIG).read_bytes()).hexdigest()
        (copy / MANIFEST).write_text(json.dumps(manifest))
        return verify(copy, **sources).problems

    name = "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
    assert forge(lambda tensors, *_: None) == []
    assert "not what the recipe gives" in forge(lambda tensors, *_: tensors[name].mul_(1.02))[0]
    assert (
        "no tensor of the manifest names it" in forge(lambda tensors, *_: tensors.update({"base_model.model.x.lora_A.weight": torch.ones(1, 2)}))[0]
    )
    assert "is in no file" in forge(lambda tensors, *_: tensors.pop(name))[0]
    assert CONFIG in forge(lambda _, __, config: config.update(lora_alpha=config["lora_alpha"] * 2))[0]
    edited = forge(lambda _, manifest, __: manifest["tensors"][2]["matrices"][0]["singular_values"].__setitem__(0, 9.0))
    assert edited and "figures" in edited[0]
    assert "summary" in forge(lambda _, manifest, __: manifest["summary"].update(mean_r_align=1.0))[0]
    data = bytearray((out / WEIGHTS).read_bytes())
    data[-7] ^= 1
    (out / WEIGHTS).write_bytes(data)
    assert verify(out, offline=True).problems == [f"{WEIGHTS} is not what was written: its sha256 differs from the manifest's"]


def test_layers_that_peft_takes_for_experts_keep_their_own_factors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek: dense layers and shared experts are called gate_proj as the routed experts were, and PEFT renames such targets."""

    def configuration(options: dict[str, int], settings: dict[str, Any]) -> Any:
        heads = {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
        return transformers.DeepseekV3Config(**{**tiny_models._text(options), **heads, **experts, "first_k_dense_replace": 1})

    monkeypatch.setitem(tiny_models.CONFIGS, "deepseek_v3", configuration)
    base, aligned = make_pair(tmp_path, "deepseek_v3", aligned_shards=1)
    _write(base, aligned, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert "model.layers.0.mlp.gate_proj.weight" in config["target_parameters"]
    harden(base, aligned, tmp_path / "whole", recipe=Recipe(dtype="float32"))
    _load_strictly(aligned, tmp_path / "adapter").merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = load(tmp_path / "merged")
    for name, tensor in load(tmp_path / "whole").items():
        assert torch.allclose(merged[name].float(), tensor.float(), atol=2e-6), name


def test_from_a_file_of_factors_and_around_damaged_tensors(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", aligned_shards=1)
    tensors = load_file(aligned / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    tensors["model.layers.1.mlp.up_proj.weight"] = load(base)["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, aligned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteDeltaError, match=r"layers\.0\.mlp\.up_proj"):
        _write(base, aligned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    recipe = Recipe(rank=3, skip_non_finite=True)
    decompose(base, aligned, tmp_path / "factors.safetensors", recipe=Recipe(rank=8, skip_non_finite=True))
    with open_factors(tmp_path / "factors.safetensors") as held:
        made = plan_adapter(plan_hardening(base, aligned, tmp_path / "held", recipe=recipe, factors=held))
        manifest = execute_adapter(made).manifest
    plain = _write(base, aligned, tmp_path / "plain", rank=3, skip_non_finite=True).manifest["summary"]
    assert plain["zero_deltas"] == manifest["summary"]["zero_deltas"] == 1
    assert plain["mean_r_align"] == pytest.approx(manifest["summary"]["mean_r_align"]) and plain["edited_tensors"] == 14
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("held", "plain"))
    assert one.keys() == other.keys() and all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    reasons = {tensor["name"]: tensor.get("reason") for tensor in manifest["tensors"]}
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "NaN or Inf in the delta"
    assert reasons["model.layers.1.mlp.up_proj.weight"] == "the delta is zero"
    assert not [name for name in one if "up_proj" in name]
    _load_strictly(aligned, tmp_path / "held")
    assert verify(tmp_path / "held", base=base, aligned=aligned).ok and verify(tmp_path / "plain", base=base, aligned=aligned).ok
