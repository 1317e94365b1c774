"""Replies kept in a JSONL file while they come in, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from filelock import FileLock, Timeout

from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import RequestError
from lox_merge.jobs.atomic import write_error
from lox_merge.safety.types import PromptSet, Reply

_FORMAT = "lox-merge replies 1"


class ReplyStore:
    """First line: of which model, prompts and decoding the replies are. Every further line: one finished reply.

    Held by one process at a time; the lock beside the file goes with its owner, however that ends. Opening raises RequestError where
    another one holds it, or the file is of other replies or not of this kind. A last line that was cut short by a
    crash is dropped. Prompts are kept by identity only: their texts are in the user's own file.
    """

    def __init__(self, path: Path, model: dict[str, Any], prompts: PromptSet) -> None:
        self.path = path
        self._model = model
        self._texts = {prompt.identity: prompt.text for prompt in prompts.prompts}
        self._header = {"format": _FORMAT, "model": _digest(model), "prompts": prompts.sha256, "n": len(prompts), "about": model}
        self._replies: dict[str, Reply] = {}
        self._lock = FileLock(path.parent / f".{path.name}.lock", timeout=0, thread_local=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._open()
        except Timeout:
            raise RequestError(f"another process is writing {path.name}. Wait for it, or name another file or folder for replies.") from None
        except OSError as error:
            raise write_error(path, error) from error

    def __enter__(self) -> ReplyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def finished(self) -> dict[str, Reply]:
        """Replies by the identity of their prompt."""
        return dict(self._replies)

    def append(self, replies: Sequence[tuple[str, Reply]]) -> None:
        """Keeps (identity, reply) pairs; on disk when this returns. Raises WriteError."""
        lines = [{"id": name, "text": reply.text, "finished": reply.finished, "tokens": reply.tokens} for name, reply in replies]
        try:
            self._write(lines, "ab")
        except OSError as error:
            raise write_error(self.path, error) from error
        self._replies.update(replies)

    def _open(self) -> None:
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        lines = [self._parse(line, number) for number, line in enumerate(whole.split(b"\n")[:-1], 1)]
        if not lines:
            # A file without a whole first line is new, or its first write was cut short: anything else is somebody's data.
            if data and not _encode(self._header).startswith(data):
                raise RequestError(f"{self.path.name} is not a store of replies. Name another file; this one was left as it is.")
            self._write([self._header], "wb")
            return
        self._check_header(lines[0])
        for number, line in enumerate(lines[1:], 2):
            name = line.get("id")
            text, finished, tokens = line.get("text"), line.get("finished"), line.get("tokens")
            if (
                not isinstance(name, str)
                or name not in self._texts
                or not isinstance(text, str)
                or not isinstance(finished, bool)
                or not isinstance(tokens, (int, NoneType))
            ):
                raise self._damaged(number)
            self._replies[name] = Reply(self._texts[name], text, finished, tokens)
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))

    def _check_header(self, header: dict[str, Any]) -> None:
        if header.get("format") != _FORMAT:
            raise RequestError(f"{self.path.name} is not a store of replies. Name another file; this one was left as it is.")
        differs = [what for what in ("model", "prompts") if header.get(what) != self._header[what]]
        if differs:
            about = header.get("about")
            settings = (
                [key for key, value in self._model.items() if not isinstance(about, dict) or about.get(key) != value] if "model" in differs else []
            )
            what = [*settings, *(["prompts"] if "prompts" in differs else [])]
            raise RequestError(
                f"{self.path.name} holds replies of another run (different: {', '.join(what)}). Name another file, or remove this one to start anew."
            )

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            value = parse_json(line)
        except ValueError:
            raise self._damaged(number) from None
        if not isinstance(value, dict):
            raise self._damaged(number)
        return value

    def _damaged(self, number: int) -> RequestError:
        return RequestError(f"{self.path.name}, line {number}, is not a reply to one of these prompts. Remove that line, or name another file.")

    def _write(self, lines: Sequence[dict[str, Any]], mode: str) -> None:
        with self.path.open(mode) as file:
            file.write(b"".join(_encode(line) for line in lines))
            file.flush()
            os.fsync(file.fileno())


def _encode(line: dict[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
