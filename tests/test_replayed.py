"""When work is recorded and replayed, with a recorder in the place of CUDA's (that bits stay the same is seen on a GPU: benchmarks/gpu.py)."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from lox_merge.errors import LoxMergeWarning
from lox_merge.maths.replayed import Replayed, no_recording

CUDA = torch.device("cuda", 0)


class Graph:
    """Counts; what is recorded is not run. broken: what fails, if something does."""

    broken: tuple[str, Exception] | None = None
    replays = 0
    recording = False

    def _do(self, name: str) -> None:
        if Graph.broken is not None and Graph.broken[0] == name:
            raise Graph.broken[1]

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"  # other threads go on
        self._do("begin")
        Graph.recording = True

    def capture_end(self) -> None:
        Graph.recording = False
        self._do("end")

    def replay(self) -> None:
        Graph.replays += 1


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    Graph.broken, Graph.replays, Graph.recording = None, 0, False


def calls(device: torch.device, count: int, fails: Exception | None = None) -> list[bool]:
    """Whether each call of the work was recorded."""
    seen: list[bool] = []

    def work() -> None:
        seen.append(Graph.recording)
        if fails is not None and Graph.recording:
            raise fails

    replayed = Replayed(work, device)
    for _ in range(count):
        replayed()
    return seen


def test_the_second_call_is_recorded_and_replayed_from_then_on() -> None:
    assert calls(CUDA, 5) == [False, True]
    assert Graph.replays == 4


def test_nobody_gives_memory_back_while_work_is_recorded() -> None:
    """torch fails an assertion where it is asked to let go of cached memory meanwhile."""
    seen: list[bool] = []

    def look() -> None:
        # As another thread that has run out of memory would.
        other = threading.Thread(target=lambda: seen.append(no_recording().acquire(blocking=False)))  # type: ignore[attr-defined]
        other.start()
        other.join()

    replayed = Replayed(look, CUDA)
    replayed()
    no_recording().release()  # type: ignore[attr-defined]
    replayed()
    assert seen == [True, False]
    with no_recording():
        pass


def test_on_a_cpu_it_is_a_call() -> None:
    assert calls(torch.device("cpu"), 3) == [False] * 3
    assert Graph.replays == 0


@pytest.mark.parametrize("where", ["begin", "work", "end"])
def test_what_cannot_be_recorded_is_done_all_the_same_and_said(where: str) -> None:
    error = RuntimeError("operation not permitted when stream is capturing\nmore")
    Graph.broken = (where, error)
    expected: dict[str, Any] = {"begin": [False] * 4, "work": [False, True, False, False, False], "end": [False, True, False, False, False]}
    with pytest.warns(LoxMergeWarning, match=r"cannot be recorded \(operation not permitted when stream is capturing\)") as heard:
        assert calls(CUDA, 4, error if where == "work" else None) == expected[where]
    assert len(heard) == 1 and Graph.replays == 0 and not Graph.recording


def test_memory_that_runs_out_is_for_the_caller() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        calls(CUDA, 2, torch.OutOfMemoryError("CUDA out of memory"))
    assert not Graph.recording
