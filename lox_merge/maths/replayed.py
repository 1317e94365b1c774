"""Work on fixed memory that a GPU is told once and repeats on one order: CUDA graphs."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from lox_merge.errors import LoxMergeWarning

# While one thread records, no other may give cached memory back, and recordings take turns.
_RECORDING = threading.Lock()


def no_recording() -> AbstractContextManager[Any]:
    """For what torch refuses while anything is recorded. Not for use within recorded work."""
    return _RECORDING


class Replayed:
    """A sequence of operations on memory that stays where it is, the same whenever it is called, with no look at what they give.

    Starting thirty small kernels one by one takes a host longer than a GPU needs for them; so the second call records them, and later ones
    replay what was recorded. The first call has made ready by then what may not be made while recording. All calls are on one stream, not
    the default one: recorded products use the work space of that stream, and CUDA does not record the default one. On a CPU it is a call,
    and so it is, with a warning, where recording does not work.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work, self._recordable = work, device.type == "cuda"
        self._graph: Any = None
        self._ready = False

    def __call__(self) -> None:
        if self._graph is None and self._ready and self._recordable:
            self._graph = self._recorded()
        if self._graph is not None:
            self._graph.replay()
            return
        self._work()
        self._ready = True

    def _recorded(self) -> Any:
        """The graph, or None where there is none to be had."""
        graph = torch.cuda.CUDAGraph()
        try:
            with _RECORDING:
                # Other threads go on allocating and waiting meanwhile.
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._work()
                except BaseException:
                    with contextlib.suppress(Exception):
                        graph.capture_end()
                    raise
                graph.capture_end()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Nothing of it was done yet: what is recorded is not run.
            self._recordable = False
            warnings.warn(
                f"steps of SVDs cannot be recorded ({str(error).splitlines()[0]}); they are started one by one, which takes longer",
                LoxMergeWarning,
                stacklevel=3,
            )
            return None
        return graph
