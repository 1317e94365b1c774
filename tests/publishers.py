"""A user who publishes to a loopback Hub: `lox-merge` in a process of its own for every command.

The processes are forked from one that has imported torch and the Hub's client already, which saves each of them two seconds.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_clients import LoopbackHub

# Waits of a second and more pass fifty times as fast; how long they were to be is written down.
_NURSERY = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
import huggingface_hub, huggingface_hub.hf_api, huggingface_hub.repocard, huggingface_hub.constants as constants
import jinja2, yaml
import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
import lox_merge.cli.main, lox_merge.cli.push, lox_merge.cli.card, lox_merge.cli.show_push, lox_merge.publish.push, lox_merge.publish.card

really_sleep = time.sleep

def work(order):
    out = os.open(order["files"] + "/stdout", os.O_WRONLY | os.O_CREAT)
    err = os.open(order["files"] + "/stderr", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1), os.dup2(err, 2)
    os.chdir(order["cwd"])
    os.environ.update(order["environment"])
    if order["token"] is not None:
        os.environ["HF_TOKEN"] = order["token"]
    constants.HF_HUB_DISABLE_XET = not order["xet"]
    waits = []
    def sleep(seconds):
        if seconds >= 0.5:
            waits.append(seconds)
        really_sleep(seconds / 50)
    time.sleep = sleep
    code = 0
    try:
        lox_merge.cli.main.main(order["arguments"])
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 99
    sys.stdout.flush(), sys.stderr.flush()
    with open(order["files"] + "/waits", "w") as file:
        json.dump(waits, file)
    os._exit(code)

for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        work(order)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """A finished command. waits: seconds that it meant to wait, each of half a second or more."""

    returncode: int
    stdout: str
    stderr: str
    waits: list[float]

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


class Publisher:
    """Runs `lox-merge` against one Hub. Close it, or use it in a `with` statement. ready: modules to import once, for all commands."""

    def __init__(self, hub: LoopbackHub, home: Path, ready: Sequence[str] = ()) -> None:
        self.hub, self.home = hub, home
        environment = hub.environment(home, xet=True)
        self._nursery = subprocess.Popen(
            [sys.executable, "-c", _NURSERY, *ready], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, *details: object) -> None:
        assert self._nursery.stdin and self._nursery.stdout
        self._nursery.stdin.close()
        self._nursery.wait(timeout=20)
        self._nursery.stdout.close()

    def start(self, *arguments: object, token: str | None = "owner-token", cwd: Path | None = None, xet: bool = False, **environment: str) -> int:
        """Starts a command and returns its process id; `finish` waits for it."""
        assert self._nursery.stdin and self._nursery.stdout
        self._files = Path(tempfile.mkdtemp())
        order = {"arguments": [*map(str, arguments)], "files": str(self._files), "cwd": str(cwd or self._files), "token": token, "xet": xet}
        self._nursery.stdin.write(json.dumps({**order, "environment": environment}) + "\n")
        self._nursery.stdin.flush()
        return int(self._nursery.stdout.readline())

    def finish(self) -> Done:
        """The command that was started, when it has ended."""
        assert self._nursery.stdout
        code = int(self._nursery.stdout.readline())
        written = dict.fromkeys(("stdout", "stderr", "waits"), "")
        for name in written:
            with contextlib.suppress(FileNotFoundError):
                written[name] = (self._files / name).read_text()
        shutil.rmtree(self._files)
        return Done(code, written["stdout"], written["stderr"], json.loads(written["waits"] or "[]"))

    def run(self, *arguments: object, **settings: Any) -> Done:
        self.start(*arguments, **settings)
        return self.finish()

    def push(self, out: Path, repo: str, *arguments: object, **settings: Any) -> Done:
        return self.run("push", out, repo, "--license", "apache-2.0", *arguments, **settings)
