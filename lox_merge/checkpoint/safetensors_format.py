"""Headers of safetensors files: read, checked, and built.

The `safetensors` library maps tensors, but hands out neither the header's bytes nor offsets, and output that mirrors a
shard byte for byte needs both. Format: 8 bytes little-endian header length, JSON header, tensor data.
https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from weakref import WeakValueDictionary

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import CheckpointFormatError

LARGEST_HEADER = 100_000_000  # the safetensors library's own limit
_PREFIX = 8
# What torch can count and iterate over; a side of 0 hides any other side from the check against the file's bytes.
_LARGEST_SIZE, _MOST_DIMENSIONS = 2**63, 64
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BY_OFFSET = attrgetter("begin", "end")
# Headers in use, by their bytes and the file's size. Base and aligned were mostly saved by one library in one layout: half of them are the same.
_SOUND: WeakValueDictionary[tuple[bytes, int], Header] = WeakValueDictionary()


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its dtype as a safetensors code, its shape, and its byte range within the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.begin

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def describe(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Header:
    """The parsed header of one file. `raw` is the prefix and the JSON as stored; `tensors` is in the header's order."""

    raw: bytes
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    file_size: int

    def by_offset(self) -> list[TensorInfo]:
        return sorted(self.tensors.values(), key=_BY_OFFSET)


def header_length(prefix: bytes, file_size: int, where: str) -> int:
    """Bytes of prefix plus JSON, from the file's first 8 bytes."""
    if len(prefix) < _PREFIX:
        raise CheckpointFormatError(f"{where} is {file_size} bytes long: too short for a safetensors file. Download or save it again.")
    length = int(struct.unpack("<Q", prefix[:_PREFIX])[0])
    if length > LARGEST_HEADER or _PREFIX + length > file_size:
        raise CheckpointFormatError(
            f"{where} is damaged or not a safetensors file: its header claims {length:,} bytes and the file has {file_size:,}. "
            "Download or save it again."
        )
    return _PREFIX + length


def read_header(path: Path, where: str) -> Header:
    """Header of the file at `path`; `where` names it in messages. Raises CheckpointFormatError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_PREFIX)
            raw = prefix + file.read(header_length(prefix, size, where) - _PREFIX)
    except OSError as error:
        raise CheckpointFormatError(f"{where} cannot be read: {error.strerror}.") from error
    return parse_header(raw, size, where)


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Header from its bytes (prefix and JSON). Checks dtypes, shapes, offsets and that the file holds all of them."""
    found = _SOUND.get((raw, file_size))
    if found is None:
        found = _SOUND[raw, file_size] = _parse(raw, file_size, where)
    return found


def _parse(raw: bytes, file_size: int, where: str) -> Header:

    def damaged(reason: str) -> CheckpointFormatError:
        return CheckpointFormatError(f"{where} is damaged: {reason}. Download or save it again.")

    try:
        parsed = parse_json(raw[_PREFIX:], unique=True)
    except ValueError as error:
        raise damaged(f"its header is not sound JSON ({error})") from None
    if not isinstance(parsed, dict):
        raise damaged("its header is not a JSON object")
    metadata = parsed.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged("its metadata is not a table of texts")
    tensors: dict[str, TensorInfo] = {}
    start = len(raw)
    # Models of 100,000 tensors exist: what is done for each of them here decides how long a plan takes.
    for name, entry in parsed.items():
        try:
            code, sides, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            shape = tuple(sides)
            valid = type(code) is str and _whole(begin) and _whole(end) and all(map(_whole, shape))
        except (KeyError, TypeError, ValueError):
            valid = False
        if not valid:
            raise damaged(f"the header entry of tensor {name!r} is not understood")
        if not name.isprintable() and _CONTROL.search(name):
            raise damaged(f"the tensor name {name!r} holds control characters")
        size = math.prod(shape)
        if len(shape) > _MOST_DIMENSIONS or (size or math.prod(filter(None, shape))) >= _LARGEST_SIZE:
            raise damaged(f"tensor {name!r} has a shape that no tensor can have")
        if not dtypes.known(code):
            raise damaged(f"tensor {name!r} has the unknown dtype {code!r}")
        if end - begin != (size * dtypes.bits(code) + 7) // 8:
            raise damaged(f"tensor {name!r} ({code} {list(shape)}) does not fit its {end - begin:,} bytes")
        tensors[name] = TensorInfo(name, code, shape, start + begin, start + end)
    end = len(raw)
    for info in sorted(tensors.values(), key=_BY_OFFSET):
        if info.begin != end:
            raise damaged(f"tensor {info.name!r} {'overlaps another one' if info.begin < end else 'lies behind a hole'}")
        end = info.end
    if end > file_size:
        raise damaged(f"it is truncated: its tensors end at byte {end:,} and the file has {file_size:,}")
    if end < file_size:
        raise damaged(f"{file_size - end:,} bytes follow its last tensor")
    return Header(raw, metadata, tensors, file_size)


def _whole(value: object) -> bool:
    """A whole number ≥ 0. Booleans are whole numbers to Python."""
    return type(value) is int and value >= 0


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str], where: str = "the new shard") -> Header:
    """Header for (name, dtype code, shape) in this order, data without gaps, JSON padded to 8 bytes as the library does.

    where: names the file in the CheckpointFormatError for names and shapes that no header can hold.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, code, shape in tensors:
        size = math.prod(shape) * dtypes.bits(code) // 8
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    raw = struct.pack("<Q", len(text)) + text
    return parse_header(raw, len(raw) + offset, where)
