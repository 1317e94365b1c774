"""PEFT adapters read over their base: the weights are those that peft merges, and nothing of an adapter is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from adapters import TARGETS, edit_config, load_adapter, load_model, make_adapter, merge
from forked_cli import run_forked
from hub_clients import LoopbackHub
from reference import load, lox_tensor
from safetensors.torch import load_file, save_file
from tiny_models import make_pair
from transformers import AutoTokenizer

from lox_merge.checkpoint.adapter import AdaptedCheckpoint, is_adapter, open_adapter, open_model
from lox_merge.checkpoint.checkpoint import open_checkpoint
from lox_merge.checkpoint.files import HubFiles
from lox_merge.checkpoint.hub import HubSnapshot
from lox_merge.errors import LoxMergeWarning, NonFiniteDeltaError, NumericalError, PlanError, RequestError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.harden import harden
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.verify import verify
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.maths.factored import factored_svd
from lox_merge.maths.rank import parse_rank
from lox_merge.safety.decoding import Decoding
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.judges.factory import make_judge
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.search_job import search
from lox_merge.safety.types import Prompt


def _over(base: Path, adapter: Path, **settings: bool) -> AdaptedCheckpoint:
    return open_adapter(adapter, "aligned", open_checkpoint(base, "base"), **settings)


@pytest.mark.parametrize("architecture", sorted(TARGETS))
def test_weights_are_those_that_peft_merges(architecture: str, tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, architecture, base_shards=2, aligned_shards=1)
    adapter = make_adapter(base, tmp_path / "adapter", **TARGETS[architecture])
    merge(base, adapter, tmp_path / "merged")
    before, after, read = load(base), load(tmp_path / "merged"), _over(base, adapter)
    assert is_adapter(adapter) and not is_adapter(base) and read.names == list(open_checkpoint(base, "base").names)
    assert len(read.changes) > 1
    for name in read.names:
        info, tensor = read.info(name), read.tensor(name)
        assert tuple(tensor.shape) == info.shape and tensor.dtype == (torch.float32 if name in read.changes else torch.bfloat16)
        assert torch.allclose(tensor.float(), after[name], atol=1e-6, rtol=1e-6), name
        changed = not torch.equal(before[name].float(), after[name])
        assert changed == (name in read.changes), name
        experts = range(tensor.shape[0]) if tensor.ndim == 3 else [None]
        for expert in experts if read.changes.get(name) and read.changes[name].added else ():
            left, right = read.factors(name, expert) or (torch.zeros(0), torch.zeros(0))
            delta = (after[name].double() - before[name].double()) if expert is None else (after[name] - before[name].float())[expert].double()
            assert left.dtype == right.dtype == torch.float32 and left.shape[1] == right.shape[1] <= 4
            assert torch.allclose((left.double() @ right.double().T).view(delta.shape), delta, atol=1e-6), (name, expert)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"trainable_token_indices": [1, 2]}, "trainable token rows"),
    ],
)
def test_more_than_a_plain_lora_is_refused(settings: dict[str, object], words: str, tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "llama")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    with pytest.raises(RequestError, match=words):
        _over(base, adapter)


def test_settings_that_a_later_peft_may_bring_are_refused(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "llama")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit_config(adapter, use_something_new={"strength": 2})
    with pytest.raises(RequestError, match="use_something_new"):
        _over(base, adapter)
    edit_config(adapter, use_something_new=None, peft_type="LOHA")
    with pytest.raises(RequestError, match="type LOHA"):
        _over(base, adapter)


def test_every_tensor_of_the_file_has_to_be_used(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "llama")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    wrong = {
        "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": tensors[f"{name}.lora_A.weight"].clone(),
        "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": tensors[f"{name}.lora_B.weight"].clone(),
        f"{name}.lora_magnitude_vector": torch.ones(32),
        "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": tensors[f"{name}.lora_A.weight"].clone(),
        "base_model.model.model.layers.0.nothing.weight": torch.ones(3),
        "elsewhere.weight": torch.ones(3),
    }
    save_file(tensors | wrong, file)
    with pytest.raises(PlanError) as caught:
        _over(base, adapter)
    assert len(caught.value.problems) == 5
    for part in ("layers.7", "lora_magnitude_vector", "k_proj.lora_A", "nothing.weight", "elsewhere.weight"):
        assert sum(part in problem for problem in caught.value.problems) == 1, part


def test_an_adapter_of_another_size_or_rank_names_both_shapes(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "llama")
    other, _ = make_pair(tmp_path / "other", "llama", hidden=48)
    adapter = make_adapter(other, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(PlanError, match=r"make a change of \[48, 48\].*BF16 \[32, 32\] in base.*another base model"):
        _over(base, adapter)
    edit_config(adapter, r=5)
    with pytest.raises(PlanError, match="rank 5"):
        _over(base, adapter)


def test_an_adapter_over_another_base_is_refused(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(RequestError, match=r"adapter over base and was given over aligned.*--base-is-right"):
        _over(aligned, adapter)
    assert _over(aligned, adapter, base_is_right=True).changes
    edit_config(adapter, base_model_name_or_path="org/name")
    read = _over(base, adapter)
    assert "over org/name" in read.notes[0]


def test_a_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "llama")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.lm_head.weight"
    save_file(tensors | {name: torch.cat([tensors[name], tensors[name][:2]])}, file)
    with pytest.raises(PlanError, match=r"F32 \[98, 32\].*BF16 \[96, 32\].*resizes the vocabulary"):
        _over(base, adapter)


def test_a_tied_embedding_is_changed_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "qwen3")
    apart = make_adapter(base, tmp_path / "apart", target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(PlanError, match="token embedding and as output head"):
        _over(base, apart)
    together = make_adapter(base, tmp_path / "together", target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)
    read = _over(base, together)
    # Not against merge_and_unload: peft 0.21 adds a tied update twice when it merges.
    unmerged, model = load_adapter(base, together), load_model(base)
    model.load_state_dict({name: read.tensor(name).float() for name in read.names}, strict=False)
    tokens = torch.arange(24).view(2, 12)
    assert torch.allclose(model(tokens).logits, unmerged(tokens).logits, atol=1e-5)
    file = together / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.lm_head.lora_A.weight"
    save_file(tensors | {name: tensors[name] + 0.1}, file)
    with pytest.raises(RequestError, match="in two ways"):
        _over(base, together)


def test_a_whole_model_is_opened_as_one(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    opened = open_model(aligned, "aligned", open_checkpoint(base, "base"))
    assert not isinstance(opened, AdaptedCheckpoint)
    with pytest.raises(RequestError, match="it is no PEFT adapter"):
        _over(base, aligned)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        *((name, TARGETS[name]) for name in ("llama", "gpt2", "mixtral", "gpt_oss")),
        ("llama", {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "k_proj"]}),
    ],
)
def test_hardening_over_an_adapter_is_lox_of_the_merged_model(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, architecture, base_shards=2, aligned_shards=1)
    adapter = make_adapter(base, tmp_path / "adapter", **settings)
    merge(base, adapter, tmp_path / "merged")
    out = tmp_path / "out"
    result = harden(base, adapter, out, recipe=Recipe(rank=2, dtype="float32"))
    assert sorted(file.name for file in out.glob("*.safetensors")) == sorted(file.name for file in base.glob("*.safetensors"))
    before, after, written = load(base), load(tmp_path / "merged"), load(out)
    changed = _over(base, adapter).changes
    for name, tensor in written.items():
        exact = after[name].double()
        if name in changed and tensor.ndim > 1:
            # Merging in float32 rounds; the singular values of that rounding are far below the adapter's.
            exact = lox_tensor(name, before[name], after[name], 2, gpt_oss=architecture == "gpt_oss")
        assert torch.allclose(tensor.double(), exact, atol=2e-6), name
    edited = {tensor["name"]: tensor for tensor in result.manifest["tensors"] if tensor["action"] == "edited"}
    assert set(edited) == {name for name in changed if written[name].ndim > 1}
    for tensor in edited.values():
        for matrix in tensor["matrices"]:
            assert matrix["certificate"]["method"] == "exact" and matrix["certificate"]["residual"] < 1e-5
    assert result.manifest["sources"]["aligned"]["form"] == "adapter"
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(adapter).chat_template


def test_a_rank_above_the_adapters_gives_its_directions(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "llama", "float32")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    manifest = harden(base, adapter, tmp_path / "out", recipe=Recipe(rank=20)).manifest
    matrices = [matrix for tensor in manifest["tensors"] for matrix in tensor.get("matrices", ())]
    assert len(matrices) == 2
    for matrix in matrices:
        assert matrix["rank"] == 4 and matrix["certificate"]["next_singular_value"] is None
        assert matrix["r_align"] == pytest.approx(1.0)


def test_factored_svd_against_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, r in ((40, 9, 4), (9, 40, 4), (3, 50, 7), (1, 6, 2)):
        left, right = torch.randn(rows, r, generator=generator), torch.randn(columns, r, generator=generator)
        found = factored_svd(left, right, 2)
        exact = scipy.linalg.svdvals(left.double().numpy() @ right.double().numpy().T)
        k = min(2, rows)
        assert found.singular_values.numpy() == pytest.approx(exact[:k], rel=1e-6) and found.norm == pytest.approx(float((exact**2).sum() ** 0.5))
        assert torch.allclose(found.left.T @ found.left, torch.eye(k), atol=1e-5)
        following = found.certificate.next_singular_value
        assert following is None if k == min(rows, r, columns) else following == pytest.approx(exact[k])
        assert factored_svd(left, right, parse_rank("energy:0.999999999")).rank == min(rows, columns, r)
    assert factored_svd(torch.zeros(4, 2), torch.ones(3, 2), 1).rank == 0
    assert factored_svd(torch.zeros(4, 0), torch.ones(3, 0), 1).rank == 0
    with pytest.raises(NumericalError, match="NaN"):
        factored_svd(torch.full((4, 2), float("nan")), torch.ones(3, 2), 1)


def test_decompose_and_verify_over_an_adapter(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "llama", aligned_shards=1)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    out, factors, recipe = tmp_path / "out", tmp_path / "factors.safetensors", Recipe(rank=3, alpha=0.5)
    decompose(base, adapter, factors, recipe=Recipe(rank=8))
    harden(base, adapter, tmp_path / "plain", recipe=recipe)
    harden(base, adapter, out, recipe=recipe, factors=factors)
    plain = load(tmp_path / "plain")
    assert load(out).keys() == plain.keys() and all(torch.equal(tensor, plain[name]) for name, tensor in load(out).items())
    result = verify(out, base=base, aligned=adapter)
    assert result.ok and result.tensors_recomputed == 21
    edit_config(adapter, lora_alpha=8)
    assert "adapter_config.json of adapter is not the file that was used" in verify(out, base=base, aligned=adapter).problems[0]
    with pytest.raises(RequestError, match=r"aligned\.config_sha256 was"):
        harden(base, adapter, out, recipe=recipe)


def test_adapters_without_an_update_or_with_nan_are_not_hardened(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "llama")

    def fill(value: float) -> Callable[[Any], None]:
        def change(model: Any) -> None:
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.fill_(value)

        return change

    untrained = make_adapter(base, tmp_path / "untrained", target_modules=["q_proj"], change=fill(0.0))
    with pytest.raises(RequestError, match="all 16 deltas are zero"):
        harden(base, untrained, tmp_path / "out")
    damaged = make_adapter(base, tmp_path / "damaged", target_modules=["q_proj"], change=fill(float("nan")))
    with pytest.raises(NonFiniteDeltaError, match="2 tensor"):
        harden(base, damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_base_and_adapter_problems_are_told_together(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "llama")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(RequestError, match="adapter over base and was given over elsewhere"):
        harden(base.rename(tmp_path / "elsewhere"), adapter, tmp_path / "out")
    with pytest.raises(RequestError, match="lies inside aligned"):
        harden(tmp_path / "elsewhere", adapter, adapter / "out", base_is_right=True)


def test_a_hub_base_is_compared_by_name(tmp_path: Path) -> None:
    folder, _ = make_pair(tmp_path, "llama")
    adapter = make_adapter(folder, tmp_path / "adapter", target_modules=["q_proj"])
    base = replace(open_checkpoint(folder, "base"), source=HubFiles(HubSnapshot("org/name", "main", "0" * 40, {})))
    edit_config(adapter, base_model_name_or_path="org/other")
    with pytest.raises(RequestError, match="adapter over org/other and was given over org/name@main"):
        open_adapter(adapter, "aligned", base)
    edit_config(adapter, base_model_name_or_path="Org/Name")
    assert open_adapter(adapter, "aligned", base).notes == []
    edit_config(adapter, base_model_name_or_path="/home/somebody/models/thing")
    assert "over thing; whether org/name@main is that model" in open_adapter(adapter, "aligned", base).notes[0]


def test_adapter_and_base_from_the_hub(loopback_hub: LoopbackHub, hub_home: Path, tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "llama")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    edit_config(adapter, base_model_name_or_path="owner/base")
    commits = {name: loopback_hub.put(f"owner/{name}", tmp_path / name) for name in ("base", "adapter")}
    out = tmp_path / "out"
    environment = loopback_hub.environment(hub_home)
    hardened = run_forked(["harden", "owner/base", "owner/adapter@main", out, "--rank", 2], environment)
    assert hardened.returncode == 0, hardened.stderr
    verified = run_forked(["verify", out], environment)
    assert verified.returncode == 0 and "21 tensors made again from the sources: equal" in verified.stdout, verified.stderr
    sources = json.loads((tmp_path / "out" / "lox_merge.json").read_text())["sources"]
    assert sources["aligned"]["commit"] == commits["adapter"] and sources["aligned"]["form"] == "adapter"
    harden(base, adapter, tmp_path / "local", recipe=Recipe(rank=2), base_is_right=True)
    local = load(tmp_path / "local")
    assert all(torch.equal(tensor, local[name]) for name, tensor in load(tmp_path / "out").items())


def test_a_rank_search_over_an_adapter_measures_the_merged_model(toy_pair_seed0: ToyPair, tmp_path: Path) -> None:
    """theta_r at the adapter's own rank is base + adapter, and rank 0 the base model."""
    base = toy_pair_seed0.base
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj", "down_proj"], chat=False)
    # The base model has no chat template: that the prompts can be rendered shows that the adapter's tokenizer is used.
    AutoTokenizer.from_pretrained(toy_pair_seed0.aligned).save_pretrained(adapter)
    merged = merge(base, adapter, tmp_path / "merged")
    prompts = prompt_set([Prompt(str(number), f"v{number} a{number} n{number}") for number in range(12)], "prompts")
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def utility(model: LocalModel) -> dict[str, float | None]:
        seen[len(seen)] = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
        return {"seen": float(len(seen))}

    decoding = Decoding(max_new_tokens=2)
    search(base, adapter, prompts, make_judge("keyword"), ranks=(0, 2, 4), model={"decoding": decoding}, utility=utility)
    assert any(all(torch.allclose(state[name], merged[name], atol=1e-6) for name in merged) for state in seen.values())
    before = load_model(base).state_dict()
    assert any(all(torch.equal(state[name], before[name]) for name in before) for state in seen.values())


def test_a_pickled_adapter_is_read_and_a_missing_weight_file_named(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "llama")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    before = {name: _over(base, adapter).tensor(name).clone() for name in _over(base, adapter).changes}
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    with pytest.warns(LoxMergeWarning, match=r"adapter_model\.bin is read with"):
        read = _over(base, adapter)
    assert len(before) == 2 and all(torch.equal(read.tensor(name), tensor) for name, tensor in before.items())
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(RequestError, match="neither adapter_model"):
        _over(base, adapter)
