"""Nothing of the machine or its user goes out: folders of this machine and access tokens are looked for before anything is published."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from lox_merge.checkpoint.safetensors_format import header_length
from lox_merge.errors import CheckpointFormatError, RequestError
from lox_merge.publish.tokens import LONGEST, tokens_by_prefix, tokens_in_use

# A vocabulary holds any string whatever, those of paths and plain words included; nobody's settings are in it.
_VOCABULARIES = {
    *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "encoder.json", "vocab.bpe", "tekken.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm", "model.safetensors.index.json"),
}
_VOCABULARY_SUFFIXES = (".tiktoken", ".vocab", ".tokenizer.model", "tokenizer.model.v3")
_BLOCK = 2**22
# The longest path that a system takes; every token is shorter. At the very ends of a block nothing can be told from what is around it.
_OVERLAP = 4096 + LONGEST
_EDGE = 32
_PREFIX = 8
# An absolute path of two parts or more; whether it is one of this machine is then looked up. The slash first: it is what is searched for.
_PATHS = re.compile(rb"/(?<![\w:/.<~]/)(?:[^\x00-\x20/\"'`<>|:,;()\[\]{}\\\x7f]+/)+[^\x00-\x20/\"'`<>|:,;()\[\]{}\\\x7f]+")
_EVERYWHERE = ("usr", "bin", "sbin", "etc", "dev", "proc", "sys", "lib", "lib64")


class _Search:
    """What is looked for. vocabulary: only tokens of issuers. folders: those that count, also where what is in them is gone."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.tokens = tokens_in_use()
        # A folder such as /data is on many machines and tells nothing.
        places = sorted({str(folder) for folder in (*folders, *_own_folders()) if len(folder.parts) > 2}, key=len, reverse=True)
        self.places = {place: re.compile(re.escape(os.fsencode(place)) + rb"(?=[/\\\s\"'`,:;)\]}<>&|\x00]|\Z)") for place in places}
        self._known: dict[bytes, bool] = {}

    def found(self, data: bytes, *, vocabulary: bool) -> Iterator[tuple[int, str]]:
        """(position, what it is in words), in no order."""
        for position, name in tokens_by_prefix(data):
            yield position, f"holds {name}"
        if vocabulary:
            return
        for secret, name in self.tokens.items():
            position = data.find(secret)
            if position >= 0:
                yield position, f"holds {name}"
        for place, pattern in self.places.items():
            match = pattern.search(data)
            if match:
                yield match.start(), f"names a path of this machine ({place})"
        for match in _PATHS.finditer(data):
            if self._is_here(match.group()):
                yield match.start(), f"names a path of this machine ({os.fsdecode(match.group())})"

    def _is_here(self, path: bytes) -> bool:
        """It exists on this machine and not on every one."""
        if path not in self._known:
            self._known[path] = False
            with suppress(OSError, ValueError):
                self._known[path] = os.fsdecode(path).split("/")[1] not in _EVERYWHERE and Path(os.fsdecode(path)).exists()
        return self._known[path]


def check_text(text: str, where: str, folders: Iterable[Path] = (), *, remedy: str) -> None:
    """Raises RequestError where `text` holds an access token, or a path that is one of this machine's.

    folders: further ones that count, beside home and working folder, also where what is in them is gone. The message names the line
    and the path, never a secret.
    """
    _check(iter([(text.encode("utf-8", errors="surrogateescape"), True)]), where, _Search(folders), remedy=remedy)


def check_files(files: Mapping[str, bytes | Path], folder: Path) -> None:
    """`check_text` on everything that is about to be published but tensors: whole files, and the headers of weights. folder: the output.

    In vocabularies only tokens of issuers are looked for. What is packed or encrypted is not looked into.
    """
    search = _Search([folder.resolve(), folder.resolve().parent])
    for name, content in files.items():
        path = PurePosixPath(name)
        remedy = "Correct it in the model that it was copied from, and harden again." if name != "README.md" else "Correct it, or write it anew."
        vocabulary = path.name in _VOCABULARIES or path.name.endswith(_VOCABULARY_SUFFIXES)
        if isinstance(content, bytes):
            _check(iter([(content, True)]), name, search, remedy=remedy, vocabulary=vocabulary)
            continue
        with content.open("rb") as file:
            _check(_blocks(file, _end(file, path)), name, search, remedy=remedy, vocabulary=vocabulary)


def _check(blocks: Iterator[tuple[bytes, bool]], where: str, search: _Search, *, remedy: str, vocabulary: bool = False) -> None:
    """blocks: each begins with the end of the one before; True with the last."""
    line, first = 1, 0
    for data, last in blocks:
        ranges = [(data, len(data) if last else len(data) - _OVERLAP + _EDGE)]
        if b"\0" in data:  # text in UTF-16 has one beside every letter
            bare = data.replace(b"\0", b"")
            ranges.append((bare, len(bare)))
        for text, end in ranges:
            found = [(position, reason) for position, reason in search.found(text, vocabulary=vocabulary) if first <= position < end]
            if found:
                position, reason = min(found)
                number = line + text.count(b"\n", 0, position)
                raise RequestError(f"{where}, line {number}, {reason}. Nothing was published. {remedy}")
        line += data.count(b"\n", 0, max(0, len(data) - _OVERLAP))
        first = _EDGE


def _blocks(file: BinaryIO, length: int | None) -> Iterator[tuple[bytes, bool]]:
    """The file from its beginning, `length` bytes of it or all, in pieces that overlap: what lies across an end is whole in the next."""
    held, left = b"", length
    while True:
        more = file.read(_BLOCK if left is None else min(_BLOCK, left))
        left = None if left is None else left - len(more)
        last = len(more) < _BLOCK or left == 0
        yield held + more, last
        if last:
            return
        held = (held + more)[-_OVERLAP:]


def _end(file: BinaryIO, path: PurePosixPath) -> int | None:
    """Where a file of weights has its tensors, which are numbers; None for any other file."""
    if path.suffix != ".safetensors":
        return None
    try:
        return header_length(file.read(_PREFIX), os.fstat(file.fileno()).st_size, str(path))
    except CheckpointFormatError:
        return None
    finally:
        file.seek(0)


def _own_folders() -> list[Path]:
    found = [Path.cwd()]
    with suppress(RuntimeError):  # a user without a home folder
        found.append(Path.home())
    return found
