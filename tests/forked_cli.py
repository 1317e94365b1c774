"""`lox-merge`, or a program, in a process of its own for every call, forked from one that has imported torch already.

A fresh interpreter spends three to seven seconds on its imports, which is most of what a call on a toy model takes. What a fresh
interpreter does is tested by itself (tests/test_cli.py).

Libraries read variables when they are imported. One process has imported all of them, for calls with the variables of the tests;
another has left out those that read where the Hub is, for calls that go to a Hub of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

TESTS = Path(__file__).parent
CLI = [sys.executable, "-m", "lox_merge.cli.main"]

_LOOP = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import preloading
sys.path.pop(0)
getattr(preloading, sys.argv[2])()
sys.argv[1:] = []
import torch
import lox_merge.cli.main

def work(order):
    # torch makes its pool of threads anew after a fork, and does not bear two threads that ask for it at once.
    torch.set_num_threads(1)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(order["files"], name), os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    code = 0
    try:
        if "program" in order:
            sys.argv[1:] = order["arguments"]
            exec(compile(order["program"], "<program>", "exec"), {"__name__": "__main__"})
        else:
            lox_merge.cli.main.main(order["arguments"])
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        work(order)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class ForkedCli:
    """The process that forks; started at the first call. hub: whether it has imported what reads the variables of the Hub."""

    def __init__(self, *, hub: bool) -> None:
        self._imports = "import_all" if hub else "import_without_hub"
        self._early = ("PYTHON", "OMP_", *(("HF_", "HUGGINGFACE", "TRANSFORMERS") if hub else ()))
        self._process: subprocess.Popen[str] | None = None
        self._environment: Mapping[str, str] = {}

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _read_early(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Variables that libraries read when they are imported."""
        return {name: value for name, value in environment.items() if name.startswith(self._early)}

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether a forked process would see these variables: some are read when a library is imported."""
        wanted = self._read_early(environment)
        if self._process is not None and wanted != self._read_early(self._environment) and wanted == self._read_early(os.environ):
            # Not this call is special: a library that a test imported has set a variable for good (lm_eval sets one of the Hub's).
            self.stop()
        return wanted == self._read_early(self._environment if self._process is not None else os.environ)

    def run(
        self, arguments: list[str], cwd: Path | None, environment: Mapping[str, str], timeout: float, program: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """program: Python that is run instead of the command line."""
        started = self.start(arguments, cwd, environment, program)
        late = threading.Event()

        def stop() -> None:
            late.set()
            started.kill()

        timer = threading.Timer(timeout, stop)
        timer.start()
        done = started.finish()
        timer.cancel()
        if late.is_set():
            raise subprocess.TimeoutExpired(arguments, timeout, done.stdout, done.stderr)
        return done

    def start(self, arguments: list[str], cwd: Path | None, environment: Mapping[str, str], program: str | None = None) -> StartedCli:
        """One at a time: the next call waits for the one before."""
        if self._process is None or self._process.poll() is not None:
            self._environment = environment
            self._process = subprocess.Popen(
                [sys.executable, "-c", _LOOP, str(TESTS), self._imports], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        files = tempfile.TemporaryDirectory()
        order: dict[str, Any] = {"arguments": arguments, "cwd": str(cwd or Path.cwd()), "environment": dict(environment), "files": files.name}
        if program is not None:
            order["program"] = program
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return StartedCli(int(self._process.stdout.readline()), arguments, files, self._process.stdout)


@dataclass(frozen=True)
class StartedCli:
    """A call that goes on."""

    pid: int
    arguments: list[str]
    files: tempfile.TemporaryDirectory[str]
    answers: IO[str]

    def poll(self) -> int | None:
        """As of subprocess.Popen, but for the number: None while it runs."""
        return None if Path(f"/proc/{self.pid}").exists() else 0

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def finish(self) -> subprocess.CompletedProcess[str]:
        code = int(self.answers.readline())
        output, errors = (Path(self.files.name, name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
        self.files.cleanup()
        return subprocess.CompletedProcess(self.arguments, code, output, errors)


_FORKED = ForkedCli(hub=True), ForkedCli(hub=False)


def _fitting(environment: Mapping[str, str]) -> ForkedCli | None:
    return next((forked for forked in _FORKED if forked.fits(environment)), None)


def run_forked(
    arguments: Sequence[object], environment: Mapping[str, str], *, program: str | None = None, cwd: Path | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """`lox-merge`, or Python that is given as text, to its end, with these variables and no others.

    In an interpreter of its own where neither process could have been started with the variables.
    """
    texts, forked = list(map(str, arguments)), _fitting(environment)
    if forked is not None:
        return forked.run(texts, cwd, environment, timeout, program)
    command = CLI if program is None else [sys.executable, "-c", program]
    return subprocess.run([*command, *texts], cwd=cwd, env=dict(environment), capture_output=True, text=True, timeout=timeout, check=False)


def start_forked(arguments: Sequence[object], environment: Mapping[str, str]) -> StartedCli:
    """The same, going on: for tests that kill it."""
    forked = _fitting(environment)
    assert forked is not None
    return forked.start(list(map(str, arguments)), None, environment)


def stop_forking() -> None:
    for forked in _FORKED:
        forked.stop()
