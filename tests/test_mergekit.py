"""The merge method `lox` in mergekit and `lox-merge yaml`, on tiny checkpoints of real architectures: the edit and its parameters."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mergekit.merge_methods import merge_state_dicts
from mergekit_runs import (
    Pair,
    assert_same,
    edit,
    expect,
    layer_of,
    merge,
)
from tiny_models import make_pair, read_tensors

from lox_merge.errors import LoxMergeWarning, PlanError, RecipeError
from lox_merge.jobs.harden import harden
from lox_merge.jobs.recipe import Recipe


@pytest.mark.parametrize(
    ("architecture", "dtype", "hidden"),
    [
        ("llama", "bfloat16", 160),  # wide enough for block Lanczos instead of the exact SVD
        ("llama", "float32", 32),
        ("qwen3", "bfloat16", 32),
        ("gemma", "bfloat16", 32),
        ("gpt2", "float16", 32),
    ],
)
def test_equals_lox_edit_bit_for_bit(tmp_path: Path, architecture: str, dtype: str, hidden: int) -> None:
    pair = make_pair(tmp_path, architecture, dtype, base_shards=2, aligned_shards=3, hidden=hidden)
    base, aligned = read_tensors(pair[0]), read_tensors(pair[1])
    found = merge(tmp_path, pair)
    assert_same(found, {name: edit(base[name], aligned[name]) for name in aligned})
    assert any(not torch.equal(found[name], aligned[name]) for name in aligned)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_each_expert_is_edited_as_the_matrices_it_is(tmp_path: Path, architecture: str) -> None:
    pair = make_pair(tmp_path, architecture)
    base, aligned = read_tensors(pair[0]), read_tensors(pair[1])
    found = merge(tmp_path, pair)
    names = ("w1", "w3", "w2") if architecture == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    prefix = "block_sparse_moe" if architecture == "mixtral" else "mlp"
    experts = 3 if architecture == "mixtral" else 4
    for layer in range(2):
        for expert in range(experts):
            gate, up, down = (f"model.layers.{layer}.{prefix}.experts.{expert}.{name}.weight" for name in names)
            stacked = f"model.layers.{layer}.mlp.experts"
            parts = torch.cat([edit(base[gate], aligned[gate]), edit(base[up], aligned[up])])
            assert torch.equal(found[f"{stacked}.gate_up_proj"][expert], parts)
            assert torch.equal(found[f"{stacked}.down_proj"][expert], edit(base[down], aligned[down]))
        router = f"model.layers.{layer}.{prefix}.gate.weight"
        assert torch.equal(found[f"model.layers.{layer}.mlp.gate.weight"], edit(base[router], aligned[router]))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.tensor([[1, 6, 7]])).logits).all()


@pytest.mark.parametrize(("rank", "rounding"), [(6, "nearest"), ("energy:0.9", "feedback"), ("noise-floor", "stochastic"), ("full", "nearest")])
def test_equals_harden_bit_for_bit(tmp_path: Path, qwen3: Pair, rank: int | str, rounding: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoxMergeWarning)  # harden may report what rounding lost
        harden(*qwen3, tmp_path / "hardened", recipe=Recipe(rank=rank, rounding=rounding))
    found = merge(tmp_path, qwen3, parameters={"rank": rank, "rounding": rounding})
    assert_same(found, read_tensors(tmp_path / "hardened"))


def test_stacked_experts_equal_harden_where_gate_and_up_alternate(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "gpt_oss")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoxMergeWarning)
        harden(*pair, tmp_path / "hardened")
    assert_same(merge(tmp_path, pair), read_tensors(tmp_path / "hardened"))


def test_output_has_the_dtype_of_aligned_where_base_has_another(tmp_path: Path) -> None:
    (wide, _), (_, narrow) = make_pair(tmp_path / "wide", "llama", "float32"), make_pair(tmp_path / "narrow", "llama", "bfloat16")
    base, aligned = read_tensors(wide), read_tensors(narrow)
    found = merge(tmp_path, (wide, narrow))
    assert_same(found, {name: edit(base[name], aligned[name]) for name in aligned})
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((narrow / "config.json").read_text())
    with pytest.raises(PlanError, match=r"rounding 'feedback' has no effect.*torch.float32"):
        merge(tmp_path, (wide, narrow), "--overwrite", parameters={"rounding": "feedback"})
    with pytest.raises(PlanError, match=r"rank 'noise-floor' is judged by the dtype that aligned is stored in \(torch.bfloat16\)"):
        merge(tmp_path, (wide, narrow), "--overwrite", parameters={"rank": "noise-floor"})


def test_out_dtype_is_written_and_named_in_the_config(tmp_path: Path, llama: Pair) -> None:
    found = merge(tmp_path, llama, out_dtype="float32")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


def test_in_memory_merge() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(24, 16, generator=generator), "norm": torch.randn(16, generator=generator)}
    aligned = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
    found = merge_state_dicts({"base": base, "aligned": aligned}, "lox", base="base", parameters={"rank": 3, "alpha": 2.0})
    assert torch.equal(found["w"], edit(base["w"], aligned["w"], 3, 2.0))
    assert torch.equal(found["norm"], aligned["norm"])
    with pytest.raises(ValueError, match="exactly 1 non-base inputs"):
        merge_state_dicts({"base": base, "aligned": aligned, "other": aligned}, "lox", base="base")
    with pytest.raises(RecipeError, match="removes safety"):
        merge_state_dicts({"base": base, "aligned": aligned}, "lox", base="base", parameters={"alpha": -0.5})


def test_gradients_run_over_the_layers(tmp_path: Path, llama: Pair) -> None:
    found = merge(tmp_path, llama, parameters={"alpha": [0, 1, 0.5], "rank": [0, 8]})
    alphas = [0.0, 0.5, 1.0, 0.75, 0.5]  # of layers 0 to 4
    ranks = [0, 2, 4, 6, 8]

    def parameters(name: str) -> tuple[int, float]:
        layer = layer_of(name)
        return (0, 0.0) if layer is None else (ranks[layer], alphas[layer])  # outside the layers: the first entry

    assert_same(found, expect(llama, parameters))
    edited = {layer_of(name) for name, tensor in read_tensors(llama[1]).items() if not torch.equal(tensor, found[name])}
    assert edited == {1, 2, 3, 4}


def test_a_gradient_over_ranks_is_rounded(tmp_path: Path, llama: Pair) -> None:
    found = merge(tmp_path, llama, parameters={"rank": [1, 4]})  # 1, 1.75, 2.5, 3.25, 4
    ranks = [1, 2, 2, 3, 4]
    assert_same(found, expect(llama, lambda name: (ranks[layer_of(name) or 0], 1.25)))


def test_a_gradient_over_rules_takes_steps(tmp_path: Path, llama: Pair) -> None:
    found = merge(tmp_path, llama, parameters={"rank": ["10%", "full"]})
    assert_same(found, expect(llama, lambda name: ("full" if layer_of(name) == 4 else "10%", 1.25)))


def test_filters_take_the_first_match(tmp_path: Path, llama: Pair) -> None:
    rank = [{"filter": "mlp.down_proj", "value": 3}, {"filter": "mlp", "value": 2}, {"value": 1}]
    alpha = [{"filter": "q_proj", "value": 0}, {"filter": "*", "value": [0, 1]}]
    found = merge(tmp_path, llama, parameters={"rank": rank, "alpha": alpha})

    def parameters(name: str) -> tuple[int, float]:
        layer = layer_of(name)
        alpha = 0.0 if "q_proj" in name or layer is None else layer / 4
        return (3 if "mlp.down_proj" in name else 2 if "mlp" in name else 1), alpha

    assert_same(found, expect(llama, parameters))


def test_parameters_of_the_aligned_entry_count(tmp_path: Path, llama: Pair) -> None:
    models = [{"model": str(llama[0])}, {"model": str(llama[1]), "parameters": {"alpha": 0.5}}]  # naming the base again changes nothing
    found = merge(tmp_path, llama, models=models, parameters={"alpha": 2.0, "rank": 2})
    assert_same(found, expect(llama, lambda name: (2, 0.5)))


def test_slices_with_their_own_parameters(tmp_path: Path, llama: Pair) -> None:
    def part(start: int, stop: int, alpha: float) -> dict[str, Any]:
        sources = [{"model": str(model), "layer_range": [start, stop]} for model in llama]
        return {"sources": sources, "parameters": {"alpha": alpha}}

    found = merge(tmp_path, llama, models=None, slices=[part(0, 2, 0.5), part(2, 5, 1.5)])

    def parameters(name: str) -> tuple[int, float]:
        layer = layer_of(name)
        first = "embed_tokens" in name if layer is None else layer < 2
        return 6, 0.5 if first else 1.5

    assert_same(found, expect(llama, parameters))
    with pytest.raises(PlanError, match="slices must cover all layers in order"):
        merge(tmp_path, llama, "--overwrite", models=None, slices=[part(1, 5, 1.0)])
    with pytest.raises(PlanError, match="leaves out 9 tensor"):
        merge(tmp_path, llama, "--overwrite", models=None, slices=[part(0, 4, 1.0)])


def test_filters_without_a_last_value_are_warned_about(tmp_path: Path, llama: Pair) -> None:
    with pytest.warns(LoxMergeWarning, match="all other tensors get the default"):
        found = merge(tmp_path, llama, parameters={"alpha": [{"filter": "self_attn", "value": 0.5}]})
    assert_same(found, expect(llama, lambda name: (6, 0.5 if "self_attn" in name else 1.25)))
