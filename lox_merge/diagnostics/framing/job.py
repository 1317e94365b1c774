"""Two data sets that share their completions, through the eyes of one or more models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from lox_merge._version import __version__
from lox_merge.checkpoint.quantised.view import quantisation_problems
from lox_merge.diagnostics.framing.attention import chosen_weights
from lox_merge.diagnostics.framing.measure import measure_model
from lox_merge.diagnostics.framing.pairs import Matching, Pair, framed_pairs, matched_rows
from lox_merge.diagnostics.framing.results import Framing, ModelCosines
from lox_merge.errors import PlanError, RequestError
from lox_merge.safety.chat import Rendering, check_rendering
from lox_merge.safety.conversations import Conversations, load_conversations
from lox_merge.safety.model_labels import told_apart
from lox_merge.safety.model_set import ModelSet
from lox_merge.safety.progress import ProgressFactory, no_progress
from lox_merge.safety.seeds import check_seed
from lox_merge.safety.vocabulary import common_vocabulary, output_size


def framing(
    models: Mapping[str, str | Path] | Sequence[str | Path],
    first: Conversations | str | Path,
    second: Conversations | str | Path,
    *,
    matching: Matching = "order",
    module: str | None = None,
    rendering: Rendering | None = None,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    cache_dir: Path | None = None,
    adapter_base: str | Path | None = None,
    base_is_right: bool = False,
    seed: int = 0,
    progress: ProgressFactory = no_progress,
) -> Framing:
    """Cosines of loss vectors and of last-attention-layer gradients between two framings of the same completions.

    "Re-emergent misalignment" (Giordani 2025). models: folders, Hub ids or PEFT adapters over adapter_base (None: the first of
    them; base_is_right: although they name another), by label (without labels: by their own names). The first one's tokenizer renders the
    texts for all of them. first, second: files of
    conversations, or conversations. module: regular expression of weight names instead of the last layer's attention. seed: of the
    bootstrap. Raises RequestError for data sets that do not share their completions, rows that are too long, a pattern that
    finds nothing; SourceError, PlanError for models that cannot be read; NumericalError for NaN.
    """
    seed = check_seed(seed)
    data = tuple(load_conversations(one, "data") if isinstance(one, (str, Path)) else one for one in (first, second))
    rows = matched_rows(data[0], data[1], matching)
    chosen = rendering or Rendering()
    found: list[ModelCosines] = []
    where: dict[str, Any] = {"device": device, "dtype": dtype, "device_map": device_map, "cache_dir": cache_dir}
    with ModelSet(_labelled(models), adapter_base=adapter_base, base_is_right=base_is_right, decode=True, **where) as held:
        if problems := [problem for label in held.labels for problem in quantisation_problems(held.checkpoint(label))]:
            raise PlanError(problems)
        pairs: list[Pair] = []
        vocabulary: tuple[int, Any] | None = None
        for label in held.labels:
            loaded = held.get(label)
            if vocabulary is None:
                check_rendering(loaded.tokenizer, chosen)
                pairs = framed_pairs(data[0], data[1], rows, loaded.tokenizer, chosen, _context(loaded.model))
                vocabulary = output_size(loaded.model), loaded.tokenizer
                rendered = chosen.identity(loaded.tokenizer)
            else:
                common_vocabulary({held.labels[0]: vocabulary, label: (output_size(loaded.model), loaded.tokenizer)}, shared=True)
            with progress(len(pairs), label) as bar:
                found.append(measure_model(label, loaded.model, pairs, chosen_weights(loaded.model, module), bar, seed))
            del loaded
        sources = held.identity()
    identity = {
        "tool": {"name": "lox-merge", "version": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "sources": sources,
        "data": {"first": data[0].identity(), "second": data[1].identity()},
        "settings": {"matching": matching, "module": module, "dtype": dtype, "seed": seed, "rendering": rendered},
    }
    return Framing(tuple(found), identity, tuple(_notes(pairs)))


def _labelled(models: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, str | Path]:
    """Labels as given, else as other commands have them. Raises RequestError for a model that is given twice, or none."""
    if not models or len({str(model) for model in (models.values() if isinstance(models, Mapping) else models)}) < len(models):
        raise RequestError("give at least one model, and each of them once.")
    # A result names no folder of this machine, so two of one name are told apart by a number.
    return dict(models) if isinstance(models, Mapping) else told_apart(models)


def _context(model: Any) -> int | None:
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if found is None else int(found)


def _notes(pairs: Sequence[Pair]) -> list[str]:
    notes = []
    if len(pairs) == 1:
        notes.append("One pair has no spread: no interval can be given.")
    if excluded := sum(pair.excluded for pair in pairs):
        where = sum(1 for pair in pairs if pair.excluded)
        notes.append(
            f"{excluded} completion token(s) of {where} pair(s) differ between the framings, because a token spans the border, and are left out."
        )
    if len({pair.completion for pair in pairs}) == 1 and len(pairs) > 1:
        notes.append("All pairs have the same completion, so different completions cannot be compared.")
    return notes
