"""A checkpoint opened for reading: which tensors it has, where they are, and the files beside the weights."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from lox_merge.checkpoint.collector import no_collection
from lox_merge.checkpoint.files import FileSource, check_file_name, find_source
from lox_merge.checkpoint.json_text import parse_json
from lox_merge.checkpoint.safetensors_format import Header, TensorInfo
from lox_merge.checkpoint.side_files import side_files, unknown_weights
from lox_merge.checkpoint.weights import SafetensorsFile, TorchFile, WeightFile, warn_pickle
from lox_merge.errors import CheckpointFormatError, PlanError, SourceError

SINGLE, SINGLE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@dataclass
class Checkpoint:
    """Tensors by name across all weight files. Headers are read on opening; tensors are mapped when asked for.

    role: 'base', 'aligned', … for messages. headers: weight file name to header, in the order of the files.
    """

    role: str
    source: FileSource
    headers: Mapping[str, Header]
    home: Mapping[str, str]  # tensor name -> weight file
    index: dict[str, Any] | None
    pickled: bool = False
    _open: dict[str, WeightFile] = field(default_factory=dict, repr=False)
    # Threads that edit matrices ask for scales while the one that reads ahead opens and closes files.
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """For another process: it opens the files itself; tensors do not travel."""
        return {key: value for key, value in self.__dict__.items() if key != "_lock"} | {"_open": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    @property
    def title(self) -> str:
        return self.source.title

    @property
    def names(self) -> list[str]:
        return list(self.home)

    def __contains__(self, name: str) -> bool:
        return name in self.home

    def info(self, name: str) -> TensorInfo:
        return self.headers[self.home[name]].tensors[name]

    @property
    def weight_headers(self) -> Mapping[str, Header]:
        """Headers of the files of its own that hold weights."""
        return self.headers

    def weight_sources(self, file: str) -> list[tuple[str, str]]:
        """(role, file) of everything that is read for the tensors of one of `headers`."""
        return [(self.role, file)]

    def stored_bytes(self, name: str) -> int:
        """Bytes that are read for a tensor."""
        return self.info(name).bytes

    def made_bytes(self, name: str) -> int:
        """Bytes of memory that a tensor takes beside mapped files once it is asked for."""
        return 0

    def read_from(self, source: FileSource) -> None:
        """Takes the same files from another place."""
        self.source = source

    @property
    def bytes(self) -> int:
        return sum(header.file_size for header in self.weight_headers.values())

    def json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the checkpoint, None if it is absent. Raises CheckpointFormatError where it is not an object."""
        if name not in self.source.names():
            return None
        try:
            value = parse_json(self.source.path(name).read_bytes())
        except (OSError, ValueError) as error:
            raise CheckpointFormatError(f"{self.role}: {self.title}/{name} cannot be read as JSON: {error}.") from error
        if not isinstance(value, dict):
            raise CheckpointFormatError(f"{self.role}: {self.title}/{name} does not hold a JSON object.")
        return value

    @cached_property
    def config(self) -> dict[str, Any]:
        return self.json("config.json") or {}

    @cached_property
    def ties_embeddings(self) -> bool:
        parts = [self.config, *(value for value in self.config.values() if isinstance(value, dict))]
        return any(part.get("tie_word_embeddings") is True for part in parts)

    @cached_property
    def has_tokenizer(self) -> bool:
        return any(name in self.source.names() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"))

    @cached_property
    def has_chat_template(self) -> bool:
        if "chat_template.jinja" in self.source.names() or "chat_template.json" in self.source.names():
            return True
        return bool((self.json("tokenizer_config.json") or {}).get("chat_template"))

    @property
    def weight_files(self) -> set[str]:
        """Every file of `source` that holds weights, those behind an adapter's own included."""
        return {*self.headers, *self.weight_headers}

    def side_files(self) -> list[str]:
        """Files beside the weights that belong to the model; see checkpoint.side_files."""
        return side_files(self.source.names(), self.weight_files)

    def unknown_weights(self) -> list[str]:
        """Files beside the weights that are taken for more weights, by format and size."""
        return unknown_weights(self.source.names(), self.weight_files)

    def fetch(self, files: list[str]) -> None:
        self.source.fetch(files)

    def tensor(self, name: str) -> Tensor:
        """The tensor as stored, mapped from disk; do not write to it."""
        with self._lock:
            return self.weight_file(self.home[name]).tensor(name)

    def weight_file(self, file: str) -> WeightFile:
        with self._lock:
            if file not in self._open:
                path = self.source.path(file)
                if self.pickled:
                    self._open[file] = TorchFile(path, f"{self.title}/{file}")
                else:
                    self._open[file] = SafetensorsFile(path, self.headers[file], f"{self.role}: {self.title}/{file}")
            return self._open[file]

    def release(self, file: str) -> None:
        """Closes one weight file; it is opened again when a tensor of it is asked for."""
        with self._lock:
            if file in self._open:
                self._open.pop(file).close()

    def close(self) -> None:
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()


def open_checkpoint(text: str | Path | FileSource, role: str, cache_dir: Path | None = None) -> Checkpoint:
    """Opens a local folder or Hub id (or one found before), reading headers only. Raises SourceError, CheckpointFormatError or PlanError."""
    source = find_source(text, role, cache_dir) if isinstance(text, (str, Path)) else text
    files = source.names()
    # The order in which transformers itself looks.
    if SINGLE in files:
        return assemble(role, source, [SINGLE], None)
    if SINGLE_INDEX in files:
        index = _read_index(role, source, SINGLE_INDEX)
        return assemble(role, source, _shards(index), index)
    if PICKLE in files or PICKLE_INDEX in files:
        pickle_index = _read_index(role, source, PICKLE_INDEX) if PICKLE not in files else None
        shards = _shards(pickle_index) if pickle_index else [PICKLE]
        warn_pickle(shards, f"{role}: {source.title}")
        return assemble(role, source, shards, pickle_index, pickled=True)
    raise SourceError(f"{role}: {source.title} has no {SINGLE}, {SINGLE_INDEX} or {PICKLE}. {_what_else(files)}")


def _what_else(files: Mapping[str, int]) -> str:
    if "adapter_config.json" in files:
        return "It is a PEFT adapter, which is no model by itself: here the whole model is needed (merge_and_unload of peft makes it)."
    if any(name.endswith(".gguf") for name in files):
        return "It holds GGUF weights, which are quantised; give the original safetensors checkpoint."
    others = [name for name in files if name.endswith(".safetensors")]
    if others:
        return f"It has {', '.join(others[:3])}, but no index that says which tensors they hold; add {SINGLE_INDEX}."
    return f"It holds {', '.join(list(files)[:5]) or 'no files'}. Give the folder with the model's weights."


def _read_index(role: str, source: FileSource, name: str) -> dict[str, Any]:
    where = f"{role}: {source.title}/{name}"
    try:
        index = parse_json(source.path(name).read_bytes())
        weight_map = index["weight_map"]
        valid = isinstance(weight_map, dict) and bool(weight_map) and all(isinstance(file, str) for file in weight_map.values())
        valid = valid and isinstance(index.get("metadata") or {}, dict)
    except (OSError, ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise CheckpointFormatError(f"{where} is damaged: no weight_map of tensor names to files. Download or save it again.")
    suffix = ".bin" if name == PICKLE_INDEX else ".safetensors"
    for file in _shards(index):
        check_file_name(file, where)
        # A shard of another name may be one of the side files, which are written last: over the edited weights.
        if PurePosixPath(file).suffix != suffix:
            raise CheckpointFormatError(
                f"{where} puts tensors into {file!r}, and weights of such an index are in files that end in {suffix}. "
                "Rename that file and correct the index, or save the checkpoint again."
            )
    return dict(index)


def _shards(index: dict[str, Any]) -> list[str]:
    return sorted(set(index["weight_map"].values()))


@no_collection()
def assemble(role: str, source: FileSource, shards: list[str], index: dict[str, Any] | None, *, pickled: bool = False) -> Checkpoint:
    """Reads all headers and reports everything that is wrong with them at once."""
    problems: list[str] = []
    headers: dict[str, Header] = {}
    home: dict[str, str] = {}
    checkpoint = Checkpoint(role, source, headers, home, index, pickled)
    there = source.names()
    counts = Counter(index["weight_map"].values()) if index else Counter()
    for file in shards:
        if file not in there:
            problems.append(f"{role}: {source.title} lacks the shard {file}, which the index gives {counts[file]} tensor(s). Download it again.")
            continue
        try:
            if pickled:
                source.look_at(file)
            headers[file] = checkpoint.weight_file(file).header if pickled else source.header(file)
        except SourceError as error:
            problems.append(f"{role}: {error}")
            continue
        for name in headers[file].tensors:
            if name in home:
                problems.append(f"{role}: tensor {name} is in both {home[name]} and {file} of {source.title}. Keep one of them.")
            home[name] = file
    for name, file in index["weight_map"].items() if index else ():
        if file in headers and name not in headers[file].tensors:
            problems.append(f"{role}: the index of {source.title} puts tensor {name} in {file}, which does not hold it. Save the checkpoint again.")
    if problems:
        raise PlanError(problems)
    return checkpoint
