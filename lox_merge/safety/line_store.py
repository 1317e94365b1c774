"""JSON lines that are kept while work goes on, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import RequestError
from lox_merge.jobs.atomic import write_error
from lox_merge.jobs.locks import acquire


class LineStore:
    """First line: what the others belong to. Every further line: one finished item, on disk when `append` returns.

    kind: names the format ('replies'); about: hashes of what decides the items, by part: a file made with another value of any part is
    refused, and left as it is. noun: what messages call an item. shown: goes into the first line for people. Opening raises
    RequestError where the file is of another run or not of this kind, WriteError where the disk fails. A last line that was cut short
    by a crash is dropped. Held by one process at a time: another one is refused; the lock beside the file goes with its owner, however
    that ends, and at the latest with this object.
    """

    def __init__(self, path: Path, kind: str, about: Mapping[str, str], noun: str, *, shown: dict[str, Any] | None = None) -> None:
        self.path, self._noun, self._kind = path, noun, kind
        self._header = {"format": f"lox-merge {kind} 1", **about, **(shown or {})}
        self._parts = tuple(about)
        try:
            make_folder(path.parent)
            self._lock = hold(path, kind)
        except OSError as error:
            raise write_error(path, error) from error
        try:
            self.lines = self._open()
        except IsADirectoryError:
            self.close()
            raise RequestError(f"{path} is a folder. Name a file for {kind}.") from None
        except OSError as error:
            self.close()
            raise write_error(path, error) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LineStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process have the file."""
        self._lock.release()

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Keeps these lines; on disk when this returns. Raises WriteError."""
        try:
            self._write(lines, "ab")
        except OSError as error:
            raise write_error(self.path, error) from error

    def damaged(self, number: int) -> RequestError:
        """What is wrong with line `number`, counted from 1."""
        return RequestError(f"{self.path.name}, line {number}, is not {self._noun}. Remove that line, or name another file.")

    def _open(self) -> list[dict[str, Any]]:
        """The finished lines without the first one."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        lines = [self._parse(line, number) for number, line in enumerate(whole.split(b"\n")[:-1], 1)]
        if not lines:
            # A file without a whole first line is new, or its first write was cut short: anything else is somebody's data.
            if data and not _encode(self._header).startswith(data):
                raise self._foreign()
            self._write([self._header], "wb")
            return []
        if lines[0].get("format") != self._header["format"]:
            raise self._foreign()
        if differs := self._differences(lines[0]):
            raise RequestError(
                f"{self.path.name} holds {self._kind} of another run (different: {', '.join(differs)}). Name another file, or remove this one "
                "to start anew."
            )
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return lines[1:]

    def _differences(self, header: dict[str, Any]) -> list[str]:
        """What of another file's first line is not as here, in the words of a message."""
        return [part for part in self._parts if header.get(part) != self._header[part]]

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = parse_json(line)
        except ValueError:
            raise self.damaged(number) from None
        if not isinstance(value, dict):
            raise self.damaged(number)
        return value

    def _foreign(self) -> RequestError:
        return RequestError(f"{self.path.name} is not a store of {self._kind}. Name another file; this one was left as it is.")

    def _write(self, lines: Sequence[dict[str, Any]], mode: str) -> None:
        with self.path.open(mode) as file:
            file.write(b"".join(_encode(line) for line in lines))
            file.flush()
            os.fsync(file.fileno())


def hold(path: Path, kind: str) -> FileLock:
    """The lock of a file, beside it, taken for this process; it goes with its owner, however that ends. Raises RequestError where another has it."""
    lock = FileLock(path.parent / f".{path.name}.lock", thread_local=False)
    try:
        acquire(lock, timeout=0)
    except Timeout:
        raise RequestError(f"another process is writing {path.name}. Wait for it, or name another file or folder for {kind}.") from None
    return lock


def make_folder(folder: Path) -> None:
    """Raises RequestError where a file is in the way."""
    blocking = next((place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()), None)
    if blocking is not None:
        raise RequestError(f"{blocking} is a file; name a folder.")
    folder.mkdir(parents=True, exist_ok=True)


def _encode(line: dict[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=True, allow_nan=False) + "\n").encode()


def digest(value: Any) -> str:
    """sha256 of a plain JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
