"""A model in memory, read as a checkpoint of its own parameters: one that was made or trained here has no files."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.dtypes import code_of
from lox_merge.checkpoint.safetensors_format import TensorInfo
from lox_merge.errors import RequestError


class HeldModel:
    """What of `Checkpoint` a landscape asks for. The parameters are copied: the model may be the one that is moved and restored.

    Tied parameters are there once. source: what a result records of where the model came from, None if nothing is known. Raises
    RequestError for weights that are not in memory.
    """

    def __init__(self, role: str, title: str, model: Any, source: dict[str, Any] | None) -> None:
        self.role, self.title = role, title
        self._source = source
        parameters = dict(model.named_parameters())
        if away := [name for name, value in parameters.items() if value.device.type == "meta"]:
            raise RequestError(f"{role}: {away[0]} of {title} is not in memory (it was offloaded). Use a machine that holds the whole model.")
        self._tensors: dict[str, Tensor] = {name: value.detach().clone() for name, value in parameters.items()}

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    @property
    def has_chat_template(self) -> bool:
        return True  # whoever loaded it chose its rendering, which was checked then

    def info(self, name: str) -> TensorInfo:
        values = self._tensors[name]
        return TensorInfo(name, code_of(values.dtype), tuple(values.shape), 0, values.numel() * values.element_size())

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def identity(self) -> dict[str, Any]:
        return {"kind": "memory", "source": self._source}

    def close(self) -> None:
        self._tensors.clear()


Weights = Checkpoint | HeldModel
