"""Signals, streams and folders as shells and schedulers leave them: one line, never a traceback, never a lost interrupt."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_program
from tiny_models import make_pair

COMMAND = [sys.executable, "-m", "lox_merge.cli.main"]

# click begins a new line behind the ^C of a terminal.
INTERRUPTED = "\nerror: interrupted\n"

# What C++ makes of an interrupt while it is imported: it forgets it. The module itself takes a while.
SLOW = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.{sent})
    for _ in range(20):
        time.sleep(0.02)
except BaseException:
    pass
open({done!r}, "w").close()
"""


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM"])
def test_an_import_is_not_interrupted_and_the_interrupt_not_lost(sent: str, tmp_path: Path) -> None:
    done = tmp_path / "imported"
    (tmp_path / "slow_module.py").write_text(SLOW.format(sent=sent, done=str(done)))
    program = f"""
import sys, time
from lox_merge.cli.main import cli, main
sys.path.insert(0, {str(tmp_path)!r})

@cli.command("slow")
def slow():
    import slow_module
    time.sleep(30)

from lox_merge.cli import main as module
module._COMMANDS["slow"] = "x"
module.LazyGroup.get_command = lambda self, ctx, name: slow
main(["slow"])
"""
    started = time.monotonic()
    ended = run_program(program)
    assert ended.returncode == 1 and ended.stderr == INTERRUPTED, ended.stderr
    assert done.exists() and time.monotonic() - started < 20


def test_an_import_that_led_to_the_command_does_not_count(tmp_path: Path) -> None:
    """A script may call the command line where it is imported."""
    (tmp_path / "script.py").write_text("""
import os, signal, time
from lox_merge.cli import main as module

def slow():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

module.LazyGroup.get_command = lambda self, ctx, name: module.click.Command("slow", callback=slow)
module.main(["slow"])
""")
    started = time.monotonic()
    ended = run_program(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport script")
    assert ended.returncode == 1 and ended.stderr == INTERRUPTED, ended.stderr
    assert time.monotonic() - started < 20


def test_a_second_ctrl_c_does_not_wait_for_an_import(tmp_path: Path) -> None:
    (tmp_path / "endless.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "prompts.txt").write_text("x\n")
    words = ["asr", "model", "--prompts", str(tmp_path / "prompts.txt"), "--judge", f"python:{tmp_path / 'endless.py'}:judge"]
    running = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None and running.stderr.readline() == "importing\n"
    running.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=20)
    assert running.returncode == 1 and errors == INTERRUPTED


def test_interrupts_at_any_moment_of_the_start(tmp_path: Path) -> None:
    """A few of the moments at which one try in five went wrong."""
    for step, sent in enumerate([signal.SIGINT, signal.SIGTERM] * 5):
        words = ["inspect", str(tmp_path / "none"), str(tmp_path / "none"), str(tmp_path / "none")]
        running = subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(0.25 + 0.03 * step)
        running.send_signal(sent)
        _, errors = running.communicate(timeout=60)
        assert (running.returncode, errors) == (1, INTERRUPTED) or (running.returncode == 2 and "error: " in errors), errors


def _shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command under a shell's redirections. "$@": the command."""
    return subprocess.run(["sh", "-c", line, "sh", *COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_closed_streams(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "pair", "llama")
    out = tmp_path / "out"
    assert _shell('"$@" 2>&-', "--help").stdout.startswith("Usage: ")
    assert _shell('"$@" <&- >&- 2>&-', "harden", base, aligned, out).returncode == 0
    assert _shell('"$@" >&-', "verify", out, "--base", base, "--aligned", aligned).returncode == 0, "nothing else was written into its files"
    closed = _shell('"$@" >&-', "verify", out, "--base", base, "--aligned", aligned, "--json", "-")
    assert closed.returncode == 2 and closed.stderr == "error: --json -: standard output is closed. Name a file, or leave it open.\n"
    full = _shell('"$@" >/dev/full', "harden", base, aligned, tmp_path / "other")
    assert full.returncode == 1 and full.stderr.endswith("error: standard output can't be written: No space left on device\n"), full.stderr
    assert (tmp_path / "other" / "lox_merge.json").is_file()


def test_a_verdict_is_shown_though_its_file_cannot_be_written(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "pair", "llama")
    assert _shell('"$@"', "harden", base, aligned, tmp_path / "out").returncode == 0
    told = _shell('"$@"', "verify", tmp_path / "out", "--base", base, "--aligned", aligned, "--json", "/dev/full")
    assert told.returncode == 1 and "made again from the sources: equal" in told.stdout
    assert told.stderr.splitlines()[-1].startswith("error: the JSON file /dev/full can't be written: No space left on device")
    manifest = tmp_path / "out" / "lox_merge.json"
    document = json.loads(manifest.read_text())
    document["summary"]["realised_gain"] = 0.5
    manifest.write_text(json.dumps(document))
    wrong = _shell('"$@"', "verify", tmp_path / "out", "--offline", "--json", "/dev/full")
    assert wrong.returncode == 1 and "the JSON file /dev/full" in wrong.stderr


def test_a_current_folder_that_was_removed(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    told = _shell(f'cd {gone} && rmdir {gone} && "$@"', "harden", tmp_path / "base", tmp_path / "aligned", tmp_path / "out")
    assert told.returncode == 2 and told.stderr == "error: the current folder is not there any more. Change to another one.\n"
