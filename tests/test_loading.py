"""A checkpoint whose config.json and weights do not belong together: transformers would run it with random numbers in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCli
from safetensors.torch import load_file, save_file
from small_architectures import Architecture, small_model
from tiny_models import make_pair, tokenizer

from lox_merge.errors import CheckpointFormatError, LoxMergeWarning, SourceError
from lox_merge.safety.loading import load_model

LAYERS = 2


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"), "llama", "float32", aligned_shards=1)


@pytest.fixture
def configured(pair: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """The aligned model under a config.json with other values."""

    def make(**changes: Any) -> Path:
        copy = tmp_path / "aligned"
        shutil.copytree(pair[1], copy)
        config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        (copy / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        return copy

    return make


def without(folder: Path, *names: str) -> Path:
    file = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name not in names}, file, metadata={"format": "pt"})
    return folder


def test_layers_that_no_file_holds_are_refused_by_name(configured: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CheckpointFormatError) as raised:
        load_model(configured(num_hidden_layers=LAYERS + 9), device="cpu")
    text = str(raised.value)
    assert "aligned holds no weights for 81 parameter(s) of the LlamaForCausalLM" in text
    # In the order of layers: 2 before 10.
    assert "model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight" in text and "and 78 more" in text
    assert "number of layers" in text and "get the whole checkpoint" in text
    assert "LOAD REPORT" not in caplog.text  # the message says it


def test_a_lost_tensor_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    copy = without(Path(shutil.copytree(pair[1], tmp_path / "aligned")), "model.layers.1.mlp.up_proj.weight", "lm_head.weight")
    with pytest.raises(CheckpointFormatError, match=r"2 parameter\(s\).*: lm_head.weight, model.layers.1.mlp.up_proj.weight\."):
        load_model(copy, device="cpu")


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_an_expert_that_is_lost_is_refused(tmp_path: Path, architecture: str) -> None:
    folder = make_pair(tmp_path, architecture, "float32", aligned_shards=1)[1]
    expert = [name for name in load_file(folder / "model.safetensors") if ".layers.0." in name and ".experts.2." in name]
    assert expert
    with pytest.raises(SourceError, match=r"layers\.0\..*experts"):
        load_model(without(folder, *expert), device="cpu")


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma"])
def test_tied_weights_are_not_missing(tmp_path: Path, architecture: str) -> None:
    folder = make_pair(tmp_path, architecture, "float32", aligned_shards=1)[1]
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load_model(folder, device="cpu").model
    assert model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    with pytest.raises(CheckpointFormatError, match=r"lm_head\.weight.*tie_word_embeddings"):
        load_model(folder, device="cpu")


def test_other_shapes_are_refused_with_both(configured: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointFormatError) as raised:
        load_model(configured(intermediate_size=80), device="cpu")
    assert "model.layers.0.mlp.down_proj.weight of shape [32, 64], where its config.json asks for [32, 80] (5 more differ)" in str(raised.value)


def test_tensors_without_a_place_are_named_in_a_warning(configured: Callable[..., Path]) -> None:
    with pytest.warns(LoxMergeWarning, match=r"9 tensor\(s\) have no place in LlamaForCausalLM.*layers\.1\.input_layernorm\.weight.* 6 more"):
        load_model(configured(num_hidden_layers=LAYERS - 1), device="cpu")


@pytest.mark.parametrize("decoder", [True, False])
def test_a_model_that_fills_gaps_is_asked_only_as_a_decoder(decoder: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = small_model(Architecture("bert"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # freshly drawn weights hardly look at other words
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_decoder": decoder}), encoding="utf-8")
    if decoder:
        assert type(load_model(tmp_path, device="cpu").model).__name__ == "BertLMHeadModel"
    else:
        with pytest.raises(SourceError, match=r"BertLMHeadModel\) is no causal language model: its scores for a word depend on the words behind it"):
            load_model(tmp_path, device="cpu")


def test_every_command_that_runs_a_model_refuses(configured: Callable[..., Path], pair: tuple[Path, Path], tmp_path: Path, run_cli: RunCli) -> None:
    broken, base = configured(num_hidden_layers=LAYERS + 1), pair[0]
    (tmp_path / "p.txt").write_text("how do i\n", encoding="utf-8")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "how do i", "response": "no sorry"}) + "\n", encoding="utf-8")
    pairs, measured = tmp_path / "pairs.jsonl", ("--prompts", tmp_path / "p.txt", "--max-new-tokens", 1, "--no-cache")
    commands: dict[str, tuple[object, ...]] = {
        "asr": (broken, *measured),
        "search": (base, broken, *measured, "--ranks", "1"),
        "brittleness": (base, broken, *measured, "--ranks", "1"),
        "robustness": (base, broken, *measured, "--attack", pairs, "--steps", "0,1"),
        "behaviour": (base, broken, "--pairs", pairs),
        "activations": (broken, broken, "--pairs", pairs),
        "landscape": (broken, *measured),
        "curvature": (broken, "--completions", pairs),
        "framing": (broken, "--first", pairs, "--second", pairs),
    }
    for command, arguments in commands.items():
        done = run_cli(command, *arguments, "--device", "cpu", cwd=tmp_path)
        assert done.returncode == 2 and "holds no weights for 9 parameter(s)" in done.stderr, (command, done.stderr)
        assert done.stdout == "" and "Traceback" not in done.stderr, command
