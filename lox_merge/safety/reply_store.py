"""Replies kept in a JSONL file while they come in, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from lox_merge.safety.line_store import LineStore, digest
from lox_merge.safety.types import PromptSet, Reply


class ReplyStore(LineStore):
    """Replies of one model to one set of prompts under one decoding; opening raises RequestError where the file is of others.

    Prompts are kept by identity only: their texts are in the user's own file.
    """

    def __init__(self, path: Path, model: dict[str, Any], prompts: PromptSet) -> None:
        self._model = model
        about = {"model": digest(model), "prompts": prompts.sha256}
        super().__init__(path, "replies", about, "a reply to one of these prompts", shown={"n": len(prompts), "about": model})
        texts = {prompt.identity: prompt.text for prompt in prompts.prompts}
        self._replies: dict[str, Reply] = {}
        for number, line in enumerate(self.lines, 2):
            name = line.get("id")
            text, finished, tokens = line.get("text"), line.get("finished"), line.get("tokens")
            if (
                not isinstance(name, str)
                or name not in texts
                or not isinstance(text, str)
                or not isinstance(finished, bool)
                or not isinstance(tokens, (int, NoneType))
            ):
                self.close()
                raise self.damaged(number)
            self._replies[name] = Reply(texts[name], text, finished, tokens)

    @property
    def finished(self) -> dict[str, Reply]:
        """Replies by the identity of their prompt."""
        return dict(self._replies)

    def keep(self, replies: Sequence[tuple[str, Reply]]) -> None:
        """Keeps (identity, reply) pairs; on disk when this returns. Raises WriteError."""
        self.append([{"id": name, "text": reply.text, "finished": reply.finished, "tokens": reply.tokens} for name, reply in replies])
        self._replies.update(replies)

    def _differences(self, header: dict[str, Any]) -> list[str]:
        """Settings of the model by name, where it is the model that differs."""
        about, found = header.get("about"), []
        for part in super()._differences(header):
            if part != "model":
                found.append(part)
            else:
                found += [key for key, value in self._model.items() if not isinstance(about, dict) or about.get(key) != value]
        return found
