"""`lox-merge` in a process forked from this one, which has imported torch already: killed at a moment, or with a fault installed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Fault = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """code: exit status, negative for a signal. seconds: from the fork to the end."""

    code: int
    stderr: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def has_message(self) -> bool:
        """Ended with an error for people: one of the program's two codes, a message, no traceback."""
        return self.code in (1, 2) and "error: " in self.stderr and "Traceback" not in self.stderr


class Running:
    """One forked run. fault: called in the child before the command begins."""

    def __init__(self, arguments: list[str], log: Path, fault: Fault | None = None) -> None:
        self._log = log
        self._began = time.perf_counter()
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self._child = os.fork()
        if self._child == 0:
            self._work(arguments, fault)

    def _work(self, arguments: list[str], fault: Fault | None) -> None:
        code: Any = 1
        try:
            descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for number in (1, 2):
                os.dup2(descriptor, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            import torch

            from lox_merge.cli.main import main

            # torch makes its pool of threads anew after a fork, and does not bear two threads that ask for it at once.
            torch.set_num_threads(1)
            if fault:
                fault()
            main(arguments)
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    @property
    def going(self) -> bool:
        return os.waitid(os.P_PID, self._child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def kill(self) -> Ended:
        os.kill(self._child, signal.SIGKILL)
        return self.wait()

    def kill_after(self, seconds: float) -> Ended:
        time.sleep(seconds)
        return self.kill()

    def wait(self) -> Ended:
        _, status = os.waitpid(self._child, 0)
        seconds = time.perf_counter() - self._began
        return Ended(os.waitstatus_to_exitcode(status), self._log.read_text(errors="replace") if self._log.exists() else "", seconds)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Waits for something that the run does. False where it ended without."""
        while self.going:
            if condition():
                return True
            time.sleep(0.0005)
        return condition()
