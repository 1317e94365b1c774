"""Several models that are looked at in turn: together in memory where they fit, else one after another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lox_merge.checkpoint.adapter import AdaptedCheckpoint, is_adapter
from lox_merge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lox_merge.checkpoint.quantised.view import as_quantised
from lox_merge.errors import PlanError, RequestError, SourceError
from lox_merge.jobs.beforehand import resolve_device
from lox_merge.jobs.quantised import form_of
from lox_merge.safety.adapted import load_adapted, open_any
from lox_merge.safety.batches import free_memory, release_memory
from lox_merge.safety.loading import DTYPES, LoadedModel, load_model

# What weights may take of the memory that is free at the start; activations and scores need the rest.
_SHARE = 0.6

Reference = str | Path | LoadedModel


class ModelSet:
    """Models by label, loaded when asked for. PEFT adapters among them lie on adapter_base, or else on the first one, or on `over`.

    base_is_right: take that although an adapter names another model. decode: run quantised models as the plain weights that their codes and
    scales stand for, as is done beside adapters in any case; else they are left to transformers.

    A LoadedModel in place of a folder or Hub id is taken as it is, where and in the dtype it is; it is never let go.
    together: True keeps every model that was loaded, False one at a time, None decides by memory: whether all weights fit. Opening reads
    headers only and finds every missing or damaged checkpoint at once. Raises PlanError, RequestError for settings that
    cannot be met. Used as a context, it lets the models go on leaving.
    """

    def __init__(
        self,
        references: Mapping[str, Reference],
        *,
        over: Mapping[str, str] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        device_map: str | None = None,
        cache_dir: Path | None = None,
        trust_remote_code: bool = False,
        together: bool | None = None,
        adapter_base: str | Path | None = None,
        base_is_right: bool = False,
        decode: bool = False,
    ) -> None:
        self._labels = tuple(references)
        self._given = {label: model for label, model in references.items() if isinstance(model, LoadedModel)}
        self._references = {label: reference for label, reference in references.items() if not isinstance(reference, LoadedModel)}
        self._settings = {"device": device, "dtype": dtype, "device_map": device_map, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
        self._checkpoints: dict[str, Checkpoint] = {}
        self._base = None if adapter_base is None else open_checkpoint(adapter_base, "adapter base", cache_dir)
        self._open(over or {}, cache_dir, base_is_right=base_is_right, decode=decode)
        # What an adapter lies over is decoded; a quantised model beside it is run in the same way.
        self._decodes = decode or any(isinstance(checkpoint, AdaptedCheckpoint) for checkpoint in self._checkpoints.values())
        self._loaded: dict[str, LoadedModel] = {}
        self.together = self._fit(device, dtype) if together is None else together

    def __enter__(self) -> ModelSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        for checkpoint in (*self._checkpoints.values(), *(() if self._base is None else (self._base,))):
            checkpoint.close()

    @property
    def labels(self) -> tuple[str, ...]:
        return self._labels

    def checkpoint(self, label: str) -> Checkpoint:
        """The files of a model: headers, config, tensors. Raises RequestError for one that was given in memory: it has none."""
        if label in self._given:
            raise RequestError(f"{label} ({self._given[label].title}) is a model in memory, which has no files. Give its folder or Hub id.")
        return self._checkpoints[label]

    def get(self, label: str) -> LoadedModel:
        """The model, in evaluation mode. Where models do not fit together the last one asked for is let go first: keep no reference to it."""
        if label in self._given:
            return self._given[label]
        if label not in self._loaded:
            if not self.together:
                self.release()
            checkpoint = self._checkpoints[label]
            if isinstance(checkpoint, AdaptedCheckpoint):
                self._loaded[label] = load_adapted(checkpoint, **self._settings)
            else:
                self._loaded[label] = load_model(self._references[label], decode=self._decodes, **self._settings)  # type: ignore[arg-type]
        return self._loaded[label]

    def release(self) -> None:
        """Lets every model go that was loaded here."""
        if self._loaded:
            self._loaded.clear()
            release_memory()

    def identity(self) -> dict[str, dict[str, Any]]:
        """What a result records of every model: title and where it came from, with no path of this machine."""
        found = {label: {"title": model.title, **model.source} for label, model in self._given.items()}
        for label, checkpoint in self._checkpoints.items():
            found[label] = {"title": checkpoint.title, **checkpoint.source.identity(), **form_of(checkpoint)}
        return {label: found[label] for label in self._labels}

    def _open(self, over: Mapping[str, str], cache_dir: Path | None, **opening: bool) -> None:
        problems: list[str] = []
        for label, reference in self._references.items():
            lower = over.get(label, self._labels[0])
            below = self._checkpoints.get(lower) if self._base is None else self._base
            try:
                if below is None and lower in self._given and is_adapter(reference, label, cache_dir):
                    raise RequestError(f"{label} is an adapter over {lower}, which is a model in memory. Give {lower} as a folder or Hub id.")
                self._checkpoints[label] = open_any(reference, label, cache_dir, adapter_base=below, **opening)
            except PlanError as error:
                problems += error.problems
            except (SourceError, RequestError) as error:
                problems.append(str(error))
        if problems:
            raise PlanError(problems)

    def _fit(self, device: str, dtype: str) -> bool:
        read = as_quantised if self._decodes else lambda checkpoint: checkpoint
        needed = sum(_bytes_in_memory(read(checkpoint), DTYPES.get(dtype)) for checkpoint in self._checkpoints.values())
        return needed <= _SHARE * free_memory(resolve_device(device))


def _bytes_in_memory(checkpoint: Checkpoint, dtype: torch.dtype | None) -> int:
    """Bytes of all tensors once loaded in `dtype` (None: as stored); an adapter's base counts, it is copied."""
    found = [checkpoint.info(name) for name in checkpoint.names]
    return sum(tensor.bytes if dtype is None else tensor.size * dtype.itemsize for tensor in found)
