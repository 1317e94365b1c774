"""Weight files opened for reading: tensors come mapped from disk, one by one."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.safetensors_format import Header, TensorInfo, build_header
from lox_merge.errors import CheckpointFormatError, LoxMergeWarning, SourceChangedError


class WeightFile(Protocol):
    """An open weight file."""

    header: Header

    def tensor(self, name: str) -> Tensor: ...

    def close(self) -> None: ...


class SafetensorsFile:
    """A safetensors file mapped into memory. Tensors share the mapping (private: nothing written to them reaches the file).

    where: the file, for messages. Raises SourceChangedError where it no longer has this header and length.
    """

    def __init__(self, path: Path, header: Header, where: str) -> None:
        self.header = header
        try:
            with path.open("rb") as file:
                same = os.fstat(file.fileno()).st_size == header.file_size and file.read(len(header.raw)) == header.raw
                # ACCESS_COPY: torch wants a writable buffer; pages stay the kernel's as long as nobody writes.
                self._map = mmap.mmap(file.fileno(), header.file_size, access=mmap.ACCESS_COPY) if same else None
        except OSError as error:
            raise SourceChangedError(f"{where} can no longer be read ({error.strerror}). Restore it and run the same command again.") from error
        if self._map is None:
            raise SourceChangedError(f"{where} is not the file that it was when its header was read. Leave it alone and run the same command again.")

    def tensor(self, name: str) -> Tensor:
        assert self._map is not None
        info = self.header.tensors[name]
        dtype = dtypes.torch_dtype(info.dtype)
        if info.size == 0:
            return torch.empty(info.shape, dtype=dtype)
        if info.begin % dtype.itemsize:  # headers of odd length exist; copy rather than read across alignment
            return torch.frombuffer(bytearray(memoryview(self._map)[info.begin : info.end]), dtype=dtype).view(info.shape)
        return torch.frombuffer(self._map, dtype=dtype, count=info.size, offset=info.begin).view(info.shape)

    def close(self) -> None:
        # Tensors may still share the mapping; it is unmapped when the last of them goes.
        del self._map


class TorchFile:
    """A pytorch_model*.bin, read with weights_only=True (no code runs) and mapped."""

    def __init__(self, path: Path, where: str) -> None:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many types for damaged or unsafe files
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointFormatError(
                f"{where} cannot be loaded with torch.load(weights_only=True, mmap=True): {reason}. "
                "Convert the checkpoint to safetensors (save_pretrained of transformers does) and try again."
            ) from None
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise CheckpointFormatError(f"{where} does not hold a plain dictionary of tensors. Convert the checkpoint to safetensors.")
        for name, value in state.items():
            if problem := _not_plain(name, value):
                raise CheckpointFormatError(f"{where}: tensor {name!a} {problem}, then save the checkpoint again or convert it to safetensors.")
        self._state = state
        entries = [(name, dtypes.code_of(value.dtype), tuple(value.shape)) for name, value in state.items()]
        self.header = build_header(entries, {"format": "pt"}, where)

    def tensor(self, name: str) -> Tensor:
        value: Tensor = self._state[name]
        return value.detach().contiguous()

    def close(self) -> None:
        self._state = {}


def _not_plain(name: object, value: Tensor) -> str | None:
    """Why a safetensors file could not hold this tensor under this name, and what to do; None for one that is written as it is.

    torch.save keeps much that safetensors does not know. It would stop the run at this tensor's turn.
    """
    if not isinstance(name, str):
        return f"has a name of type {type(name).__name__}, not a text: rename it"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "has a name with half a surrogate pair: rename it"
    if name == "__metadata__":
        return "has the name that safetensors keeps for metadata: rename it"
    if value.is_meta:
        return "is on the meta device, without values: load the weights"
    # Sparse ones say so in their layout, and a DTensor or another subclass may be anything.
    if value.layout != torch.strided or value.is_nested or type(value) not in (Tensor, Parameter):
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        return f"is not dense ({type(value).__name__}, {kind}): make it dense (to_dense)"
    if str(value.dtype).removeprefix("torch.") not in dtypes.TORCH_NAMES:
        return f"is of dtype {str(value.dtype).removeprefix('torch.')}, which safetensors lacks: give it another dtype, or leave it out"
    if value.is_conj() or value.is_neg():
        return "is a conjugate or negative view: resolve it (resolve_conj, resolve_neg)"
    return None


def warn_pickle(names: list[str], where: str) -> None:
    warnings.warn(
        f"{where} has no safetensors weights; {', '.join(names[:3])}{' …' if len(names) > 3 else ''} is read with "
        "torch.load(weights_only=True). The output is written as safetensors.",
        LoxMergeWarning,
        stacklevel=3,
    )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


__all__ = ["SafetensorsFile", "TensorInfo", "TorchFile", "WeightFile", "tensor_bytes", "warn_pickle"]
