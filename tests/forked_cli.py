"""`lox-merge`, or a program, in a process of its own for every call, forked from one that has imported torch and transformers already.

A fresh interpreter spends two to five seconds on these imports, which is most of what a call on a toy model takes. What a fresh
interpreter does is tested by itself (tests/test_cli.py).
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_PROGRAM = """
import gc, json, os, sys
import torch
torch.set_num_threads(1)  # no thread has been started when the process forks
import numpy, pydantic, rich.console, rich.progress, rich.table, safetensors.torch, scipy.optimize, scipy.stats, yaml
import huggingface_hub, transformers, transformers.models.llama.modeling_llama
import matplotlib.figure, matplotlib.backends.backend_agg, matplotlib.backends.backend_svg, peft
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList
import importlib, pkgutil
import lox_merge.cli.main
for module in pkgutil.walk_packages(lox_merge.__path__, "lox_merge."):
    if not any(part in module.name for part in ("mergekit", "inspect", "watch")):  # other packages, which most commands do without
        importlib.import_module(module.name)

# A child that looks for cycles among all of this would write to, and so copy, every page of it.
gc.collect()
gc.freeze()

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


def _read_early(environment: dict[str, str]) -> dict[str, str]:
    """Variables that libraries read when they are imported."""
    return {name: value for name, value in environment.items() if name.startswith(("HF_", "HUGGINGFACE", "PYTHON", "TRANSFORMERS", "OMP_"))}


class ForkedCli:
    """The process that forks; started at the first call."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._environment: dict[str, str] = {}

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def fits(self, environment: dict[str, str]) -> bool:
        """Whether a forked process would see these variables: some are read when a library is imported."""
        wanted = _read_early(environment)
        if self._process is not None and wanted != _read_early(self._environment) and wanted == _read_early(dict(os.environ)):
            # Not this call is special: a library that a test imported has set a variable for good (lm_eval sets one of the Hub's).
            self.stop()
        return wanted == _read_early(self._environment if self._process is not None else dict(os.environ))

    def run(
        self, arguments: list[str], cwd: Path | None, environment: dict[str, str], timeout: float, program: str | None = None
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

    def start(self, arguments: list[str], cwd: Path | None, environment: dict[str, str], program: str | None = None) -> StartedCli:
        """One at a time: the next call waits for the one before."""
        if self._process is None or self._process.poll() is not None:
            self._environment = environment
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        files = tempfile.TemporaryDirectory()
        order: dict[str, Any] = {"arguments": arguments, "cwd": str(cwd or Path.cwd()), "environment": environment, "files": files.name}
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
