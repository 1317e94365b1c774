"""A checkpoint as a model in memory with its tokenizer, and a fingerprint of the weights it holds."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from lox_merge.checkpoint.checkpoint import open_checkpoint
from lox_merge.checkpoint.config_checks import check_depth
from lox_merge.checkpoint.quantised.view import QuantisedCheckpoint, as_quantised
from lox_merge.errors import LoxMergeError, PlanError, RequestError, SourceError
from lox_merge.jobs.beforehand import resolve_device
from lox_merge.jobs.manifest import output_identity
from lox_merge.jobs.quantised import form_of
from lox_merge.safety.automatic import auto_class, load_tokenizer
from lox_merge.safety.batches import is_out_of_memory
from lox_merge.safety.decoded import load_decoded
from lox_merge.safety.load_report import check_report, report_withheld

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Bytes are summed as 64-bit integers, which needs no conversion and so runs at the speed of memory.
_WORD, _WIDTH = 8, 1024
# Relative; the two rows of one batch differ by nothing else, and by this only where an expert is chosen by rounding.
_ROUNDING = 0.02


@dataclass(frozen=True)
class LoadedModel:
    """model: in evaluation mode; a causal language model, or one that takes pictures or sound beside text.

    source: where it came from, with no path of this machine.
    """

    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    title: str
    source: dict[str, Any]


def load_model(
    reference: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    decode: bool = False,
) -> LoadedModel:
    """Loads a local folder or the Hub id `org/name[@revision]`.

    device: 'auto' takes a GPU when there is one. dtype: 'auto' as stored, or bfloat16, float16, float32. device_map='auto'
    spreads a model over all GPUs (and the memory beside them) instead; it needs the package accelerate. decode: of a checkpoint in a
    quantised form that `harden` reads the plain weights, see `load_decoded`; else it is left to transformers, which may need a package or a GPU.
    Raises SourceError where it cannot be read, lacks weights that its config asks for or does not run on text alone,
    RequestError for settings that cannot be met.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is not known; use auto, {', '.join(DTYPES)}.")
    if device_map is not None and device != "auto":
        raise RequestError(f"a model is either on the device {device} or spread by device_map={device_map!r}; give one of the two.")
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise RequestError("spreading a model over several devices needs the package accelerate: pip install accelerate.")
    target = resolve_device(device)
    checkpoint = open_checkpoint(reference, "model", cache_dir)
    if decode:
        checkpoint = as_quantised(checkpoint)
        if isinstance(checkpoint, QuantisedCheckpoint) and checkpoint.problems:
            raise PlanError(checkpoint.problems)
    checkpoint.fetch([*checkpoint.weight_headers, *checkpoint.side_files()])
    if "config.json" not in checkpoint.source.names():
        raise SourceError(f"{checkpoint.title} has no config.json, so it cannot be run. Give a checkpoint that transformers can load.")
    check_depth(checkpoint.config, len(checkpoint.names), f"{checkpoint.title}/config.json")
    folder = checkpoint.source.path("config.json").parent
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        kind = auto_class(config)
        tokenizer = load_tokenizer(folder, **options)
        placement = {} if device_map is None else {"device_map": device_map}
        # Shapes that differ are left to check_report, which names both.
        settings = {"ignore_mismatched_sizes": True, **placement}
        with report_withheld():
            if isinstance(checkpoint, QuantisedCheckpoint):
                model, report = load_decoded(checkpoint, folder, kind, dtype=DTYPES.get(dtype), remote=options, **settings)
            else:
                model, report = kind.from_pretrained(folder, dtype=DTYPES.get(dtype, "auto"), output_loading_info=True, **settings, **options)
    except LoxMergeError:
        raise
    except Exception as error:  # a configuration of somebody else's may run transformers into anything
        advice = "" if trust_remote_code else " A model with code of its own needs trust_remote_code, which runs that code."
        raise SourceError(f"{checkpoint.title} cannot be loaded by transformers: {type(error).__name__}: {error}{advice}") from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
    check_report(report, model, checkpoint.title)
    if device_map is None:
        model = model.to(target)
    # What is made to fill gaps, too, reads in both directions unless its config.json says that it is a decoder.
    fills_gaps = model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(model.config, "is_decoder", False)
    if kind is not AutoModelForCausalLM or fills_gaps:
        check_words(model.eval(), tokenizer("how do you do it", add_special_tokens=False)["input_ids"][:5] or [0], checkpoint.title)
    return LoadedModel(model.eval(), tokenizer, checkpoint.title, checkpoint.source.identity() | output_identity(checkpoint) | form_of(checkpoint))


@torch.no_grad()
def check_words(model: Any, words: list[int], title: str) -> None:
    """Raises SourceError where a model of several inputs does not run on a text alone, or sees words before it comes to them.

    words: tokens of any text.
    """
    row = torch.tensor([words, [*words[:-1], words[0]]], device=model.device)  # two ends
    try:
        scores = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[:, :-1].float()
    except Exception as error:  # each model says in its own way what it misses
        if is_out_of_memory(error):
            raise
        raise SourceError(
            f"{title} cannot be asked in words alone, and nothing else is asked here: {type(error).__name__}: {error}. "
            "Harden it, and measure it with a tool that shows it pictures."
        ) from error
    if scores.numel() and bool(((scores[0] - scores[1]).norm(dim=-1) > _ROUNDING * scores[0].norm(dim=-1)).all()):
        raise SourceError(
            f"{title} ({type(model).__name__}) is no causal language model: its scores for a word depend on the words behind it, so what is "
            "measured here would mean nothing. Harden it, and measure it with a tool made for such models."
        )


def in_memory(model: Any, tokenizer: Any, title: str = "model") -> LoadedModel:
    """A model made elsewhere, say fine-tuned here and never written. What is recorded of it is a fingerprint of its weights as they are now."""
    return LoadedModel(model.eval(), tokenizer, title, {"kind": "memory", "weights": weights_fingerprint(model)})


@torch.no_grad()
def weights_fingerprint(model: Any) -> str:
    """sha256 over names, shapes, dtypes and exact sums of the bytes of every tensor, down and across.

    The same on every device and for every way of loading; one pass over the weights. It tells models apart, it does not guard
    against forgery. Weights that accelerate keeps on disk enter by name and shape only.
    """
    return tensors_fingerprint(sorted(model.state_dict().items()))


def tensors_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The same of tensors in a fixed order, such as a checkpoint's."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.device.type != "meta" and tensor.numel():
            for sums in _pattern_sums(tensor):
                digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()


def _pattern_sums(tensor: Tensor) -> list[Tensor]:
    """Sums down and across the tensor's bytes as a matrix of int64, and the bytes that were left over."""
    values = tensor.detach().contiguous()
    if values.data_ptr() % _WORD or values.storage_offset() * values.element_size() % _WORD:
        values = values.clone()  # mapped from a file at an odd place
    data = values.reshape(-1).view(torch.uint8)
    words = data[: data.numel() // _WORD * _WORD].view(torch.int64)
    rows = words[: words.numel() // _WIDTH * _WIDTH].view(-1, _WIDTH)
    # Integer sums wrap around instead of rounding, so their order does not matter.
    return [rows.sum(0), rows.sum(1), data[rows.numel() * _WORD :]]
