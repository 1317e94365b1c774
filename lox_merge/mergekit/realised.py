"""What merge kernels say and ask beside the tensor that they return: realised updates, and the model's configuration."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from lox_merge.maths.edits import Realised

# mergekit takes a tensor from a method and nothing else; figures leave by this way, from whatever thread it runs in.
_LISTENERS: list[list[tuple[str, Realised]]] = []


@contextmanager
def realised_updates() -> Iterator[list[tuple[str, Realised]]]:
    """Collects (tensor name, what of the edit survived rounding) of every matrix that is edited inside the `with` block."""
    records: list[tuple[str, Realised]] = []
    _LISTENERS.append(records)
    try:
        yield records
    finally:
        _LISTENERS.remove(records)


def report_realised(updates: list[tuple[str, Realised]]) -> None:
    for records in _LISTENERS:
        records.extend(updates)


def model_config(model: Hashable) -> dict[str, Any]:
    """config.json of the model that a tensor came from: the layout of stacked experts follows from it. Empty in memory."""
    if not isinstance(model, ModelReference):
        return {}
    folder = Path(LoaderCache().get(model).index.base_path)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config
