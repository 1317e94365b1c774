"""A quantised checkpoint read as the float32 checkpoint that its codes and scales stand for: one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from lox_merge.checkpoint.adapter import AdaptedCheckpoint
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.files import FileSource
from lox_merge.checkpoint.quantised.detect import left_over, read_format, signs
from lox_merge.checkpoint.quantised.stored import StoredTensor
from lox_merge.checkpoint.safetensors_format import Header, build_header
from lox_merge.maths.grid import Grid

_MOST_NAMED = 8


@dataclass
class QuantisedCheckpoint(Checkpoint):
    """`stored` with every quantised weight as float32 under the weight's own name, scales left out.

    headers: what a float32 copy of each file would look like. quantised: by the weight's name. problems: what is wrong with the quantised
    form, from headers. description: the form in a few words.
    """

    stored: Checkpoint = field(kw_only=True)
    quantised: Mapping[str, StoredTensor] = field(kw_only=True)
    beside: frozenset[str] = field(kw_only=True)
    problems: list[str] = field(kw_only=True)
    description: str = field(kw_only=True)
    _last: tuple[str, Tensor] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_last": None}

    @property
    def weight_headers(self) -> Mapping[str, Header]:
        return self.stored.weight_headers

    @cached_property
    def by_codes(self) -> dict[str, str]:
        """The weight's name by the name of its codes."""
        return {tensor.codes: name for name, tensor in self.quantised.items()}

    def weight_sources(self, file: str) -> list[tuple[str, str]]:
        """Also of a file that holds nothing but scales."""
        files = [file]
        for name in self.stored.headers[file].tensors:
            if name in self.by_codes:
                files += [self.stored.home[part] for part in self.quantised[self.by_codes[name]].names]
        return [(self.role, each) for each in dict.fromkeys(files)]

    def stored_bytes(self, name: str) -> int:
        tensor = self.quantised.get(name)
        return self.stored.info(name).bytes if tensor is None else sum(self.stored.info(part).bytes for part in tensor.names)

    def made_bytes(self, name: str) -> int:
        tensor = self.quantised.get(name)
        return 0 if tensor is None else 4 * self.info(name).size

    def tensor(self, name: str) -> Tensor:
        """float32 where the weight is quantised; made anew, but kept for the matrices of a stack that are asked for one by one."""
        tensor = self.quantised.get(name)
        if tensor is None:
            return self.stored.tensor(name)
        last = self._last  # once: another thread may put something else there
        if last is not None and last[0] == name:
            return last[1]
        made = tensor.decode(self.stored.tensor)
        self._last = (name, made) if len(tensor.shape) > 2 else None
        return made

    def grid(self, name: str, place: int | None = None) -> Grid | None:
        """The values that a weight (or one matrix of a stack) can have with the scales that it has; None for a plain tensor."""
        tensor = self.quantised.get(name)
        return None if tensor is None else tensor.grid(self.stored.tensor, place)

    def encode(self, name: str, values: Tensor) -> Tensor:
        """What is stored in place of a weight's codes for values on its grid."""
        return self.quantised[name].encode(values, self.stored.tensor)

    def read_from(self, source: FileSource) -> None:
        super().read_from(source)
        self.stored.read_from(source)

    def release(self, file: str) -> None:
        self.stored.release(file)

    def close(self) -> None:
        self._last = None
        self.stored.close()


def as_quantised(checkpoint: Checkpoint) -> Checkpoint:
    """The float32 view of a checkpoint whose quantised form is read; any other checkpoint as it is."""
    # The config of an adapter is that of its base, which is shown as float32 already.
    known = None if isinstance(checkpoint, (AdaptedCheckpoint, QuantisedCheckpoint)) else read_format(checkpoint)
    if known is None:
        return checkpoint
    form, settings = known
    found = form.find(checkpoint, settings)
    problems = found.problems + left_over(checkpoint, found)
    if len(problems) > _MOST_NAMED:
        problems = [*problems[:_MOST_NAMED], f"{checkpoint.role} ({checkpoint.title}): and {len(problems) - _MOST_NAMED} more of these."]
    by_codes = {tensor.codes: tensor for tensor in found.tensors.values()}
    gone = {name for tensor in found.tensors.values() for name in tensor.names} | found.beside
    headers: dict[str, Header] = {}
    home: dict[str, str] = {}
    for file, header in checkpoint.headers.items():
        entries = []
        for name, info in header.tensors.items():
            if name in by_codes:
                entries.append((by_codes[name].name, "F32", by_codes[name].shape))
            elif name not in gone:
                entries.append((name, info.dtype, info.shape))
        names = [name for name, _, _ in entries]
        taken = [name for name in names if name in home]
        problems += [
            f"{checkpoint.role} ({checkpoint.title}): tensor {name} is there twice, plain and quantised. Keep one of them." for name in taken
        ]
        if entries and not taken and len(set(names)) == len(names):
            headers[file] = build_header(entries, header.metadata)
            home |= dict.fromkeys(names, file)
    return QuantisedCheckpoint(
        role=checkpoint.role,
        source=checkpoint.source,
        headers=headers,
        home=home,
        index=checkpoint.index,
        pickled=checkpoint.pickled,
        stored=checkpoint,
        quantised=found.tensors,
        beside=frozenset(gone - by_codes.keys()),
        problems=problems,
        description=form.describe(settings),
    )


def quantised_form(checkpoint: Checkpoint) -> QuantisedCheckpoint | None:
    """The quantised checkpoint behind this one: itself, or what an adapter stands on; None for a plain one."""
    if isinstance(checkpoint, AdaptedCheckpoint):
        return quantised_form(checkpoint.base)
    return checkpoint if isinstance(checkpoint, QuantisedCheckpoint) else None


def quantisation_problems(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with a quantised form that is read (`as_quantised`); for others everything that says these weights are quantised, one line:
    edits on them would be meaningless."""
    view = quantised_form(checkpoint)
    if view is not None:
        return view.problems if view is checkpoint else []
    found = signs(checkpoint)
    if not found:
        return []
    known = read_format(checkpoint)
    where = f"{checkpoint.role}: {checkpoint.title} is quantised, which is not supported"
    if known is None:
        return [f"{where}: {'; '.join(found)}. Give the unquantised checkpoint (bfloat16, float16 or float32), harden it, and quantise the result."]
    form, settings = known
    return [
        f"{where} by merge methods ({form.describe(settings)}): {'; '.join(found)}. `lox-merge harden` and `project` read this form. Else give "
        "the unquantised checkpoint (bfloat16, float16 or float32); transformers makes one: from_pretrained with dequantize=True in its "
        "quantization_config, then save_pretrained."
    ]


def quantised_among(checkpoints: Iterable[Checkpoint]) -> list[Checkpoint]:
    """Those that are quantised, or stand on a quantised one."""
    return [checkpoint for checkpoint in checkpoints if quantised_form(checkpoint) is not None]
