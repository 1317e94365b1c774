"""One model whose weights are changed in memory, as a source of replies at each of its states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lox_merge.safety.generation import LocalModel
from lox_merge.safety.types import PromptSet, Reply


class EditedSource:
    """A model in one state (None: aligned itself): its replies, with a name, an identity and a file of replies of its own.

    folder: where replies are kept while they come in, so that an interrupted run goes on; None keeps none. state: in words, such as
    'rank 3'; about: what the identity records of it.
    """

    def __init__(self, source: LocalModel, folder: Path | None = None, state: str | None = None, about: Mapping[str, Any] | None = None) -> None:
        self._source, self._state, self._about = source, state, dict(about or {})
        self._store = None if folder is None else folder / f"{(state or 'aligned').replace(',', '').replace(' ', '-')}.jsonl"

    @property
    def title(self) -> str:
        return self._source.title if self._state is None else f"{self._source.title} ({self._state})"

    def identity(self) -> dict[str, Any]:
        return self._source.identity() | self._about

    def replies(self, prompts: PromptSet) -> list[Reply]:
        with self._source.storing(self._store):
            return self._source.replies(prompts)
