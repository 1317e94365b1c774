"""Every causal language model that the installed transformers knows, tiny and random: `python tests/architecture_campaign.py`.

Each is saved as base and aligned, hardened, filtered, verified, loaded again, hardened as an adapter that PEFT loads and merges,
and compared tensor by tensor with LoX in float64 (tests/reference.py). Exit code 1 when one of them ends badly. What cannot be
made tiny, or built at all here, is counted apart.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import peft
import torch
from finetuned import finetune
from reference import load, lox_tensor
from tiny_models import align
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from lox_merge import FilterRecipe, Recipe, harden, project
from lox_merge.checkpoint.adapter import open_adapter
from lox_merge.checkpoint.checkpoint import open_checkpoint
from lox_merge.errors import LoxMergeError, LoxMergeWarning
from lox_merge.jobs.adapter import execute_adapter
from lox_merge.jobs.adapter_plan import plan_adapter
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.layout import is_vector
from lox_merge.jobs.verify import verify

RANK, ALPHA = 2, 1.25
# Whatever a configuration calls its sizes. Every name stands for one number in all architectures.
SMALL = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 64)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), 96)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("num_key_value_heads", "num_shared_experts", "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1)
    | dict.fromkeys(("num_experts_per_tok", "moe_topk", "linear_num_key_heads"), 2)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads"), 4)
    | dict.fromkeys(("head_dim", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "hidden_size_per_layer_input"), 16)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16)
    | dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "state_size", "mamba_d_state", "time_step_rank"), 8)
    | {"vocab_size": 96, "vocab_size_per_layer_input": 96, "expand": 2, "mamba_n_heads": 4, "mamba_d_head": 32, "sliding_window": 32, "lru_width": 64}
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128)
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
)
_DENSE = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")}
_DENSE |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SPARSE = _DENSE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
# Where numbers depend on one another.
BY_HAND: dict[str, dict[str, Any]] = {
    "diffllama": _DENSE,
    "dots1": _DENSE
    | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_group": 1}
    | {"topk_group": 1, "first_k_dense_replace": 1},
    "falcon_h1": _DENSE | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    "gemma3n_text": _DENSE
    | {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "laurel_rank": 8}
    | {"intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": _DENSE | {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "global_head_dim": 16},
    "gpt_neo": {"vocab_size": 96, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]}
    | {"max_position_embeddings": 128, "window_size": 32, "bos_token_id": 1, "eos_token_id": 2},
    "hunyuan_v1_dense": _DENSE,
    "hunyuan_v1_moe": _DENSE | {"num_experts": 4, "moe_topk": 2},
    "laguna": _SPARSE | {"num_attention_heads_per_layer": [4] * 4},
    "lfm2_moe": _SPARSE | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 1}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "ministral": _DENSE,
    "nemotron": _DENSE,
    "zaya": _DENSE,
}
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
_LARGEST = 30_000_000


@dataclass
class Found:
    """What became of one architecture. outcome: 'hardened', 'not built' or 'failed'. shapes: of edited tensors that are no plain matrix."""

    architecture: str
    outcome: str
    seconds: float = 0.0
    reason: str = ""
    edited: int = 0
    adapter: str = ""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class NotBuilt(Exception):
    """transformers does not make this model from a small configuration."""


def tiny_model(architecture: str) -> Any:
    """Raises NotBuilt."""
    reasons = []
    for shrunk in (_by_hand,) if architecture in BY_HAND else (_by_attributes, _by_arguments, _text_alone):
        try:
            config = shrunk(architecture)
            kind = AutoModelForCausalLM._model_mapping[type(config)]
            kind = kind[0] if isinstance(kind, tuple) else kind
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in kind(config).parameters())
            if size > _LARGEST:
                raise NotBuilt(f"{size / 1e6:.0f}M parameters at its smallest")
            torch.manual_seed(0)
            return kind(config).to(torch.bfloat16)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0][:120])
    raise NotBuilt(reasons[0])


def _by_hand(architecture: str) -> Any:
    return CONFIG_MAPPING[architecture](**BY_HAND[architecture])


def _by_attributes(architecture: str) -> Any:
    config = CONFIG_MAPPING[architecture]()
    for part in _parts(config):
        for name, value in SMALL.items():
            known = _known(part, name)
            if isinstance(known, int) and not isinstance(known, bool):
                setattr(part, name, value)
        for name in _KINDS:
            known = _known(part, name)
            if isinstance(known, (list, tuple)) and len(known) > 4:
                setattr(part, name, (list(dict.fromkeys(known)) * 4)[:4])
    return config


def _by_arguments(architecture: str) -> Any:
    known = CONFIG_MAPPING[architecture]().to_dict()
    return CONFIG_MAPPING[architecture](**{name: value for name, value in SMALL.items() if isinstance(known.get(name), int)})


def _text_alone(architecture: str) -> Any:
    return _by_attributes(architecture).get_text_config()


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for name in ("text_config", "vision_config", "audio_config", "attn_config", "ffn_config"):
        part = _known(config, name)
        if hasattr(part, "to_dict"):
            yield part


def _known(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # some have one value a layer, and say so by an exception of their own
        return None


def make_pair(architecture: str, folder: Path) -> tuple[Path, Path]:
    model = tiny_model(architecture)
    with torch.no_grad():
        for change in (lambda values: values + 0.02 * torch.randn(values.shape), lambda values: align(values, 0.05)):
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.copy_(change(parameter.float()))
            try:
                model.save_pretrained(folder / ("aligned" if (folder / "base").exists() else "base"))
            except Exception as error:
                raise NotBuilt(f"not saved: {type(error).__name__}: {error}".splitlines()[0][:120]) from error
    return folder / "base", folder / "aligned"


def run(architecture: str, folder: Path) -> Found:
    started = time.perf_counter()
    found = Found(architecture, "hardened")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _look_at(*make_pair(architecture, folder), folder, found)
        found.warnings = [str(one.message) for one in caught if issubclass(one.category, LoxMergeWarning)]
    except NotBuilt as error:
        found.outcome, found.reason = "not built", str(error)
    except Exception as error:
        found.outcome, found.reason = "failed", f"{type(error).__name__}: {error}"
    found.seconds = time.perf_counter() - started
    return found


def _look_at(base: Path, aligned: Path, folder: Path, found: Found) -> None:
    out = harden(base, aligned, folder / "out", recipe=Recipe(rank=RANK, alpha=ALPHA), device="cpu").out
    tensors = {tensor["name"]: tensor for tensor in json.loads((out / "lox_merge.json").read_text())["tensors"]}
    before, after, written = load(base), load(aligned), load(out)
    gpt_oss = json.loads((aligned / "config.json").read_text()).get("model_type") == "gpt_oss"
    for name, value in written.items():
        if tensors[name]["action"] == "edited":
            assert_close(value, lox_tensor(name, before[name], after[name], RANK, ALPHA, gpt_oss=gpt_oss), after[name], name)
            if value.ndim != 2:
                found.shapes[re.sub(r"\d+", "N", name)] = list(value.shape)
        else:
            assert torch.equal(value, after[name]), f"{name} is said to be copied and is not"
            left = value.is_floating_point() and not is_vector(value.shape) and not torch.equal(before[name], after[name])
            assert not left, f"{name} {list(value.shape)} is a matrix that changed and was copied: {tensors[name]['reason']}"
    found.edited = sum(tensor["action"] == "edited" for tensor in tensors.values())
    assert verify(out, base=base, aligned=aligned).ok, "verify finds a difference"
    report = _load(out, aligned)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), f"not loaded whole: {report}"
    tuned = finetune(aligned, folder / "tuned")
    project(base, aligned, tuned, folder / "projected", recipe=FilterRecipe(fraction=0.1), device="cpu")
    try:
        execute_adapter(plan_adapter(plan_hardening(base, aligned, folder / "adapter", recipe=Recipe(rank=RANK, alpha=ALPHA))), device="cpu")
    except LoxMergeError as error:
        found.adapter = str(error).splitlines()[0]
        return
    adapted = open_adapter(folder / "adapter", "adapter", open_checkpoint(aligned, "aligned"), base_is_right=True)
    for name in adapted.changes:
        exact = lox_tensor(name, before[name], after[name], RANK, ALPHA, gpt_oss=gpt_oss)
        assert_close(adapted.tensor(name), exact, after[name], f"{name} with the adapter")
    model = AutoModelForCausalLM.from_pretrained(aligned)
    names = set(model.state_dict())
    merged = peft.PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    assert set(merged.state_dict()) == names, "PEFT leaves layers of its own behind when it merges the adapter"
    found.adapter = f"changes {len(adapted.changes)}"


def assert_close(out: torch.Tensor, exact: torch.Tensor, aligned: torch.Tensor, label: str) -> None:
    """`out` is `exact`, but for its rounding and for what the SVD leaves: a thousandth of the edit, a little more where singular values
    lie so close together that the span is not determined (kernels here are noise)."""
    edit = exact - aligned.double()
    allowed = exact.abs() * torch.finfo(out.dtype).eps / 2 * 1.01 + 1e-2 * edit.norm() + 1e-7
    error = out.double() - exact
    assert (error.abs() <= allowed).all(), label
    rounding = (exact.to(out.dtype).double() - exact).norm()
    assert float(error.norm()) <= 1.1 * float(rounding) + 1e-2 * float(edit.norm()) + 1e-6, label


def _load(out: Path, aligned: Path) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(out, output_loading_info=True, dtype=torch.bfloat16)[1]
    except Exception:
        try:
            AutoModelForCausalLM.from_pretrained(aligned)
        except Exception as error:
            raise NotBuilt(f"saved, and not loaded again: {type(error).__name__}: {error}".splitlines()[0][:120]) from error
        raise


@click.command()
@click.argument("architectures", nargs=-1)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write what happened here.")
def main(architectures: tuple[str, ...], json_file: Path | None) -> None:
    """ARCHITECTURES: transformers' names (model_type); all of them without any."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    results = []
    for architecture in architectures or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        with tempfile.TemporaryDirectory(prefix="architectures") as name:
            results.append(run(architecture, Path(name)))
        found = results[-1]
        reason = found.reason.splitlines()[0][:150] if found.reason else ""
        click.echo(f"{architecture:28} {found.seconds:5.1f} s  {found.edited:4} edited  {found.outcome}  {reason}")
    counts = {outcome: sum(found.outcome == outcome for found in results) for outcome in ("hardened", "not built", "failed")}
    click.echo(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if json_file:
        json_file.write_text(json.dumps([asdict(found) for found in results], indent=2))
    sys.exit(1 if counts["failed"] else 0)


if __name__ == "__main__":
    main()
