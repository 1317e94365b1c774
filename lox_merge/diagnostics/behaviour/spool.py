"""One model's log-probabilities on disk, for as long as the other models are compared with them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from lox_merge.errors import RequestError

_ITEM = 4
# What the file system itself needs, and other programs write meanwhile.
_MARGIN = 1.05


class Spool:
    """Tensors (rows[i], width) float32 by number, in a file without a name: it is gone with this object, also after Ctrl-C or a kill.

    Raises RequestError at once where the disk lacks room.
    """

    def __init__(self, rows: Sequence[int], width: int) -> None:
        self._shapes = [(count, width) for count in rows]
        self._starts = [int(start) for start in numpy.cumsum([0, *(count * width * _ITEM for count in rows)])]
        folder = Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
        if self.bytes * _MARGIN > free:
            raise RequestError(
                f"the base model's log-probabilities take {self.bytes / 1e9:,.1f} GB on disk while the other models are visited one after another, "
                f"and the temporary folder has {free / 1e9:,.1f} GB free. Give fewer texts (--limit), or name a larger folder in TMPDIR."
            )
        self._file = tempfile.TemporaryFile(prefix="lox-merge-")  # noqa: SIM115  # closed by close()

    @property
    def bytes(self) -> int:
        return self._starts[-1]

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, number: int, values: Tensor) -> None:
        self._file.seek(self._starts[number])
        self._file.write(values.contiguous().cpu().numpy().tobytes())

    def read(self, number: int, device: torch.device) -> Tensor:
        self._file.seek(self._starts[number])
        data = bytearray(self._file.read(self._starts[number + 1] - self._starts[number]))
        return torch.frombuffer(data, dtype=torch.float32).view(self._shapes[number]).to(device)
