"""The configurations in merge_configs do what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mergekit_runs import (
    CONFIGS,
    Pair,
    Tensors,
    assert_same,
    command,
    edit,
    expect,
    layer_of,
)
from tiny_models import read_tensors


def filled(name: str, pair: Pair, folder: Path) -> Path:
    text = (CONFIGS / name).read_text()
    assert text.count("path-or-org/pretrained-model") == text.count("path-or-org/aligned-model") == 1
    path = folder / name
    path.write_text(text.replace("path-or-org/pretrained-model", str(pair[0])).replace("path-or-org/aligned-model", str(pair[1])))
    return path


def run_example(name: str, pair: Pair, folder: Path) -> tuple[Tensors, Tensors]:
    command(filled(name, pair, folder), folder / "out")
    return read_tensors(folder / "out"), read_tensors(pair[1])


EXAMPLES = {
    "paper_defaults.yaml": lambda name: (6, 1.25),
    "layer_gradient.yaml": lambda name: (
        [2, 4, 6, 6, 6][layer_of(name) or 0],
        1.25 if "lm_head" in name else [0.25, 0.75, 1.25, 1.25, 1.25][layer_of(name) or 0],
    ),
    "attention_only.yaml": lambda name: (6, 1.25 if "self_attn" in name else 0),
    "mlp_only.yaml": lambda name: (8 if "down_proj" in name else 4 if "mlp" in name else 0, 1.25),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(tmp_path: Path, llama: Pair, name: str) -> None:
    found, _ = run_example(name, llama, tmp_path)
    assert_same(found, expect(llama, EXAMPLES[name]))


@pytest.mark.parametrize("fixture", ["llama", "qwen3"])
def test_conservative_example(tmp_path: Path, fixture: str, request: pytest.FixtureRequest) -> None:
    """On untied and tied embeddings alike."""
    found, aligned = run_example("conservative.yaml", request.getfixturevalue(fixture), tmp_path)
    changed = {name for name in aligned if not torch.equal(found[name], aligned[name])}
    assert changed == {name for name, tensor in aligned.items() if tensor.ndim == 2 and layer_of(name) is not None}


def test_moe_example(tmp_path: Path, mixtral: Pair) -> None:
    found, aligned = run_example("moe.yaml", mixtral, tmp_path)
    base = read_tensors(mixtral[0])
    for layer in range(2):
        old = f"model.layers.{layer}.block_sparse_moe"
        assert torch.equal(found[f"model.layers.{layer}.mlp.gate.weight"], aligned[f"{old}.gate.weight"])
        down = f"{old}.experts.1.w2.weight"
        assert torch.equal(found[f"model.layers.{layer}.mlp.experts.down_proj"][1], edit(base[down], aligned[down], 4))
        query = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(found[query], edit(base[query], aligned[query], 6))


def test_every_example_is_tested() -> None:
    assert {path.name for path in CONFIGS.glob("*.y*ml")} == {*EXAMPLES, "conservative.yaml", "moe.yaml", "projection_filter.yaml"}
