"""Work on fixed memory that a GPU is told once and repeats on one order: CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch


class Replayed:
    """A sequence of operations on memory that stays where it is, the same whenever it is called, with no look at what they give.

    Starting thirty small kernels one by one takes a host longer than a GPU needs for them; so the second call records them, and later ones
    replay what was recorded. The first call has made ready by then what may not be made while recording. All calls are on one stream, not
    the default one: recorded products use the work space of that stream, and CUDA does not record the default one. On a CPU it is a call.
    """

    def __init__(self, work: Callable[[], None], device: torch.device) -> None:
        self._work, self._recordable = work, device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._ready = False

    def __call__(self) -> None:
        if self._graph is None and self._ready and self._recordable:
            self._graph = self._recorded()
        if self._graph is not None:
            self._graph.replay()
            return
        self._work()
        self._ready = True

    def _recorded(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # Other threads go on allocating and waiting meanwhile.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            self._work()
        except BaseException:
            self._recordable = False
            with contextlib.suppress(Exception):
                graph.capture_end()
            raise
        graph.capture_end()
        return graph
