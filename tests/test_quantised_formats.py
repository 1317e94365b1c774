"""Quantised checkpoints as float32: decoded against float64 written out by itself, and everything that headers show to be wrong."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from quantised_models import as_block_fp8, as_float8, as_int8, as_packed, block_fp8, block_values, packed_words, scheme, whole_codes
from safetensors.torch import load_file, save_file
from tiny_models import make_pair, read_tensors

from lox_merge.checkpoint.checkpoint import open_checkpoint
from lox_merge.checkpoint.quantised.stored import pack, unpack
from lox_merge.checkpoint.quantised.view import QuantisedCheckpoint, as_quantised, quantisation_problems
from lox_merge.errors import CheckpointFormatError

UP, DOWN, HEAD = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight"


@pytest.fixture(name="plain", scope="module")
def plain_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aligned checkpoint of two files whose sides are no multiples of the blocks."""
    return make_pair(tmp_path_factory.mktemp("plain"), "llama", aligned_shards=2, hidden=40, layers=2)[1]


def view(folder: Path) -> QuantisedCheckpoint:
    found = as_quantised(open_checkpoint(folder, "aligned"))
    assert isinstance(found, QuantisedCheckpoint)
    return found


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object], file: int = 0) -> None:
    path = sorted(folder.glob("*.safetensors"))[file]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    places = {name: each.name for each in sorted(folder.glob("*.safetensors")) for name in load_file(each)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def configure(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("powers", [False, True])
def test_block_fp8_with_partial_blocks(plain: Path, tmp_path: Path, powers: bool) -> None:
    folder = as_block_fp8(plain, tmp_path / "fp8", powers=powers)
    found, stored = view(folder), read_tensors(folder)
    assert found.problems == [] and sorted(found.names) == sorted(open_checkpoint(plain, "aligned").names)
    assert found.description == "fp8, 16×16 blocks"
    for name in (UP, DOWN):
        exact = block_values(stored[name], stored[name + "_scale_inv"])
        made = found.tensor(name)
        assert made.dtype == torch.float32 and found.info(name).describe() == f"F32 {list(made.shape)}"
        assert np.abs(made.double().numpy() - exact).max() <= 1e-7 * np.abs(exact).max()
    # Left out of the quantisation: as it is.
    assert found.info(HEAD).dtype == "BF16" and torch.equal(found.tensor(HEAD), stored[HEAD])


def test_scales_as_exponents_in_one_byte(plain: Path, tmp_path: Path) -> None:
    folder = as_block_fp8(plain, tmp_path / "fp8", powers=True)
    wanted = view(folder).tensor(UP)
    for dtype in (torch.float8_e8m0fnu, torch.uint8):
        copy = Path(shutil.copytree(folder, tmp_path / str(dtype)))
        for file in (0, 1):

            def store(tensors: dict[str, torch.Tensor], dtype: torch.dtype = dtype) -> None:
                for name in [name for name in tensors if name.endswith("_scale_inv")]:
                    tensors[name] = tensors[name].to(torch.float8_e8m0fnu).view(dtype)

            change(copy, store, file)
        found = view(copy)
        assert found.problems == [] and torch.equal(found.tensor(UP), wanted)


def test_one_scale_a_tensor(plain: Path, tmp_path: Path) -> None:
    folder = as_block_fp8(plain, tmp_path / "fp8")
    values = read_tensors(plain)[UP].float()
    scale = values.abs().max() / 448
    configure(folder, weight_block_size=None)
    names = [name for name in read_tensors(folder) if name.endswith("_scale_inv")]
    for file in (0, 1):
        change(folder, lambda tensors: tensors.update({name: scale.clone() for name in names if name in tensors}), file)
    found = view(folder)
    assert found.problems == [] and found.description == "fp8, one scale a tensor"
    codes = read_tensors(folder)[UP]
    assert torch.equal(found.tensor(UP), codes.float() * scale)


def test_scales_in_another_file_than_their_weights(plain: Path, tmp_path: Path) -> None:
    folder = as_block_fp8(plain, tmp_path / "fp8")
    wanted = view(folder).tensor(UP)
    moved: dict[str, torch.Tensor] = {}
    for file in (0, 1):
        change(folder, lambda tensors: moved.update({name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}), file)
    save_file(moved, folder / "scales.safetensors", metadata={"format": "pt"})
    change(folder, lambda tensors: None)
    found = view(folder)
    assert found.problems == [] and torch.equal(found.tensor(UP), wanted)
    assert found.weight_sources(found.home[UP]) == [("aligned", found.home[UP]), ("aligned", "scales.safetensors")]
    assert "scales.safetensors" in found.weight_headers and "scales.safetensors" not in found.headers


def test_stacked_experts_with_their_own_blocks(plain: Path, tmp_path: Path) -> None:
    folder = as_block_fp8(plain, tmp_path / "fp8")
    name = "model.layers.0.mlp.experts.down_proj"
    experts = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(0))
    parts = [block_fp8(expert) for expert in experts]
    codes, scales = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
    change(folder, lambda tensors: tensors.update({name: codes, name + "_scale_inv": scales}))
    found = view(folder)
    assert found.problems == []
    for place, (expert_codes, expert_scales) in enumerate(parts):
        exact = block_values(expert_codes, expert_scales)
        assert np.abs(found.tensor(name)[place].double().numpy() - exact).max() <= 1e-7 * np.abs(exact).max()
    assert found.tensor(name) is found.tensor(name)  # decoded once for all of its matrices
    assert torch.equal(found.encode(name, found.tensor(name)).view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(UP + "_scale_inv"), f"tensor {UP} (F8_E4M3) has no scale {UP}_scale_inv"),
        (lambda t: t.update({UP + "_scale_inv": torch.ones(4, 3)}), f"the scale {UP}_scale_inv is F32 [4, 3]"),
        (lambda t: t.update({UP + "_scale_inv": torch.ones(5, 3, dtype=torch.int64)}), f"the scale {UP}_scale_inv is I64 [5, 3]"),
        (lambda t: t.update({UP: torch.zeros(80, 40)}), f"{UP}_scale_inv holds scales, but {UP} is F32 [80, 40]"),
        (lambda t: t.update({"odd.weight": torch.zeros(8, 4, dtype=torch.int32)}), "tensor odd.weight is I32 [8, 4]"),
    ],
)
def test_what_headers_of_fp8_show(plain: Path, tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], object], message: str) -> None:
    folder = as_block_fp8(plain, tmp_path / "fp8")
    file = [UP in load_file(file) for file in sorted(folder.glob("*.safetensors"))].index(True)
    change(folder, spoil, file)
    found = view(folder)
    assert len(found.problems) == 1 and message in found.problems[0], found.problems
    assert quantisation_problems(found) == found.problems


@pytest.mark.parametrize("symmetric", [True, False])
def test_words_of_four_bits(plain: Path, tmp_path: Path, symmetric: bool) -> None:
    folder = as_packed(plain, tmp_path / "int4", group=8, symmetric=symmetric)
    found = view(folder)
    assert found.problems == [] and found.description == "compressed-tensors pack-quantized, 4 bits, groups of 8"
    assert sorted(found.names) == sorted(open_checkpoint(plain, "aligned").names)
    for name in (UP, DOWN):
        codes, scales, zeros = whole_codes(read_tensors(plain)[name], 4, 8, symmetric=symmetric)
        exact = (codes.double() - zeros.double().repeat_interleave(8, 1)) * scales.double().repeat_interleave(8, 1)
        assert torch.allclose(found.tensor(name).double(), exact, rtol=1e-7, atol=0)
        stored = read_tensors(folder)[name + "_packed"]
        assert torch.equal(found.encode(name, found.tensor(name)), stored)


@pytest.mark.parametrize("make", [as_int8, as_float8, lambda plain, out: as_float8(plain, out, "tensor")])
def test_one_scale_a_row_or_a_tensor(plain: Path, tmp_path: Path, make: Callable[[Path, Path], Path]) -> None:
    folder = make(plain, tmp_path / "quantised")
    found, stored = view(folder), read_tensors(folder)
    assert found.problems == []
    exact = stored[UP].double() * stored[UP + "_scale"].double().view(-1, 1)
    assert torch.allclose(found.tensor(UP).double(), exact, rtol=1e-7, atol=0)
    again = found.encode(UP, found.tensor(UP))
    assert again.dtype == stored[UP].dtype and torch.equal(again.view(torch.uint8), stored[UP].view(torch.uint8))


def test_a_last_word_that_is_part_empty(tmp_path: Path, plain: Path) -> None:
    """Its width is in weight_shape alone where one scale holds for a row."""
    folder = as_packed(plain, tmp_path / "int4", group=8)
    configure(folder, **scheme("pack-quantized", 4, "channel"))
    codes = torch.randint(-8, 8, (6, 13), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    for file in (0, 1):

        def store(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if name.endswith("weight_packed")]:
                start = name.removesuffix("_packed")
                tensors |= {name: packed_words(codes, 4), start + "_scale": torch.full((6, 1), 0.5), start + "_shape": torch.tensor([6, 13])}

        change(folder, store, file)
    found = view(folder)
    assert found.problems == [] and torch.equal(found.tensor(UP), codes.float() * 0.5)
    change(folder, lambda tensors: tensors.update({name: torch.tensor([6, 2]) for name in tensors if name.endswith("weight_shape")}))
    assert any("which does not hold 2 columns of 4 bits" in problem for problem in view(folder).problems)
    late = view(folder)
    late.quantised = {name: found.quantised[name] for name in late.quantised}
    name = next(name for name in late.quantised if late.home[name] == min(late.headers))
    with pytest.raises(CheckpointFormatError, match=r"weight_shape says \[6, 2\]"):
        late.tensor(name)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("columns", [1, 31, 32, 77])
def test_packing_is_undone(bits: int, columns: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (5, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(pack(codes, bits), packed_words(codes, bits))
    assert torch.equal(unpack(pack(codes, bits), bits, columns), codes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "stored rotated"),
        ({"config_groups": {}}, "no config_groups"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 3, "type": "int"}}}}, "3 bits are not read"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "actorder": "group"}}}}, "permutes"),
        ({"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": "4"}}}}, "'4'|4 of type|4 bits"),
    ],
)
def test_settings_of_compressed_tensors_that_are_not_read(plain: Path, tmp_path: Path, settings: dict[str, object], message: str) -> None:
    folder = as_packed(plain, tmp_path / "int4", group=8)
    configure(folder, **settings)
    if "format" in settings:
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]["config_groups"]["group_0"]["format"]
        (folder / "config.json").write_text(json.dumps(config))
    found = as_quantised(open_checkpoint(folder, "aligned"))
    assert not isinstance(found, QuantisedCheckpoint)
    (problem,) = quantisation_problems(found)
    assert "is quantised, which is not supported" in problem and "Give the unquantised checkpoint" in problem
    assert any(part in problem for part in message.split("|")), problem


OWN_SCALES = ("model.hc_head.hc_scale", "model.norm.scale", "model.layers.0.self_attn.k_scale", "model.layers.0.mlp.gate.global_scale")


def test_a_model_s_own_scales_are_no_sign_of_quantisation(plain: Path, tmp_path: Path) -> None:
    """DeepSeek V4 and others have parameters that are called so."""
    own = Path(shutil.copytree(plain, tmp_path / "own"))
    change(own, lambda tensors: tensors.update({name: torch.ones(3) for name in OWN_SCALES}))
    assert quantisation_problems(open_checkpoint(own, "aligned")) == []
    quantised = as_block_fp8(plain, tmp_path / "fp8")
    change(quantised, lambda tensors: tensors.update({name: torch.ones(3) for name in OWN_SCALES}))
    assert view(quantised).problems == []


@pytest.mark.parametrize(
    "names",
    [
        (f"{UP}_scale",),
        (f"{UP}_scale_inv",),
        ("model.experts.gate_up_proj_blocks", "model.experts.gate_up_proj_scales"),
        ("model.up.qweight", "model.up.scales"),
        ("model.up.weight._data", "model.up.weight._scale"),
        ("model.up.W_q", "model.up.scale"),
        ("model.up.weight.absmax",),
    ],
)
def test_scales_beside_what_they_scale_are_one(plain: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "left"))
    change(folder, lambda tensors: tensors.update({name: torch.ones(3) for name in names}))
    (problem,) = quantisation_problems(open_checkpoint(folder, "aligned"))
    assert "tensors named as scales or packed values" in problem


def test_modules_have_the_scheme_that_names_them(plain: Path, tmp_path: Path) -> None:
    """Two groups: attention in int8, the rest in words of four bits, by regular expression and by class."""
    folder = as_packed(plain, tmp_path / "mixed", group=8)
    query = "model.layers.0.self_attn.q_proj.weight"
    codes, scales, _ = whole_codes(read_tensors(plain)[query], 8, 40)

    def store(tensors: dict[str, torch.Tensor]) -> None:
        if query + "_packed" in tensors:
            for end in ("_packed", "_shape"):
                del tensors[query + end]
            tensors |= {query: codes, query + "_scale": scales}

    for file in (0, 1):
        change(folder, store, file)
    groups = scheme("pack-quantized", 4, "group", group=8)["config_groups"]
    groups["group_1"] = scheme("int-quantized", 8, "channel")["config_groups"]["group_0"] | {"targets": [r"re:.*layers\.0\.self_attn\.q_proj$"]}
    configure(folder, config_groups=groups, format="mixed-precision")
    found = view(folder)
    assert found.problems == []
    assert torch.equal(found.tensor(query), codes.float() * scales.float())
    assert found.quantised[UP].bits == 4


if sys.version_info >= (3, 11):  # older ones have no compressed-tensors beside this transformers

    @pytest.mark.parametrize("form", ["int4", "int4-zeros", "int8", "float8", "float8-tensor"])
    def test_decoding_is_that_of_the_library(plain: Path, tmp_path: Path, form: str) -> None:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig

        make = {
            "int4": lambda out: as_packed(plain, out, group=8),
            "int4-zeros": lambda out: as_packed(plain, out, group=8, symmetric=False),
            "int8": lambda out: as_int8(plain, out),
            "float8": lambda out: as_float8(plain, out),
            "float8-tensor": lambda out: as_float8(plain, out, "tensor"),
        }[form]
        folder = make(tmp_path / "quantised")
        found, stored = view(folder), read_tensors(folder)
        settings = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
        group = settings.config_groups["group_0"]
        compressor = BaseCompressor.get_value_from_registry(settings.format)
        for name in (UP, DOWN):
            module = name.removesuffix("weight")
            parts = {part.removeprefix(module): tensor for part, tensor in stored.items() if part.startswith(module)}
            # In float32, as here: the library multiplies in the dtype of the scales.
            parts["weight_scale"] = parts["weight_scale"].float()
            assert torch.equal(compressor.decompress(parts, group)["weight"].float(), found.tensor(name))
            if form.startswith("int4"):
                assert torch.equal(found.encode(name, found.tensor(name)), parts["weight_packed"])
