"""A PEFT LoRA adapter over its base checkpoint, read as if it were the merged checkpoint: one tensor at a time.

W = W_base + scale · B·A (LoRA, arXiv 2106.09685). The factors stay factors: what is asked for as a matrix is made then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.adapter_config import CONFIG, AdapterConfig, read_config
from lox_merge.checkpoint.adapter_files import PICKLED_WEIGHTS, WEIGHTS, OverBase
from lox_merge.checkpoint.adapter_names import Change, LowRank, Resolver
from lox_merge.checkpoint.checkpoint import PICKLE, PICKLE_INDEX, SINGLE, SINGLE_INDEX, Checkpoint, assemble, open_checkpoint
from lox_merge.checkpoint.files import FileSource, find_source
from lox_merge.checkpoint.modules import map_model
from lox_merge.checkpoint.safetensors_format import Header, TensorInfo
from lox_merge.checkpoint.weights import warn_pickle
from lox_merge.errors import PlanError, SourceError


def is_adapter(reference: str | Path | FileSource, role: str = "model", cache_dir: Path | None = None) -> bool:
    """Whether a folder or Hub id holds a PEFT adapter and no whole model. Raises SourceError where there is neither."""
    source = find_source(reference, role, cache_dir) if isinstance(reference, (str, Path)) else reference
    names = source.names()
    return CONFIG in names and not any(name in names for name in (SINGLE, SINGLE_INDEX, PICKLE, PICKLE_INDEX))


def open_model(reference: str | Path, role: str, base: Checkpoint, cache_dir: Path | None = None, *, base_is_right: bool = False) -> Checkpoint:
    """A checkpoint, or an adapter over `base`; headers only. Raises what `open_checkpoint` and `open_adapter` raise."""
    source = find_source(reference, role, cache_dir)
    return open_adapter(source, role, base, base_is_right=base_is_right) if is_adapter(source) else open_checkpoint(source, role)


def open_adapter(
    reference: str | Path | FileSource, role: str, base: Checkpoint, cache_dir: Path | None = None, *, base_is_right: bool = False
) -> AdaptedCheckpoint:
    """Opens a PEFT LoRA adapter over `base`, reading headers only.

    base_is_right: take `base` although the adapter names another model. Raises SourceError for what is no plain LoRA or names another
    base, PlanError with every tensor that fits nothing in `base`: no tensor of the file is left out.
    """
    source = find_source(reference, role, cache_dir) if isinstance(reference, (str, Path)) else reference
    where = f"{role}: {source.title}"
    if CONFIG not in source.names():
        raise SourceError(f"{where} has no {CONFIG}: it is no PEFT adapter. Give the folder that peft's save_pretrained wrote.")
    own = open_factors_only(role, source)
    config = read_config(own.json(CONFIG) or {}, f"{where}/{CONFIG}")
    other = _other_base(config, base)
    notes = [] if other is None or base_is_right else [_check_base(*other, base, where)]
    found = Resolver(next(iter(own.headers.values())), config, base, map_model(base), where)
    if found.problems:
        raise PlanError(found.problems)
    if not found.changes:
        raise SourceError(f"{where} holds no tensors. Give the adapter that training wrote.")
    adapted = AdaptedCheckpoint(
        role=role,
        source=OverBase(source, base.source),
        headers=base.headers,
        home=base.home,
        index=base.index,
        pickled=base.pickled,
        base=base,
        own=own,
        changes=found.changes,
        notes=notes,
        base_confirmed=base_is_right and other is not None,
    )
    adapted.check_twins()
    return adapted


def open_factors_only(role: str, source: FileSource) -> Checkpoint:
    """The adapter's weight file as a checkpoint of its own."""
    files = source.names()
    if WEIGHTS in files:
        return assemble(role, source, [WEIGHTS], None)
    if PICKLED_WEIGHTS in files:
        warn_pickle([PICKLED_WEIGHTS], f"{role}: {source.title}")
        return assemble(role, source, [PICKLED_WEIGHTS], None, pickled=True)
    raise SourceError(f"{role}: {source.title} has {CONFIG}, but neither {WEIGHTS} nor {PICKLED_WEIGHTS}. Give the folder that peft wrote.")


def _other_base(config: AdapterConfig, base: Checkpoint) -> tuple[str, bool] | None:
    """The model that the adapter names where that is not `base`, and whether the two names can be compared at all; None where it is."""
    if config.base is None:
        return None
    identity = base.source.identity()
    named, given = config.base.rstrip("/\\"), str(identity["name"])
    on_hub = named.count("/") == 1 and not Path(named).is_absolute() and not named.startswith((".", "~"))
    if on_hub and identity["kind"] == "hub":
        same, comparable = named.casefold() == given.casefold(), True
    else:
        # Of a folder only its own name is known to mean the same on two machines.
        same, comparable = PurePosixPath(named.replace("\\", "/")).name == PurePosixPath(given).name, on_hub == (identity["kind"] == "hub")
    return None if same else (named if on_hub else PurePosixPath(named.replace("\\", "/")).name, comparable)


def _check_base(named: str, comparable: bool, base: Checkpoint, where: str) -> str:
    """A note where the two names cannot be compared. Raises SourceError where they can: they differ."""
    if comparable:
        raise SourceError(
            f"{where} is an adapter over {named} and was given over {base.title}. Give its own base model; if {base.title} holds the same weights, "
            "add --base-is-right."
        )
    return f"{where} is an adapter over {named}; whether {base.title} is that model could not be compared, only its shapes."


@dataclass
class AdaptedCheckpoint(Checkpoint):
    """base + adapter with base's files, names and shapes.

    `tensor` gives float32 for what the adapter changes (float64 over float64), so that what is taken against it is the adapter's own
    update and not its rounding; `info` says so. `headers` are base's: what a written copy would look like.
    """

    base: Checkpoint = field(kw_only=True)
    own: Checkpoint = field(kw_only=True)
    changes: Mapping[str, Change] = field(kw_only=True)
    notes: list[str] = field(kw_only=True, default_factory=list)
    base_confirmed: bool = field(kw_only=True, default=False)  # the names differ, and --base-is-right was said
    _last: tuple[str, Tensor] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_last": None}

    @cached_property
    def weight_headers(self) -> Mapping[str, Header]:
        return self.own.headers

    def weight_sources(self, file: str) -> list[tuple[str, str]]:
        return [*((self.role, name) for name in self.own.headers), *self.base.weight_sources(file)]

    def stored_bytes(self, name: str) -> int:
        return self.base.stored_bytes(name)

    def made_bytes(self, name: str) -> int:
        # What the adapter changes is made anew, wider than it is stored.
        return self.base.made_bytes(name) + (self.info(name).bytes if name in self.changes else 0)

    def info(self, name: str) -> TensorInfo:
        info = self.base.info(name)
        change = self.changes.get(name)
        if change is None:
            return info
        if change.added is None:
            return replace(info, dtype=self.own.info(str(change.replaced_by)).dtype)
        return replace(info, dtype="F64" if info.dtype == "F64" else "F32")

    @property
    def weight_files(self) -> set[str]:
        return {*self.own.headers, *self.base.weight_files}

    def tensor(self, name: str) -> Tensor:
        change = self.changes.get(name)
        if change is None:
            return self.base.tensor(name)
        if self._last is not None and self._last[0] == name:
            return self._last[1]
        before = self.base.tensor(name) if change.replaced_by is None else self.own.tensor(change.replaced_by)
        if change.added is None:
            return before
        made = before.to(dtypes.torch_dtype(self.info(name).dtype), copy=True).contiguous()
        stack = change.added.experts if change.added.expert is None else 0
        for expert in range(stack) if stack else (None,):
            target = made if expert is None else made[expert]
            left, right = self._factors(change.added, expert)
            rows = target.view(left.shape[0], right.shape[0])
            rows.addmm_(left.to(rows.dtype), right.T.to(rows.dtype))
        # The matrices of a stack are asked for one by one.
        self._last = (name, made) if stack else None
        return made

    def factors(self, name: str, expert: int | None = None) -> tuple[Tensor, Tensor] | None:
        """W - W_base as left (rows, r) and right (columns, r), float32: left @ right.T, in the stored orientation, scale in `left`.

        expert: which matrix of a stored stack. None where the adapter holds the tensor whole, so that no thin factors exist; rank 0
        where it leaves the tensor alone.
        """
        change = self.changes.get(name)
        if change is None:
            shape = self.base.info(name).shape if expert is None else self.base.info(name).shape[1:]
            rows, columns = shape[0], torch.Size(shape[1:]).numel()
            return torch.zeros(rows, 0), torch.zeros(columns, 0)
        if change.replaced_by is not None:
            before, after = self.base.tensor(name), self.own.tensor(change.replaced_by)
            # PEFT writes the weights of a targeted embedding beside its factors; mostly they are base's own.
            if change.added is None or not torch.equal(before.float(), after.float()):
                return None
        assert change.added is not None
        return self._factors(change.added, expert)

    def _factors(self, added: LowRank, expert: int | None) -> tuple[Tensor, Tensor]:
        first, second = self.own.tensor(added.first), self.own.tensor(added.second)
        first, second = first.reshape(first.shape[0], -1), second.reshape(second.shape[0], -1)
        position = added.expert if added.expert is not None else expert
        if added.experts:
            assert position is not None
            # A stacks experts, then rank; B ranks, then experts (peft's ParamWrapper).
            first = first[position * added.rank : (position + 1) * added.rank]
            second = second[:, position :: added.experts]
        if added.part is not None:
            rows = second.shape[0] // added.part[1]
            second = second[added.part[0] * rows : (added.part[0] + 1) * rows]
        first, second = first.float(), second.float()
        left, right = (first.T * added.scale, second) if added.transposed else (second * added.scale, first.T)
        return left.contiguous(), right.contiguous()

    def fetch(self, files: list[str]) -> None:
        self.source.fetch(files)

    def check_twins(self) -> None:
        """Reads the adapter's factors of tied tensors. Raises SourceError where embedding and output head are changed apart."""
        for name, change in self.changes.items():
            for one, other, transposed in change.twins:
                first, second = self.own.tensor(one), self.own.tensor(other)
                if not torch.equal(first.T if transposed else first, second):
                    raise SourceError(
                        f"{self.role}: {self.title} changes {name} in two ways ({one}, {other}), but {self.base.title} uses it as token "
                        "embedding and as output head. Merge the adapter with peft and give that model."
                    )

    def close(self) -> None:
        self._last = None
        self.own.close()
        super().close()
