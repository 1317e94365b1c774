"""Which matrices a tensor consists of."""

from __future__ import annotations

import pytest
import torch

from lox_merge.jobs.layout import matrix_views

MIXTRAL = {"model_type": "mixtral", "hidden_size": 32, "num_local_experts": 4}


def test_two_dimensions_are_one_matrix_as_stored() -> None:
    (view,) = matrix_views("h.0.attn.c_attn.weight", (32, 96), {})
    tensor = torch.arange(32.0 * 96).view(32, 96)
    assert view.label == "" and torch.equal(view.select(tensor), tensor)


@pytest.mark.parametrize("shape", [(7,), (), (0, 5), (3, 0, 2), (1, 1, 64), (1, 64, 1), (1, 1, 32, 1), (4, 1, 1), (1, 1, 1)])
def test_vectors_and_empty_tensors_have_none(shape: tuple[int, ...]) -> None:
    assert matrix_views("x", shape, {}) == []


def test_experts_are_taken_one_by_one() -> None:
    views = matrix_views("model.layers.0.mlp.experts.down_proj", (4, 32, 56), MIXTRAL)
    tensor = torch.randn(4, 32, 56)
    assert [view.label for view in views] == ["[0]", "[1]", "[2]", "[3]"]
    for expert, view in enumerate(views):
        assert torch.equal(view.select(tensor), tensor[expert])


@pytest.mark.parametrize(
    ("model_type", "shape", "gate", "up"),
    [
        ("mixtral", (4, 56, 32), lambda e: e[:28], lambda e: e[28:]),
        ("qwen3_moe", (4, 56, 32), lambda e: e[:28], lambda e: e[28:]),
        ("llama4", (4, 32, 56), lambda e: e[:, :28], lambda e: e[:, 28:]),
        ("gpt_oss", (4, 32, 56), lambda e: e[:, ::2], lambda e: e[:, 1::2]),
        ("gpt_oss", (4, 32, 32), lambda e: e[:, ::2], lambda e: e[:, 1::2]),  # both sides equal: the model type decides
        ("mixtral", (4, 32, 32), lambda e: e[:16], lambda e: e[16:]),
    ],
)
def test_gate_and_up_fused_in_experts_are_two_matrices(model_type, shape, gate, up) -> None:  # type: ignore[no-untyped-def]
    config = {"model_type": "wrapper", "text_config": {"model_type": model_type, "hidden_size": 32, "num_local_experts": 4}}
    name = "model.layers.0.mlp.experts.gate_up_proj"
    views = matrix_views(name, shape, config)
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    covered = torch.zeros(shape)
    for view in views:
        part = gate if view.label.endswith("gate") else up
        assert view.expert is not None
        assert torch.equal(view.select(tensor), part(tensor[view.expert]))
        assert tuple(view.select(tensor).shape) == view.shape
        view.select(covered).add_(1)
    assert (covered == 1).all() and len(views) == 8
    whole = matrix_views(name, shape, config, "whole")
    assert [view.label for view in whole] == ["[0]", "[1]", "[2]", "[3]"]


@pytest.mark.parametrize(
    ("model_type", "name", "shape", "labels"),
    [
        ("granitemoe", "model.layers.0.block_sparse_moe.input_linear.weight", (2, 56, 32), ["[0].gate", "[0].up", "[1].gate", "[1].up"]),
        ("jetmoe", "model.layers.0.mlp.input_linear.weight", (2, 56, 32), ["[0].gate", "[0].up", "[1].gate", "[1].up"]),
        ("jetmoe", "model.layers.0.self_attention.experts.input_linear.weight", (2, 64, 32), ["[0]", "[1]"]),
        ("aria_text", "model.layers.0.mlp.experts.fc1.weight", (2, 32, 56), ["[0].gate", "[0].up", "[1].gate", "[1].up"]),
        ("aria_text", "model.layers.0.mlp.experts.fc2.weight", (2, 28, 32), ["[0]", "[1]"]),
    ],
)
def test_names_of_their_own_for_fused_experts(model_type: str, name: str, shape: tuple[int, ...], labels: list[str]) -> None:
    views = matrix_views(name, shape, {"model_type": model_type, "hidden_size": 32, "num_local_experts": 2})
    assert [view.label for view in views] == labels
    halved = {view.shape for view in views if view.label.endswith(("gate", "up"))}
    assert halved in (set(), {(28, 32)}, {(32, 28)})


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("model.layers.0.temporal_block.rg_lru.input_gate_weight", (4, 16, 16), 4),
        ("model.layers.0.mamba.x_proj_weight", (2, 24, 64), 2),
        ("model.layers.0.mamba.A_log", (2, 64, 8), 1),
        ("model.layers.0.mamba.conv1d.weight", (64, 32, 17), 1),
        ("audio.patch_embed.weight", (64, 32, 17), 1),
        ("tower.layers.0.filter", (4, 32, 15), 1),
        ("transformer.layer.0.rel_attn.q", (1024, 16, 64), 1),
    ],
)
def test_other_stacks_are_told_from_convolutions(name: str, shape: tuple[int, ...], count: int) -> None:
    views = matrix_views(name, shape, {"model_type": "recurrent_gemma", "hidden_size": 64})
    assert len(views) == count
    assert all(view.shape == (shape[1:] if count > 1 else (shape[0], shape[1] * shape[2])) for view in views)


def test_one_row_of_two_dimensions_is_a_matrix() -> None:
    assert [matrix_views("score.weight", shape, {})[0].shape for shape in ((1, 64), (64, 1))] == [(1, 64), (64, 1)]


def test_the_number_of_experts_in_the_config_names_a_stack() -> None:
    assert len(matrix_views("model.layers.0.ffn.w1", (4, 56, 32), MIXTRAL)) == 4


def test_convolutions_are_flattened_and_leading_ones_dropped() -> None:
    (convolution,) = matrix_views("visual.patch_embed.proj.weight", (24, 3, 2, 14, 14), {})
    assert convolution.shape == (24, 3 * 2 * 14 * 14)
    (positions,) = matrix_views("pos_embed", (1, 50, 24), {})
    assert positions.shape == (50, 24)
    tensor = torch.zeros(1, 50, 24)
    positions.select(tensor).add_(1)
    assert (tensor == 1).all()


def test_experts_of_dbrx_lie_below_one_another() -> None:
    config = {"model_type": "dbrx", "d_model": 8, "ffn_config": {"moe_num_experts": 3}}
    tensor = torch.arange(12 * 8).reshape(12, 8)
    for leaf, transposed in (("w1", False), ("v1", False), ("w2", True)):
        views = matrix_views(f"transformer.blocks.0.ffn.experts.mlp.{leaf}", (12, 8), config)
        assert [view.label for view in views] == ["[0]", "[1]", "[2]"] and {view.transposed for view in views} == {transposed}
        assert torch.equal(torch.cat([view.select(tensor) for view in views]), tensor)
    for name, of in (("transformer.blocks.0.norm_attn_norm.attn.Wqkv.weight", config), ("ffn.experts.mlp.w1", {"num_experts": 3})):
        assert [view.shape for view in matrix_views(name, (12, 8), of)] == [(12, 8)]
