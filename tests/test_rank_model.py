"""The weights in memory are theta_r of the definition, whatever was set before, and aligned's own again at the end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import lox_tensor
from tiny_models import make_pair, read_tensors
from transformers import AutoModelForCausalLM

from lox_merge.errors import RequestError
from lox_merge.jobs.decompose import decompose, plan_decomposition
from lox_merge.jobs.factors import Factors
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.recipe import Recipe
from lox_merge.safety.rank_model import RankSwapper

RANK = 8


@dataclass
class Case:
    base: Path
    aligned: Path
    plan: Plan
    factors: Factors
    model: Any

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def case(folder: Path, architecture: str, dtype: torch.dtype = torch.float32, recipe: Recipe | None = None, **settings: Any) -> Case:
    base, aligned = make_pair(folder, architecture, **settings)
    chosen = recipe or Recipe(rank=RANK)
    factors = decompose(base, aligned, folder / "f.safetensors", recipe=chosen).factors
    plan = plan_decomposition(base, aligned, folder / "f.safetensors", recipe=chosen)
    return Case(base, aligned, plan, factors, AutoModelForCausalLM.from_pretrained(aligned, dtype=dtype))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def theta(name: str, base: torch.Tensor, aligned: torch.Tensor, rank: int, *, gpt_oss: bool) -> torch.Tensor:
    """W_base + Proj_r(W_align - W_base) in float64; vectors as in aligned."""
    if aligned.ndim < 2:
        return aligned.double()
    # The reference edit is aligned + alpha Proj_r(delta), and aligned - base is the delta.
    projected = lox_tensor(name, base, aligned, rank, 1.0, gpt_oss=gpt_oss) - aligned.double()
    return base.double() + projected


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("rank", [0, 3])
def test_theta_equals_the_definition_in_float64(tmp_path: Path, architecture: str, rank: int) -> None:
    made = case(tmp_path / "pair", architecture)
    with RankSwapper(made.model, made.plan, made.factors) as swapper:
        swapper.set_rank(rank)
        changed = made.weights()
    # The reference goes through a checkpoint of its own, loaded by transformers: names and fusions are not ours to get right.
    from safetensors.torch import save_file

    before, after = read_tensors(made.base), read_tensors(made.aligned)
    exact = {name: theta(name, before[name], values, rank, gpt_oss=architecture == "gpt_oss").float() for name, values in after.items()}
    folder = tmp_path / "reference"
    folder.mkdir()
    save_file(exact, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((made.aligned / "config.json").read_bytes())
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert changed.keys() == expected.keys()
    for name, value in changed.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-6 * float(expected[name].abs().max() + 1), msg=name)
    assert any(not torch.equal(value, made.weights()[name]) for name, value in changed.items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_aligned_weights_come_back_bit_for_bit(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    made = case(tmp_path, architecture, dtype)
    before = made.weights()
    with RankSwapper(made.model, made.plan, made.factors) as swapper:
        assert_same(made.weights(), before)
        for rank in (8, 0, 3):
            swapper.set_rank(rank)
        assert any(not torch.equal(value, before[name]) for name, value in made.weights().items())
    assert_same(made.weights(), before)


def test_they_come_back_after_a_failure_too(tmp_path: Path) -> None:
    made = case(tmp_path, "llama")
    before = made.weights()
    with pytest.raises(KeyboardInterrupt), RankSwapper(made.model, made.plan, made.factors) as swapper:
        swapper.set_rank(0)
        raise KeyboardInterrupt
    assert_same(made.weights(), before)


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_order_of_ranks_does_not_matter(tmp_path: Path, architecture: str) -> None:
    made = case(tmp_path, architecture, torch.bfloat16)
    swapper = RankSwapper(made.model, made.plan, made.factors)
    swapper.set_rank(3)
    direct = made.weights()
    for rank in (8, 0, 1, 6):
        swapper.set_rank(rank)
    swapper.set_rank(3)
    assert_same(made.weights(), direct)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    made = case(tmp_path, "qwen3")
    swapper = RankSwapper(made.model, made.plan, made.factors)
    swapper.set_rank(2)
    assert made.model.lm_head.weight.data_ptr() == made.model.model.embed_tokens.weight.data_ptr()


def test_matrices_that_are_left_out_stay_as_in_aligned(tmp_path: Path) -> None:
    made = case(tmp_path, "llama", recipe=Recipe(rank=RANK, exclude=("mlp",)))
    before = made.weights()
    swapper = RankSwapper(made.model, made.plan, made.factors)
    swapper.set_rank(0)
    for name, value in made.weights().items():
        assert torch.equal(value, before[name]) == ("mlp" in name or value.ndim < 2), name


def test_the_same_model_answers_as_one_loaded_from_theta(tmp_path: Path) -> None:
    """In memory and from a checkpoint: the same logits."""
    from safetensors.torch import save_file

    made = case(tmp_path / "pair", "mixtral")
    tokens = torch.tensor([[1, 6, 7, 8]])
    with RankSwapper(made.model, made.plan, made.factors) as swapper, torch.no_grad():
        swapper.set_rank(2)
        in_memory = made.model(tokens).logits
    before, after = read_tensors(made.base), read_tensors(made.aligned)
    folder = tmp_path / "reference"
    folder.mkdir()
    exact = {name: theta(name, before[name], values, 2, gpt_oss=False).float() for name, values in after.items()}
    save_file(exact, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((made.aligned / "config.json").read_bytes())
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(in_memory, expected, rtol=1e-4, atol=1e-4)


def test_a_model_with_other_weights_is_refused(tmp_path: Path) -> None:
    made = case(tmp_path, "llama")
    other = AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32)
    with pytest.raises(RequestError, match="is not what the checkpoint holds"):
        RankSwapper(other, made.plan, made.factors)
    with torch.no_grad():
        made.model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    with pytest.raises(RequestError, match=r"model.layers.1.mlp.up_proj.weight of the loaded model"):
        RankSwapper(made.model, made.plan, made.factors)


def test_ranks_out_of_reach_are_refused(tmp_path: Path) -> None:
    made = case(tmp_path, "llama")
    with pytest.raises(RequestError, match=r"rank 9 is asked and f.safetensors holds 8"):
        RankSwapper(made.model, made.plan, made.factors, rank=9)
    swapper = RankSwapper(made.model, made.plan, made.factors, rank=4)
    for rank, message in ((-1, "negative"), (5, "above 4"), (9, "holds 8")):
        with pytest.raises(RequestError, match=message):
            swapper.set_rank(rank)
