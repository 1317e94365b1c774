"""`harden` on checkpoints of many architectures: values, bytes, files, and that the result loads and generates."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from reference import assert_equals_to_rounding, header, load, lox_matrix, lox_tensor, stored_bytes
from safetensors.torch import save_file
from tiny_models import ALIGNED_END, CONFIGS, make_pair
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from lox_merge import Recipe, harden
from lox_merge.errors import LoxMergeWarning
from lox_merge.maths.edits import lox

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, Path]]:
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def get(architecture: str, dtype: str = "bfloat16") -> tuple[Path, Path]:
        if (architecture, dtype) not in made:
            folder = tmp_path_factory.mktemp(architecture)
            made[architecture, dtype] = make_pair(folder, architecture, dtype, base_shards=2, aligned_shards=3)
        return made[architecture, dtype]

    return get  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_every_tensor_equals_the_float64_reference(pairs, architecture: str, dtype: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, aligned = pairs(architecture, dtype)
    result = harden(base, aligned, tmp_path / "out")
    before, after, out = load(base), load(aligned), load(tmp_path / "out")
    assert list(out) == list(after)
    edited = {tensor["name"] for tensor in result.manifest["tensors"] if tensor["action"] == "edited"}
    for name, tensor in after.items():
        assert (name in edited) == (tensor.ndim >= 2), name
        exact = lox_tensor(name, before[name], tensor, gpt_oss=architecture == "gpt_oss")
        assert out[name].dtype == tensor.dtype
        assert_equals_to_rounding(out[name], exact, name)
    assert not any(matrix["certificate"]["ambiguous"] for t in result.manifest["tensors"] for matrix in t.get("matrices", ()) if matrix["rank"])


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_output_mirrors_the_aligned_checkpoint_and_loads(pairs, architecture: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, aligned = pairs(architecture)
    out = tmp_path / "out"
    (aligned / "README.md").write_text("not the hardened model's card")
    (aligned / "modeling_custom.py").write_text("# custom code travels with the model")
    harden(base, aligned, out)
    names = {path.name for path in aligned.iterdir()} - {"README.md"} | {"lox_merge.json"}
    assert {path.name for path in out.iterdir()} == names
    for path in out.iterdir():
        if path.suffix == ".safetensors":
            assert header(path) == header(aligned / path.name)
        elif path.name != "lox_merge.json":
            assert path.read_bytes() == (aligned / path.name).read_bytes(), path.name
    ours, theirs = stored_bytes(out), stored_bytes(aligned)
    vectors = [name for name, tensor in load(aligned).items() if tensor.ndim < 2]
    assert vectors and all(ours[name] == theirs[name] for name in vectors)
    assert any(ours[name] != theirs[name] for name in theirs)

    multimodal = architecture in ("llava", "qwen2_vl")
    kind = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    model, report = kind.from_pretrained(out, output_loading_info=True, dtype="auto")
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "how do i help you"}], add_generation_prompt=True, return_tensors="pt")
    ids = prompt if isinstance(prompt, torch.Tensor) else prompt["input_ids"]
    reply = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert reply.shape[1] > ids.shape[1]
    assert model.generation_config.eos_token_id in (ALIGNED_END, [ALIGNED_END])


def test_manifest_traces_every_number_and_names_no_path(pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, aligned = pairs("llama")
    out = tmp_path / "out"
    result = harden(base, aligned, out, recipe=Recipe(rank=3, alpha=0.5))
    manifest = json.loads((out / "lox_merge.json").read_text())
    assert manifest == result.manifest
    text = json.dumps(manifest)
    assert str(tmp_path) not in text and str(base.parent) not in text
    for entry in manifest["output"]["shards"]:
        data = (out / entry["file"]).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    for role, folder in (("base", base), ("aligned", aligned)):
        assert manifest["sources"][role]["name"] == folder.name
        for file, entry in manifest["sources"][role]["files"].items():
            assert entry["sha256"] == hashlib.sha256((folder / file).read_bytes()).hexdigest()
    before, after, written = load(base), load(aligned), load(out)
    for tensor in manifest["tensors"]:
        for matrix in tensor.get("matrices", ()):
            delta = after[tensor["name"]].double() - before[tensor["name"]].double()
            values = torch.linalg.svdvals(delta)
            assert matrix["singular_values"] == pytest.approx(values[: matrix["rank"]].tolist(), rel=1e-4)
            assert matrix["r_align"] == pytest.approx(float(values[:3].norm() / values.norm()), rel=1e-4)
            assert matrix["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
            intended = lox_matrix(before[tensor["name"]], after[tensor["name"]], 3, 0.5) - after[tensor["name"]].double()
            kept = written[tensor["name"]].double() - after[tensor["name"]].double()
            gain = float((kept * intended).sum() / intended.square().sum())
            assert matrix["realised"]["gain"] == pytest.approx(gain, abs=2e-3)
    ratios = [matrix["r_align"] for tensor in manifest["tensors"] for matrix in tensor.get("matrices", ())]
    assert result.summary.mean_r_align == pytest.approx(sum(ratios) / len(ratios))
    assert (tmp_path / "out" / ".lox_merge").exists() is False


def test_same_values_as_the_pure_function_bit_for_bit(pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for dtype in ("bfloat16", "float32"):
        base, aligned = pairs("llama", dtype)
        harden(base, aligned, tmp_path / dtype)
        before, after, out = load(base), load(aligned), load(tmp_path / dtype)
        for name, tensor in after.items():
            expected = lox(before[name], tensor) if tensor.ndim == 2 else tensor
            assert torch.equal(out[name], expected), name


def test_selection_by_patterns(pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, aligned = pairs("llama")
    recipe = Recipe(
        include=(r"self_attn|mlp|lm_head",),
        exclude=(r"lm_head", r"k_proj"),
        rank_pattern=((r"mlp", 2), (r"layers\.0\.", "full")),
        alpha_pattern=((r"o_proj", 0.0), (r"layers\.1\.", 0.25)),
    )
    harden(base, aligned, tmp_path / "out", recipe=recipe)
    before, after, out = load(base), load(aligned), load(tmp_path / "out")
    for name, tensor in after.items():
        layer_zero = ".0." in name
        if tensor.ndim < 2 or not ("self_attn" in name or "mlp" in name) or "k_proj" in name or "o_proj" in name:
            assert torch.equal(out[name], tensor), name
        else:
            k = 2 if "mlp" in name else (10**6 if layer_zero else 6)
            assert_equals_to_rounding(out[name], lox_matrix(before[name], tensor, k, 1.25 if layer_zero else 0.25), name)


def test_linear_only_leaves_embeddings_and_convolutions(pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for architecture in ("llama", "gpt2", "qwen2_vl"):
        base, aligned = pairs(architecture)
        out = tmp_path / architecture
        harden(base, aligned, out, recipe=Recipe(linear_only=True))
        after, written = load(aligned), load(out)
        for name, tensor in after.items():
            embedding = any(word in name for word in ("embed", "wte", "wpe", "lm_head"))
            assert torch.equal(written[name], tensor) == (embedding or tensor.ndim < 2), name


def test_output_dtype(pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, aligned = pairs("llama")
    out = tmp_path / "out"
    harden(base, aligned, out, recipe=Recipe(dtype="float32"))
    before, after, written = load(base), load(aligned), load(out)
    for name, tensor in written.items():
        assert tensor.dtype == torch.float32
        assert_equals_to_rounding(tensor, lox_tensor(name, before[name], after[name]), name)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in written.values())
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("rounding", ["feedback", "stochastic"])
def test_rounding_modes_mend_the_lost_gain(rounding: str, tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "pair", "llama", change=0.002, hidden=256, layers=1)
    with pytest.warns(LoxMergeWarning, match=r"kept only 0\.\d+ of the edit.*--rounding feedback, --dtype float32"):
        lossy = harden(base, aligned, tmp_path / "nearest", recipe=Recipe(alpha=0.5))
    assert lossy.summary.realised_gain is not None and lossy.summary.realised_gain < 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoxMergeWarning)
        better = harden(base, aligned, tmp_path / rounding, recipe=Recipe(alpha=0.5, rounding=rounding))  # type: ignore[arg-type]
    assert better.summary.realised_gain == pytest.approx(1.0, abs=0.04)


def test_vocabulary_that_grew_is_copied_with_a_warning(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "pair", "llama", aligned_vocabulary=101)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        harden(base, aligned, tmp_path / "out")
    texts = [str(warning.message) for warning in caught if issubclass(warning.category, LoxMergeWarning)]
    assert len(texts) == 2
    assert any("embed_tokens.weight is copied" in text and "[96, 32]" in text and "[101, 32]" in text for text in texts)
    after, out = load(aligned), load(tmp_path / "out")
    for name, tensor in after.items():
        assert torch.equal(out[name], tensor) == (tensor.ndim < 2 or "embed" in name or "lm_head" in name), name


def test_untied_head_over_a_tied_base_takes_the_embedding_as_its_base(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "pair", "qwen3", aligned_shards=1)
    tensors = load(aligned)
    head = tensors["model.embed_tokens.weight"].float() * 1.01
    save_file({**tensors, "lm_head.weight": head.bfloat16()}, aligned / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((aligned / "config.json").read_text()) | {"tie_word_embeddings": False}
    (aligned / "config.json").write_text(json.dumps(config))
    harden(base, aligned, tmp_path / "out")
    before, after, out = load(base), load(aligned), load(tmp_path / "out")
    assert_equals_to_rounding(out["lm_head.weight"], lox_matrix(before["model.embed_tokens.weight"], after["lm_head.weight"], 6, 1.25))


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_weights_are_read_and_written_as_safetensors(pairs, sharded: bool, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, aligned = pairs("llama")
    pickled = tmp_path / "pickled"
    shutil.copytree(aligned, pickled)
    tensors = load(aligned)
    for file in [*pickled.glob("*.safetensors"), pickled / INDEX]:
        file.unlink()
    if sharded:
        names = list(tensors)
        files = {f"pytorch_model-0000{part + 1}-of-00002.bin": names[part::2] for part in (0, 1)}
        for file, held in files.items():
            torch.save({name: tensors[name] for name in held}, pickled / file)
        weight_map = {name: file for file, held in files.items() for name in held}
        (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        tensors["model.norm.weight"] = torch.stack([tensors["model.norm.weight"]] * 2, 1)[:, 0]  # not contiguous
        torch.save(tensors, pickled / "pytorch_model.bin")
    with pytest.warns(LoxMergeWarning, match=r"no safetensors weights.*weights_only=True"):
        harden(base, pickled, tmp_path / "out")
    harden(base, aligned, tmp_path / "expected")
    expected, out = load(tmp_path / "expected"), load(tmp_path / "out")
    assert expected.keys() == out.keys()
    assert all(torch.equal(expected[name], out[name]) for name in out)
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert not any(name.endswith(".bin") or "pytorch_model" in name for name in written)
    assert (INDEX in written) == sharded
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_stacked_experts_whole_or_split(pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, aligned = pairs("gpt_oss")
    harden(base, aligned, tmp_path / "whole", recipe=Recipe(fused="whole", include=("gate_up_proj$",)))
    before, after, out = load(base), load(aligned), load(tmp_path / "whole")
    name = next(name for name in after if name.endswith("gate_up_proj"))
    for expert in range(len(after[name])):
        assert_equals_to_rounding(out[name][expert], lox_matrix(before[name][expert], after[name][expert], 6, 1.25))


def test_experts_stacked_on_disk_equal_separate_ones(pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A Mixtral as transformers 5 holds it in memory: (experts, gate and up, hidden) instead of w1, w3 per expert."""
    base, aligned = pairs("mixtral")
    harden(base, aligned, tmp_path / "separate")
    folders = []
    for folder in (base, aligned):
        stacked: dict[str, torch.Tensor] = {}
        tensors = load(folder)
        for layer in range(2):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts."
            experts = sorted({int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix)})
            w1, w2, w3 = ([tensors.pop(f"{prefix}{expert}.w{part}.weight") for expert in experts] for part in (1, 2, 3))
            stacked[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack([torch.cat(both) for both in zip(w1, w3, strict=True)])
            stacked[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(w2)
        folders.append(tmp_path / folder.name)
        folders[-1].mkdir()
        shutil.copy(folder / "config.json", folders[-1])
        save_file({**tensors, **stacked}, folders[-1] / "model.safetensors", metadata={"format": "pt"})
    result = harden(*folders, tmp_path / "stacked")
    separate, out = load(tmp_path / "separate"), load(tmp_path / "stacked")
    half = out["model.layers.0.mlp.experts.gate_up_proj"].shape[1] // 2
    for layer in range(2):
        for expert, (fused, down) in enumerate(
            zip(out[f"model.layers.{layer}.mlp.experts.gate_up_proj"], out[f"model.layers.{layer}.mlp.experts.down_proj"], strict=True)
        ):
            prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            assert torch.equal(fused[:half], separate[prefix + "w1.weight"])
            assert torch.equal(fused[half:], separate[prefix + "w3.weight"])
            assert torch.equal(down, separate[prefix + "w2.weight"])
    (record,) = [tensor for tensor in result.manifest["tensors"] if tensor["name"] == "model.layers.0.mlp.experts.gate_up_proj"]
    assert [matrix["part"] for matrix in record["matrices"][:3]] == ["[0].gate", "[0].up", "[1].gate"]


def test_zero_deltas_are_copied_and_counted(pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, aligned = pairs("llama")
    partly = tmp_path / "partly"
    shutil.copytree(aligned, partly)
    before = load(base)
    for file in partly.glob("*.safetensors"):
        held = {name: before[name] if "mlp" in name else tensor for name, tensor in load_one(file).items()}
        save_file(held, file, metadata={"format": "pt"})
    result = harden(base, partly, tmp_path / "out")
    expected = sum("mlp" in name and before[name].ndim == 2 for name in before)
    assert result.summary.zero_deltas == expected > 0
    out = load(tmp_path / "out")
    assert all(torch.equal(out[name], before[name]) for name in before if "mlp" in name)


def load_one(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(file))


def test_nan_is_copied_on_request(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "pair", "llama", aligned_shards=1)
    tensors = load(aligned)
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = float("nan")
    save_file(tensors, aligned / "model.safetensors", metadata={"format": "pt"})
    result = harden(base, aligned, tmp_path / "out", recipe=Recipe(skip_non_finite=True))
    theirs, ours = stored_bytes(aligned), stored_bytes(tmp_path / "out")
    assert ours["model.layers.0.mlp.up_proj.weight"] == theirs["model.layers.0.mlp.up_proj.weight"]
    assert ours["model.layers.0.mlp.down_proj.weight"] != theirs["model.layers.0.mlp.down_proj.weight"]
    (record,) = [tensor for tensor in result.manifest["tensors"] if tensor.get("non_finite")]
    assert record["non_finite"]["count"] == 1 and record["action"] == "copied"


def test_finished_output_is_checked_and_returned(pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, aligned = pairs("llama")
    first = harden(base, aligned, tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    again = harden(base, aligned, tmp_path / "out")
    assert again.manifest == first.manifest and again.bytes_written == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_overwrite_starts_anew(pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, aligned = pairs("llama")
    harden(base, aligned, tmp_path / "out")
    (tmp_path / "out" / "left over.txt").write_text("from the user")
    changed = harden(base, aligned, tmp_path / "out", recipe=Recipe(alpha=0.5), overwrite=True)
    assert changed.manifest["job"]["recipe"]["alpha"] == 0.5
    assert not (tmp_path / "out" / "left over.txt").exists()


def test_rank_above_every_side_and_rank_rules(pairs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base, aligned = pairs("llama", "float32")
    before, after = load(base), load(aligned)
    for rank in ("1000", "100%", "full"):
        harden(base, aligned, tmp_path / rank.strip("%"), recipe=Recipe(rank=rank, alpha=0.5))
        out = load(tmp_path / rank.strip("%"))
        for name, tensor in after.items():
            expected = tensor.double() + 0.5 * (tensor.double() - before[name].double()) if tensor.ndim == 2 else tensor.double()
            assert_equals_to_rounding(out[name], expected, name)
