"""Shared by all tests: shape checks on the maths, quiet torch, and the command line as a subprocess."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from jaxtyping import install_import_hook

# Shapes written in the annotations of the maths are checked at every call in the tests.
install_import_hook("lox_merge.maths", "shape_checks.checked")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("COLUMNS", "80")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
from forked_cli import StartedCli, run_forked, start_forked, stop_forking  # noqa: E402

# A shell starts background jobs with Ctrl-C ignored, and what a process ignores its children ignore too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The process that hands the tests out loads these too, and waits for nothing that takes seconds to import: fixtures import it.
pytest_plugins = [
    "attack_fixtures",
    "card_fixtures",
    "hostile_fixtures",
    "hub_fixtures",
    "lab_fixtures",
    "mergekit_fixtures",
    "project_fixtures",
    "push_fixtures",
    "report_fixtures",
]

# The longest files of tests, begun first: one of them left to the end would keep one worker busy alone.
LONG = (
    "demo",
    "resume",
    "robustness",
    "loading",
    "faults",
    "executors",
    "notebook",
    "foreign_code",
    "decompose",
    "tune",
    "lm_eval",
    "ray",
    "ray_hub",
    "quantised_harden",
    "search",
    "asr",
    "wrong_input",
    "inspect_task",
    "mergekit",
)


def pytest_collection_finish() -> None:
    """One thread. What the imports have made stays; looking through all of it for cycles again and again took a tenth of the time."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    stop_forking()


RunCli = Callable[..., subprocess.CompletedProcess[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def run_cli(*arguments: object, cwd: Path | None = None, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """`lox-merge` with these arguments in a process of its own; environment holds extra variables."""
    return run_forked(arguments, {**os.environ, "OMP_NUM_THREADS": "1", **environment}, cwd=cwd, timeout=timeout)


def run_program(program: str, *arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, which has imported the package already."""
    return run_forked(arguments, {**os.environ, "OMP_NUM_THREADS": "1"}, program=program, timeout=timeout)


def start_cli(*arguments: object) -> StartedCli:
    """The command, going on: for tests that kill it."""
    return start_forked(arguments, {**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(name="run_cli")
def run_cli_fixture() -> RunCli:
    return run_cli
