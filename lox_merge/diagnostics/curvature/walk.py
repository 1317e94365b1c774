"""One forward and one backward pass of a model over completions, with what each adds to the gradients handed out as it comes."""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from lox_merge.diagnostics.curvature.capture import Batch, Capture, Emit
from lox_merge.diagnostics.curvature.sites import Site
from lox_merge.errors import LoxMergeError, NumericalError, RequestError
from lox_merge.safety.batches import is_out_of_memory, right_padded
from lox_merge.safety.conversations import IGNORED
from lox_merge.safety.progress import ProgressFactory, no_progress

Example = dict[str, list[int]]
Reduction = Literal["sum", "mean"]
# Tokens and texts of a backward pass: more of them no longer make it faster. The graph of a large model takes memory with each token,
# and keeps all cores busy with fewer.
_TOKENS, _TOKENS_OF_LARGE, _ROWS = 1024, 512, 32
_LARGE = 100_000_000


def check_model(model: Any) -> None:
    """Raises RequestError for a model without gradients: quantised, or partly not in memory."""
    quantised = getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise RequestError(f"{name} is not in memory (it was offloaded). Use a machine that holds the whole model.")
        quantised = quantised or not parameter.dtype.is_floating_point or parameter.dtype.itemsize < 2
    if quantised:
        raise RequestError("the model is quantised, and its stored weights have no gradient. Load the unquantised one in bfloat16 or float32.")


def check_examples(examples: Sequence[Example], what: str = "safe completions") -> None:
    """Raises RequestError where there are none, or one has no token of a response to predict."""
    if not examples:
        raise RequestError(f"there are no {what}. Give at least one conversation with a response.")
    empty = [number for number, example in enumerate(examples, 1) if not _targets(example)]
    if empty:
        raise RequestError(f"{what}: no token of a response in number(s) {', '.join(map(str, empty[:8]))}. Remove them, or raise the length.")


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Evaluation mode and no parameter that asks for a gradient; both as before on leaving."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
        for module, mode in modes.items():
            module.training = mode


def walk(
    model: Any,
    sites: Sequence[Site],
    wanted: Container[str],
    examples: Sequence[Example],
    emit: Emit,
    *,
    reduction: Reduction = "sum",
    batch_size: int | None = None,
    progress: ProgressFactory = no_progress,
    what: str = "completions",
) -> Capture:
    """Calls `emit` with what every wanted parameter's gradients of log p(response | prompt) are made of.

    examples: as `tokenised` gives them; example i is owner i. reduction: the log-likelihood of a completion is the sum over its tokens
    (the paper's log π(y|x)), or their mean. Gradients pass through prompts too. The model is left as it was.
    Raises NumericalError for NaN, LoxMergeError when memory runs out.
    """
    capture = Capture(model, sites, wanted, emit)
    with frozen(model), capture.hooks(), progress(len(examples), what) as shown:
        for numbers in batches(examples, batch_size, _tokens_at_once(model)):
            one_batch(model, capture, [examples[number] for number in numbers], numbers, reduction)
            shown.advance(len(numbers))
    return capture


def one_batch(model: Any, capture: Capture, rows: Sequence[Example], numbers: Sequence[int], reduction: Reduction) -> None:
    """Forward and backward over these completions; `numbers` say which they are, ascending."""
    device = model.device
    # What follows the last labelled token, and that token itself, has no part in the likelihood.
    lengths = [_targets(row)[-1] for row in rows]
    tokens, mask = right_padded([row["input_ids"][:length] for row, length in zip(rows, lengths, strict=True)], 0, device)
    batch = Batch(torch.tensor(numbers, device=device), mask.bool())
    try:
        with capture.batch(batch), torch.enable_grad():
            likelihood = log_likelihood(model, tokens, mask, rows, reduction)
            if not bool(torch.isfinite(likelihood)):
                raise NumericalError("the log-likelihood of a completion is not finite. Load the model in float32, or check its weights.")
            likelihood.backward()  # type: ignore[no-untyped-call]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise LoxMergeError("memory ran out in a backward pass. Use a smaller --batch-size, fewer --tokens, or a narrower dtype.") from error


def log_likelihood(model: Any, tokens: Tensor, mask: Tensor, rows: Sequence[Example], reduction: Reduction) -> Tensor:
    """Σ over examples of log p(response | prompt): a scalar, float32 or wider."""
    first = min(_targets(row)[0] for row in rows) - 1
    options = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask}
    if "use_cache" in options:
        arguments["use_cache"] = False
    learned = any(isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings() for module in model.modules())
    if learned and "position_ids" in options:  # learned positions would else be looked up once for the whole batch
        arguments["position_ids"] = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens).contiguous()
    if "logits_to_keep" in options:
        logits = model(**arguments, logits_to_keep=tokens.shape[1] - first).logits
    else:
        logits = model(**arguments).logits[:, first:]
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    total: Tensor = scores.new_zeros(())
    for place, row in enumerate(rows):
        positions = torch.tensor(_targets(row), device=scores.device)
        wanted = torch.tensor([row["input_ids"][target] for target in _targets(row)], device=scores.device)
        found = scores[place, positions - 1 - first].gather(1, wanted[:, None])
        total = total + (found.sum() if reduction == "sum" else found.mean())
    return total


def kept_rows(model: Any, examples: Sequence[Example], batch_size: int | None = None) -> tuple[int, int]:
    """Rows that a walk sees of every layer, and of one that is asked for the last positions of a batch only (the output head)."""
    every = last = 0
    for numbers in batches(examples, batch_size, _tokens_at_once(model)):
        targets = [_targets(examples[number]) for number in numbers]
        first = min(places[0] for places in targets) - 1
        every += sum(places[-1] for places in targets)
        last += sum(max(0, places[-1] - first) for places in targets)
    return every, last


def _tokens_at_once(model: Any) -> int:
    if sum(parameter.numel() for parameter in model.parameters()) < _LARGE:
        return _TOKENS
    width: int = model.dtype.itemsize
    return _TOKENS_OF_LARGE * 2 // max(2, width)  # the same memory for a graph in float32


def batches(examples: Sequence[Example], batch_size: int | None = None, tokens: int = _TOKENS) -> Iterator[list[int]]:
    """Numbers of completions of like length, ascending within a batch. tokens: of a batch where batch_size is None."""
    order = sorted(range(len(examples)), key=lambda number: -len(examples[number]["input_ids"]))
    while order:
        most = batch_size or max(1, min(_ROWS, tokens // len(examples[order[0]]["input_ids"])))
        yield sorted(order[:most])
        del order[:most]


def _targets(example: Example) -> list[int]:
    """Positions of the labelled tokens; the first token of a text is never predicted."""
    return [place for place, label in enumerate(example["labels"]) if label != IGNORED and place > 0]
