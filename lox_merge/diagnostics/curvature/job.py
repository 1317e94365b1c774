"""Curvature of safe behaviour, overlap of fine-tuned models with it, and what data sets would do to it: all as one function."""

from __future__ import annotations

import platform
import random
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from lox_merge._version import __version__
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.quantised.view import quantisation_problems
from lox_merge.diagnostics.curvature.condition import condition_record, moments
from lox_merge.diagnostics.curvature.deltas import Finetuned, delta_of, open_finetuned
from lox_merge.diagnostics.curvature.gram import fisher_gram
from lox_merge.diagnostics.curvature.notes import notes
from lox_merge.diagnostics.curvature.products import products_with
from lox_merge.diagnostics.curvature.projection import Projection
from lox_merge.diagnostics.curvature.records import coupling_by_layer, layer_records, overlap_record, parameter_records, spectrum_record, subspace_of
from lox_merge.diagnostics.curvature.settings import CurvatureSettings
from lox_merge.diagnostics.curvature.sites import find_sites
from lox_merge.diagnostics.curvature.walk import Example, check_examples, check_model
from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.jobs.quantised import form_warnings
from lox_merge.safety.adapted import load_any, open_any
from lox_merge.safety.chat import Rendering, check_rendering
from lox_merge.safety.conversations import Conversations, load_conversations, tokenised
from lox_merge.safety.loading import LoadedModel
from lox_merge.safety.progress import ProgressFactory, no_progress

FORMAT = 1
COMPLETIONS = "safe completions"


@dataclass(frozen=True, repr=False)
class Curvature:
    """A finished measurement, plain values as docs/curvature.md describes them.

    fisher: of all covered parameters jointly. layers, parameters: of each. finetuned: overlap scores of each model. data: the Alignment
    Instability Condition of each data set, in the order given; each has its `rank` by coupling. document: all of it, for --json.
    """

    fisher: dict[str, Any]
    layers: list[dict[str, Any]]
    parameters: list[dict[str, Any]]
    finetuned: list[dict[str, Any]]
    data: list[dict[str, Any]]
    document: dict[str, Any]

    def __repr__(self) -> str:
        return f"<Curvature of {self.document['completions']['used']} completions; {len(self.parameters)} parameters, d = {self.fisher['d']}>"

    def to_json(self) -> dict[str, Any]:
        return self.document


def curvature(
    aligned: str | Path | LoadedModel,
    completions: str | Path | Conversations,
    *,
    finetuned: Mapping[str, Finetuned] | Sequence[Finetuned] = (),
    data: Sequence[str | Path | Conversations] = (),
    settings: CurvatureSettings | None = None,
    rendering: Rendering | None = None,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    batch_size: int | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    adapter_base: str | Path | None = None,
    base_is_right: bool = False,
    progress: ProgressFactory = no_progress,
) -> Curvature:
    """The empirical Fisher matrix of `completions` at `aligned`, exactly, and everything that is asked of it.

    aligned: a folder, a Hub id, or a loaded model, whose weights stay as they are. finetuned: models whose overlap scores
    are measured: folders, Hub ids, adapters, loaded models, or differences by parameter name. data: sets that might be fine-tuned on.
    adapter_base: what PEFT adapters lie over, aligned among them (None: aligned); base_is_right: although they name another model.
    "The Geometry of Alignment Collapse" (Springer et al. 2026). Raises RequestError before anything is loaded where headers and
    files can tell, NumericalError for weights that are not finite.
    """
    chosen, rendering, start = settings or CurvatureSettings(), rendering or Rendering(), time.perf_counter()
    safe = completions if isinstance(completions, Conversations) else load_conversations(completions, COMPLETIONS)
    sets = [some if isinstance(some, Conversations) else load_conversations(some, "data set") for some in data]
    adapters: dict[str, Any] = {"adapter_base": adapter_base, "base_is_right": base_is_right}
    checkpoint = _opened(aligned, cache_dir, **adapters)
    opened = open_finetuned(finetuned, checkpoint, cache_dir, **adapters)
    where: dict[str, Any] = {"device": device, "dtype": dtype, "device_map": device_map, "cache_dir": cache_dir, "decode": True}
    loaded = aligned if isinstance(aligned, LoadedModel) else load_any(aligned, trust_remote_code=trust_remote_code, **where, **adapters)
    model = loaded.model
    check_model(model)
    chosen.check_against([name for name, _ in model.named_parameters()])
    check_rendering(loaded.tokenizer, rendering)
    examples = _sample(tokenised(safe, loaded.tokenizer, rendering, chosen.max_length), chosen.limit, chosen.seed)
    check_examples(examples)
    batches = [_batches(tokenised(some, loaded.tokenizer, rendering, chosen.max_length), chosen) for some in sets]
    _warn_where_slow(model)
    subtracted = [one for one in (checkpoint, *(other.checkpoint for other in opened)) if one is not None] if opened else []
    warned = _warnings(model, sets, batches, form_warnings(subtracted))
    deltas = [delta_of(one, model, [name for name, _ in model.named_parameters() if chosen.wants(name)]) for one in opened]
    projection = None
    if chosen.projection is not None:
        seeds = [chosen.seed + place for place in range(chosen.projection_seeds)]
        projection = Projection(find_sites(model)[0], chosen.projection, seeds)
    gram = fisher_gram(
        model,
        examples,
        wanted=chosen.wants,
        reduction=chosen.reduction,
        memory=chosen.memory,
        batch_size=batch_size,
        rows_seen=None if projection is None else projection.rows_seen,
        progress=progress,
    )
    whole = subspace_of(gram, None, chosen)
    parameters = parameter_records(gram, chosen)
    products = products_with(model, examples, gram, [delta.changes for delta in deltas], batch_size=batch_size, progress=progress)
    overlaps = [overlap_record(delta, place, products, gram, parameters, projection) for place, delta in enumerate(deltas)]
    conditions = []
    for some, parts in zip(sets, batches, strict=True):
        found = moments(
            model, examples, gram, parts, memory=chosen.memory, seed=chosen.seed, batch_size=batch_size, progress=progress, what=some.name
        )
        conditions.append(
            {
                **some.identity(),
                "batches": len(parts),
                "examples_used": sum(map(len, parts)),
                "kernels": found.kernels,
                **condition_record(found, whole, chosen.times, seed=chosen.seed),
                "layers": coupling_by_layer(found, gram, chosen),
            }
        )
    _rank(conditions)
    record: dict[str, Any] = {
        "format": FORMAT,
        "lox_merge": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": {"title": loaded.title, "source": loaded.source, "dtype": str(model.dtype).removeprefix("torch."), "class": type(model).__name__},
        "completions": safe.identity() | {"used": len(examples), "tokens": gram.tokens},
        "rendering": rendering.identity(loaded.tokenizer),
        "settings": chosen.to_json(),
        "passes": gram.passes,
        "left_out": gram.left_out,
        "fisher": spectrum_record(whole),
        "layers": layer_records(gram, chosen),
        "parameters": parameters,
        "finetuned": overlaps,
        "data": conditions,
        "warnings": warned,
        "seconds": time.perf_counter() - start,
    }
    record["notes"] = notes(record)
    return Curvature(record["fisher"], record["layers"], parameters, overlaps, conditions, record)


def _opened(aligned: str | Path | LoadedModel, cache_dir: Path | None, **adapters: Any) -> Checkpoint | None:
    if isinstance(aligned, LoadedModel):
        return None
    checkpoint = open_any(aligned, "aligned", cache_dir, decode=True, **adapters)
    problems = quantisation_problems(checkpoint)
    if problems:
        raise RequestError(problems[0])
    return checkpoint


def _sample(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    if limit is None or len(examples) <= limit:
        return examples
    return [examples[place] for place in sorted(random.Random(seed).sample(range(len(examples)), limit))]


def _batches(examples: list[Example], settings: CurvatureSettings) -> list[list[Example]]:
    """Whole batches of a seeded order; all examples as one batch where they are fewer."""
    order = random.Random(settings.seed).sample(range(len(examples)), len(examples))
    size, count = settings.data_batch_size, max(1, min(settings.batches, len(examples) // settings.data_batch_size))
    return [[examples[place] for place in order[start * size : (start + 1) * size]] for start in range(count)]


def _rank(conditions: list[dict[str, Any]]) -> None:
    """1 is the highest coupling; no rank where there is none."""
    known = sorted((record for record in conditions if record["coupling"] is not None), key=lambda record: -record["coupling"]["value"])
    for record in conditions:
        record["rank"] = next((place for place, one in enumerate(known, 1) if one is record), None)


def _warn_where_slow(model: Any) -> None:
    """Without AVX-512, torch multiplies 16-bit matrices on an x86 processor entry by entry where one of them is transposed."""
    float32_only = platform.machine().lower() in ("x86_64", "amd64") and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    if model.device.type == "cpu" and model.dtype.itemsize < 4 and float32_only:
        warnings.warn(
            f"this processor has no instructions for {str(model.dtype).removeprefix('torch.')}: a backward pass takes up to a hundred times as "
            "long as with --dtype float32",
            LoxMergeWarning,
            stacklevel=3,
        )


def _warnings(model: Any, sets: Sequence[Conversations], batches: Sequence[Sequence[Any]], forms: Sequence[str]) -> list[str]:
    found = [*forms]
    if sets and model.dtype.itemsize < 4:
        found.append(f"second derivatives in {str(model.dtype).removeprefix('torch.')} keep two or three digits; --dtype float32 is exact")
    found += [f"{some.name} gives one batch, so its figures have no interval" for some, parts in zip(sets, batches, strict=True) if len(parts) == 1]
    for text in found:
        warnings.warn(text, LoxMergeWarning, stacklevel=3)
    return found
