"""What a merge by `lox-merge yaml` leaves on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import transformers
import yaml
from mergekit_runs import (
    Pair,
    assert_nothing_left,
    assert_same,
    command,
    edit,
    expect,
    merge,
    write_config,
)
from safetensors.torch import load_file, save_file
from tiny_models import ALIGNED_END, CHAT_TEMPLATE, make_pair, read_tensors

import lox_merge.mergekit.run as mergekit_run
from lox_merge.errors import LoxMergeError, LoxMergeWarning, NumericalError, OutputError, RequestError


def test_everything_beside_the_weights_is_aligned_s(tmp_path: Path, llama: Pair) -> None:
    (llama[1] / "custom_code.py").write_text("# code\n")
    try:
        merge(tmp_path, llama, "--out-shard-size", "20k")
    finally:
        (llama[1] / "custom_code.py").unlink()
    out = tmp_path / "out"
    assert len(list(out.glob("model-*.safetensors"))) > 1
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (llama[1] / name).read_bytes(), name
    assert (out / "custom_code.py").read_text() == "# code\n"
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == ALIGNED_END
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.eos_token_id == ALIGNED_END
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.eos_token_id == ALIGNED_END


def test_nothing_of_the_base_model_stays(tmp_path: Path, llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mergekit_run.run_merge

    def with_tagalong(config: Any, out: str, options: Any) -> None:
        real(config, out, options)  # which copies such files for some architectures
        (Path(out) / "preprocessor_config.json").write_text("{}")

    monkeypatch.setattr(mergekit_run, "run_merge", with_tagalong)
    merge(tmp_path, llama)
    assert not (tmp_path / "out/preprocessor_config.json").exists()


def test_edits_lost_to_rounding_are_reported(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", change=0.004, hidden=128)
    with pytest.warns(LoxMergeWarning, match=r"kept only 0\.\d\d of the edit .*rounding: feedback"):
        merge(tmp_path, pair, "--json", str(tmp_path / "nearest.json"), parameters={"alpha": 0.2})
    merge(tmp_path, pair, "--overwrite", "--json", str(tmp_path / "feedback.json"), parameters={"alpha": 0.2, "rounding": "feedback"})
    nearest, feedback = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("nearest", "feedback"))
    assert nearest["realised_gain"] < 0.95 < 0.99 < feedback["realised_gain"]
    # Where mergekit rounds by itself nobody has looked.
    merge(tmp_path, pair, "--overwrite", "--json", str(tmp_path / "cast.json"), dtype="float32", out_dtype="bfloat16", parameters={"alpha": 0.2})
    assert json.loads((tmp_path / "cast.json").read_text())["realised_gain"] is None


def test_json_tells_what_was_done(tmp_path: Path, qwen3: Pair) -> None:
    merge(tmp_path, qwen3, "--json", str(tmp_path / "result.json"), parameters={"alpha": [{"filter": "mlp", "value": 0}, {"value": 2}]})
    text = (tmp_path / "result.json").read_text()
    result = json.loads(text)
    assert str(tmp_path) not in text and str(qwen3[0].parent) not in text
    assert (result["command"], result["method"], result["output"]) == ("yaml", "lox", "out")
    tensors = {entry.pop("name"): entry for entry in result["tensors"]}
    assert tensors.keys() == read_tensors(qwen3[1]).keys()
    assert tensors["model.layers.0.mlp.up_proj.weight"] == {"edited": False, "rank": 6, "alpha": 0, "rounding": "nearest"}
    assert tensors["model.layers.0.self_attn.q_proj.weight"] == {"edited": True, "rank": 6, "alpha": 2, "rounding": "nearest"}
    assert not tensors["model.norm.weight"]["edited"]


def test_no_file_names_a_folder_of_this_machine(tmp_path: Path, llama: Pair) -> None:
    merge(tmp_path, llama)
    for path in (tmp_path / "out").iterdir():
        data = path.read_bytes()
        assert str(llama[0].parent).encode() not in data and str(tmp_path).encode() not in data, path.name
    config = yaml.safe_load((tmp_path / "out/mergekit_config.yml").read_text())
    assert config == {"merge_method": "lox", "base_model": "base", "models": [{"model": "aligned"}]}
    card = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {"library_name": "transformers", "tags": ["mergekit", "merge", "lox"]}
    assert "# out\n" in card


def test_mergekit_options_hold(tmp_path: Path, llama: Pair) -> None:
    with pytest.warns(LoxMergeWarning, match="no tokenizer"):
        merge(tmp_path, llama, "--no-write-model-card", "--no-copy-tokenizer")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


def test_pickled_output_is_checked_too(tmp_path: Path, qwen3: Pair) -> None:
    merge(tmp_path, qwen3, "--no-safe-serialization")
    found = torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True)
    assert_same(found, expect(qwen3, lambda name: (6, 1.25)))


def test_tokenizer_source_is_ignored_with_a_warning(tmp_path: Path, llama: Pair) -> None:
    with pytest.warns(LoxMergeWarning, match="tokenizer_source ignored: the output keeps the aligned model's vocabulary"):
        found = merge(tmp_path, llama, tokenizer_source="union")
    assert_same(found, expect(llama, lambda name: (6, 1.25)))


def test_relative_paths_and_an_adapter(tmp_path: Path, llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    base, lora = llama[0], tmp_path / "adapter"
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(lora)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (lora / name).write_bytes((llama[1] / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    settings = {"base_model": os.path.relpath(base), "models": [{"model": f"{os.path.relpath(base)}+adapter"}]}
    with pytest.raises(RequestError, match="--lora-merge-cache FOLDER"):
        merge(tmp_path, llama, **settings)
    found = merge(tmp_path, llama, "--lora-merge-cache", "cache", **settings)
    (merged,) = (tmp_path / "cache").iterdir()
    assert_same(found, {name: edit(read_tensors(base)[name], tensor) for name, tensor in read_tensors(merged).items()})
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHAT_TEMPLATE
    assert yaml.safe_load((tmp_path / "out/mergekit_config.yml").read_text())["models"] == [{"model": "base+adapter"}]


def test_overwrite_replaces_only_what_a_merge_wrote(tmp_path: Path, llama: Pair) -> None:
    out = tmp_path / "out"
    out.mkdir()
    merge(tmp_path, llama)  # an empty folder is no obstacle
    before = (out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(OutputError, match=r"exists and is not empty.*--overwrite"):
        merge(tmp_path, llama)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    (out / "left_over.txt").write_text("old")
    merge(tmp_path, llama, "--overwrite", parameters={"alpha": 0.5})
    assert not (out / "left_over.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "out"]
    (out / "mergekit_config.yml").unlink()
    with pytest.raises(OutputError, match=r"no mergekit_config\.yml"):
        merge(tmp_path, llama, "--overwrite")


def test_mergekit_s_own_methods_run_as_they_are(tmp_path: Path, llama: Pair) -> None:
    from mergekit.scripts.run_yaml import main

    models = [{"model": str(llama[1]), "parameters": {"weight": 0.5}}]
    config = write_config(tmp_path / "config.yaml", llama, merge_method="task_arithmetic", models=models)
    command(config, tmp_path / "ours")
    main.main([str(config), str(tmp_path / "theirs"), "--quiet"], standalone_mode=False)
    assert_same(read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs"))
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(path.name for path in (tmp_path / "theirs").iterdir())


def test_nan_in_a_delta_fails_and_leaves_nothing(tmp_path: Path, llama: Pair) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    aligned = tmp_path / "aligned"
    aligned.mkdir()
    for path in llama[1].iterdir():
        (aligned / path.name).write_bytes(path.read_bytes())
    (file,) = (path for path in aligned.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(file)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=rf"{name}: 1 of them.*filter: its-name") as raised:
        merge(tmp_path, (llama[0], aligned))
    assert raised.value.exit_code == 1
    assert_nothing_left(tmp_path)
    found = merge(tmp_path, (llama[0], aligned), parameters={"alpha": [{"filter": name, "value": 0}, {"value": 1.25}]})
    assert torch.equal(found[name].view(torch.int16), tensors[name].view(torch.int16))


@pytest.mark.parametrize("failure", ["drop", "crash", "disk", "interrupt"])
def test_a_failing_merge_leaves_nothing(tmp_path: Path, llama: Pair, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mergekit_run.run_merge

    def broken(config: Any, out: str, options: Any) -> None:
        real(config, out, options)
        if failure == "crash":
            raise RuntimeError("something {with\nlines} broke")
        if failure == "disk":
            raise OSError(28, "No space left on device")
        if failure == "interrupt":
            raise KeyboardInterrupt
        tensors = load_file(Path(out) / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:4].clone()
        save_file(tensors, Path(out) / "model.safetensors")

    monkeypatch.setattr(mergekit_run, "run_merge", broken)
    message = {
        "drop": r"model.layers.0.mlp.up_proj.weight is missing; model.norm.weight is \[4\] instead of \[32\]",
        "crash": r"mergekit failed: something {…} broke\. Nothing was kept",
        "disk": "could not be written: No space left",
    }
    with pytest.raises((LoxMergeError, click.Abort), match=message.get(failure)) as raised:
        merge(tmp_path, llama)
    assert isinstance(raised.value, click.Abort) if failure == "interrupt" else raised.value.exit_code == 1
    assert_nothing_left(tmp_path)
