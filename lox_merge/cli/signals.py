"""Ctrl-C and a scheduler's SIGTERM end a command with KeyboardInterrupt, though not in the middle of an import.

A module that is interrupted there stays half imported, which others take for an error of their own, and what C++ starts of it forgets the
interrupt or ends the process.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_IMPORTING = "<frozen importlib"
# How soon it is looked again whether the import is over.
_SECONDS = 0.02


class _Interrupter:
    """asked: whether an interrupt waits for the end of an import. A second one does not: what is imported may never end.

    top: imports that led to this frame do not count.
    """

    def __init__(self, top: FrameType) -> None:
        self.asked, self._top = False, top

    def signalled(self, number: int, frame: FrameType | None) -> None:
        if self.settle():
            raise KeyboardInterrupt
        self.asked = True
        self.look(number, frame)

    def look(self, number: int, frame: FrameType | None) -> None:
        if self._importing(frame) and hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, self.look)
            signal.setitimer(signal.ITIMER_REAL, _SECONDS)
        else:
            self.asked = False
            raise KeyboardInterrupt

    def settle(self) -> bool:
        """Looks no more. Returns whether an interrupt still waits."""
        if self.asked and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        waits, self.asked = self.asked, False
        return waits

    def _importing(self, frame: FrameType | None) -> bool:
        while frame is not None and frame is not self._top:
            if frame.f_code.co_filename.startswith(_IMPORTING):
                return True
            frame = frame.f_back
        return False


_CURRENT: list[_Interrupter] = []


def between_imports() -> None:
    """A good moment: raises KeyboardInterrupt where an interrupt waits. Imports that follow each other leave none that a clock would find."""
    if any(interrupter.settle() for interrupter in _CURRENT):
        raise KeyboardInterrupt


@contextmanager
def interrupted_between_imports(top: FrameType) -> Iterator[None]:
    """For the work of a command, in the main thread. top: the frame that begins it. A SIGINT that is ignored (as under nohup) stays so.

    Raises KeyboardInterrupt.
    """
    interrupter = _Interrupter(top)
    numbers = [signal.SIGTERM] + [signal.SIGINT] * (signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    before = {number: signal.signal(number, interrupter.signalled) for number in numbers}
    _CURRENT.append(interrupter)
    try:
        yield
        between_imports()
    finally:
        interrupter.settle()
        _CURRENT.remove(interrupter)
        for number, handler in before.items():
            signal.signal(number, handler)
