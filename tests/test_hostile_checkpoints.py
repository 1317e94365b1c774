"""What the fuzz campaign found in checkpoints: each once, with what the message says."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz.hostile import written
from fuzz.materials import WEIGHTS, Materials, split_header, with_header
from safetensors.torch import load_file
from tiny_models import INDEX

from lox_merge import harden
from lox_merge.checkpoint.config_checks import check_depth
from lox_merge.checkpoint.json_text import parse_json
from lox_merge.checkpoint.modules import map_model
from lox_merge.checkpoint.safetensors_format import parse_header
from lox_merge.errors import CheckpointFormatError, LoxMergeError, LoxMergeWarning, RequestError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.journal import flat_name
from lox_merge.jobs.verify import verify


@pytest.fixture
def folder(materials: Materials, tmp_path: Path) -> Path:
    return shutil.copytree(materials.aligned, tmp_path / "aligned")


def refused(base: Path, aligned: Path, out: Path, **settings: Any) -> str:
    with pytest.raises(RequestError) as caught:
        harden(base, aligned, out, **settings)
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "it holds 'x' twice"),
        (b'{"__metadata__":{"format":2}}', "not a table of texts"),
        (b'{"__metadata__":["format"]}', "not a table of texts"),
        *((b'{"__metadata__":' + value + b"}", "not a table of texts") for value in (b"0.0", b'""', b"[]", b"false")),
        (b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "half a surrogate pair"),
        (b'{"a\\u001b[2J":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', "control characters"),
        (b'{"x":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', "is not understood"),
        (b'{"x":{"dtype":"U8","shape":[0,9223372036854775808],"data_offsets":[0,0]}}', "a shape that no tensor can have"),
        (b'{"x":{"dtype":"U8","shape":[' + b",".join([b"1"] * 65) + b'],"data_offsets":[0,1]}}', "a shape that no tensor can have"),
        (b'{"x":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', "its header is not sound JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff{}", "its header is not sound JSON"),
    ],
)
def test_headers(header: bytes, words: str) -> None:
    raw = with_header(header, b"")
    with pytest.raises(CheckpointFormatError, match=words.replace("(", r"\(")):
        parse_header(raw, len(raw) + 1, "the file")


def test_json_is_read_or_one_error() -> None:
    assert parse_json('{"a": [1, "\\ud83d\\ude00"], "a": 2}') == {"a": 2}
    for text in ("", "{", "9" * 5000, "[" * 100_000 + "]" * 100_000, "[" * 201 + "]" * 201, b"\xff", '["\\ud800"]', '{"\\uDC00": 1}'):
        with pytest.raises(ValueError):
            parse_json(text)


def test_what_is_written_is_read_by_the_library_too(materials: Materials, tmp_path: Path) -> None:
    """A header that this package takes and the safetensors library does not would be copied into the output."""
    single = shutil.copytree(materials.single, tmp_path / "single")
    header, data = split_header(single / WEIGHTS)
    (single / WEIGHTS).write_bytes(with_header(written(header | {"__metadata__": {"format": 2}}), data))
    assert "not a table of texts" in refused(materials.base, single, tmp_path / "out")


@pytest.mark.parametrize("metadata", [[1], "text", 7])
def test_index_with_metadata_of_another_kind(materials: Materials, folder: Path, tmp_path: Path, metadata: object) -> None:
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"metadata": metadata}))
    assert "no weight_map" in refused(materials.base, folder, tmp_path / "out")


def call_shards(folder: Path, names: list[str]) -> None:
    """Gives the shards of an index other names, in order."""
    index = json.loads((folder / INDEX).read_text())
    renamed = dict(zip(sorted(set(index["weight_map"].values())), names, strict=True))
    for before, after in renamed.items():
        (folder / after).parent.mkdir(exist_ok=True)
        (folder / before).rename(folder / after)
    weight_map = {tensor: renamed[file] for tensor, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["tokenizer.json", ".safetensors", "model-2.bin", "x.safetensors/y", "x.SAFETENSORS"])
def test_shards_that_are_called_as_side_files(materials: Materials, folder: Path, tmp_path: Path, name: str) -> None:
    """Side files are copied after the shards: the edit would be written over."""
    call_shards(folder, ["model-1.safetensors", name])
    message = refused(materials.base, folder, tmp_path / "out")
    assert f"puts tensors into {name!r}" in message and "end in .safetensors" in message


def test_shards_with_names_that_were_one_in_the_journal(materials: Materials, folder: Path, tmp_path: Path) -> None:
    call_shards(folder, ["a/b.safetensors", "a__b.safetensors"])
    job = harden(materials.base, folder, tmp_path / "out")
    assert job.resumed_shards == 0 and verify(tmp_path / "out", base=materials.base, aligned=folder).ok
    decompose(materials.base, folder, tmp_path / "factors.safetensors").factors.close()
    names = ["a/b", "a__b", "a%2Fb", "a%252Fb", "a", "a/b/c"]
    assert len({flat_name(name) for name in names}) == len(names) and not any("/" in flat_name(name) for name in names)


def test_pickles_that_would_be_written_as_one_file(materials: Materials, tmp_path: Path) -> None:
    state = load_file(materials.single / WEIGHTS)
    folder = tmp_path / "pickled"
    (folder / "a").mkdir(parents=True)
    shutil.copy(materials.single / "config.json", folder)
    (first, tensor), *others = state.items()
    index = {"weight_map": {first: "a/model-1.bin"} | {name: "pytorch_model-1.bin" for name, _ in others}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({first: tensor}, folder / "a" / "model-1.bin")
    torch.save(dict(others), folder / "pytorch_model-1.bin")
    with pytest.warns(LoxMergeWarning, match="read with"):
        message = refused(materials.base, folder, tmp_path / "out")
    assert "a/model-1.bin and pytorch_model-1.bin of pickled would both be written as model-1.safetensors" in message


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "\\ud800"}'])
def test_json_beside_the_weights(materials: Materials, folder: Path, tmp_path: Path, name: str, data: bytes) -> None:
    (folder / name).write_bytes(data)
    assert name in refused(materials.base, folder, tmp_path / "out")


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "x"}, {"architectures": 5}, {"model_type": []}, {"num_attention_heads": 0}, {"num_hidden_layers": 10**400}]
)
def test_config_of_the_base_of_an_adapter(materials: Materials, tmp_path: Path, changes: dict[str, Any]) -> None:
    base = shutil.copytree(materials.base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))
    assert "config.json" in refused(base, materials.adapter, tmp_path / "out")


def test_a_config_cannot_ask_for_more_layers_than_weights_could_fill() -> None:
    """transformers builds every layer before it looks at a weight: a billion of them would take the machine."""
    for claims in (
        {"num_hidden_layers": 10**9},
        {"n_layer": 10**9},
        {"text_config": {"num_layers": 1e300}},
        {"vision_config": {"depth": float("inf")}},
    ):
        with pytest.raises(CheckpointFormatError, match="for a checkpoint of 12 tensors"):
            check_depth(claims, 12, "config.json")
    check_depth({"num_hidden_layers": 48, "layer_norm_eps": 1e9, "vocab_size": 10**9}, 12, "config.json")  # ALBERT uses one layer many times


def test_a_config_whose_names_are_no_names() -> None:
    from lox_merge.jobs.layout import matrix_views

    odd = {"model_type": ["gpt2"], "hidden_size": [], "text_config": {"model_type": {}}}
    for shape in ((8, 24), (4, 8, 24)):
        assert matrix_views("h.0.attn.experts.c_attn.weight", shape, odd)


def test_architectures_name_models_and_nothing_else(materials: Materials, tmp_path: Path) -> None:
    from lox_merge.checkpoint.checkpoint import open_checkpoint

    base = shutil.copytree(materials.base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    for name in ("pipeline", "Trainer", "logging", "__name__"):
        (base / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        assert map_model(open_checkpoint(base, "base")) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model_name_or_path": ["base"]}, "stands where a text belongs"),
        ({"target_parameters": [5]}, "stands where a text belongs"),
        ({"lora_alpha": 10**400}, "cannot be understood"),
        ({"lora_alpha": -7}, "lora_alpha below 0"),
        ({"alpha_pattern": {"q_proj": -0.5}}, "lora_alpha below 0"),
        ({"rank_pattern": {"(": 3}}, "is not a regular expression"),
        ({"rank_pattern": []}, "gives model.layers.0.mlp.down_proj rank 2"),
    ],
)
def test_adapter_configs(materials: Materials, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    adapter = shutil.copytree(materials.adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
    assert words in refused(materials.base, adapter, tmp_path / "out")


def test_a_pattern_that_takes_for_ever_is_refused(materials: Materials, tmp_path: Path) -> None:
    """The pattern and the names that it is matched against both come from the adapter."""
    adapter = shutil.copytree(materials.adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    pattern = r"(.|.)+[A-Z]"
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {pattern: 2}}))
    began = time.perf_counter()
    with pytest.raises(RequestError, match="takes too long on the name"):
        harden(materials.base, adapter, tmp_path / "out")
    assert time.perf_counter() - began < 20


def test_patterns_of_a_recipe_have_the_same_limit(materials: Materials, tmp_path: Path) -> None:
    from lox_merge import Recipe

    with pytest.raises(LoxMergeError, match="takes too long"):
        harden(materials.base, materials.aligned, tmp_path / "out", recipe=Recipe(include=(r"(.|.)+[A-Z]",)))
    assert not (tmp_path / "out").exists()
