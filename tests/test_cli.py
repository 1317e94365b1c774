"""The command line as people and scripts meet it: terminal, pipe, JSON, environment, speed of help."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import select
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RunCli
from forked_cli import CLI
from reference import load
from tiny_models import make_pair

import lox_merge


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("cli"), "llama", hidden=256, layers=4)


def on_terminal(*arguments: object, columns: int = 80) -> tuple[int, str]:
    """Exit code and everything that a terminal of this width was sent."""
    master, slave = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "40", "TERM": "xterm-256color"}
    process = subprocess.Popen([*CLI, *map(str, arguments)], stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    received = b""
    while True:
        ready, _, _ = select.select([master], [], [], 0.1)
        if ready:
            try:
                received += os.read(master, 65536)
            except OSError:
                break
        elif process.poll() is not None:
            break
    os.close(master)
    return process.wait(), received.decode()


def test_pipe_gets_a_table_within_80_columns_and_no_control_codes(pair: tuple[Path, Path], run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("harden", *pair, tmp_path / "out")
    assert done.returncode == 0 and done.stderr == ""
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80  # the last line holds the path of the output
    for words in ("tensors edited", "mean R_align", "realised gain", "worst certificate", "ambiguous subspaces", "/s read and written"):
        assert words in done.stdout


BARS = """
import sys
from lox_merge.cli.main import main
try:
    main(["--version"])
except SystemExit:
    pass
import tqdm
list(tqdm.tqdm(range(3), disable=False))
"""


def test_bars_of_libraries_stay_out_of_a_pipe() -> None:
    """Those of compressed-tensors, say, which it shows whoever asks for a model."""
    done = subprocess.run([sys.executable, "-c", BARS], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("lox-merge")
    asked = {**os.environ, "TQDM_DELAY": "0"}
    assert "100%" in subprocess.run([sys.executable, "-c", BARS], capture_output=True, text=True, timeout=60, env=asked).stderr


def test_terminal_gets_a_progress_bar_and_the_table(pair: tuple[Path, Path], tmp_path: Path) -> None:
    code, screen = on_terminal("harden", *pair, tmp_path / "out")
    assert code == 0
    assert re.search(r"hardening.*MB", screen) and "━" in screen
    assert "tensors edited" in screen.split("━")[-1]


def test_json_holds_the_figures_of_the_table(pair: tuple[Path, Path], run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("harden", *pair, tmp_path / "out", "--json", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    manifest = json.loads((tmp_path / "out" / "lox_merge.json").read_text())
    assert result["summary"] == manifest["summary"] and result["tensors"] == manifest["tensors"]
    assert f"{result['summary']['mean_r_align']:.3f}" in done.stdout
    assert result["seconds"] > 0 and result["bytes_written"] == sum(shard["size"] for shard in manifest["output"]["shards"])
    only = run_cli("harden", *pair, tmp_path / "out", "--json", "-")
    assert json.loads(only.stdout)["summary"] == manifest["summary"]


def test_unwritable_json_says_that_the_output_is_complete(pair: tuple[Path, Path], run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("harden", *pair, tmp_path / "out", "--json", "/dev/full")
    assert done.returncode == 1 and "The output itself is complete" in done.stderr
    assert (tmp_path / "out" / "lox_merge.json").exists()


def test_json_in_the_folder_that_the_command_makes(pair: tuple[Path, Path], run_cli: RunCli, tmp_path: Path) -> None:
    beside = run_cli("harden", *pair, tmp_path / "out", "--rank", 1, "--json", tmp_path / "out" / "run.json")
    assert beside.returncode == 0 and (tmp_path / "out" / "run.json").is_file(), beside.stderr


def test_dry_run_prints_the_plan_and_writes_nothing(pair: tuple[Path, Path], run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("harden", *pair, tmp_path / "out", "--dry-run", "--exclude", "lm_head", "--json", tmp_path / "plan.json")
    assert done.returncode == 0
    assert not (tmp_path / "out").exists()
    plan = json.loads((tmp_path / "plan.json").read_text())
    after = load(pair[1])
    matrices = {name for name, tensor in after.items() if tensor.ndim == 2 and name != "lm_head.weight"}
    assert {tensor["name"] for tensor in plan["tensors"] if tensor["action"] == "edit"} == matrices
    assert plan["copied_tensors"] == {"fewer than two dimensions": len(after) - len(matrices) - 1, "excluded": 1}
    assert plan["bytes_written"] == sum(file.stat().st_size for file in pair[1].glob("*.safetensors"))
    for words in (f"{len(matrices)} tensors", "peak memory", "time", "1 tensors: excluded"):
        assert words in done.stdout


def test_options_come_from_the_environment_too(pair: tuple[Path, Path], run_cli: RunCli, tmp_path: Path) -> None:
    assert run_cli("harden", *pair, tmp_path / "out", LOX_MERGE_HARDEN_RANK="3", LOX_MERGE_HARDEN_ALPHA="0.5").returncode == 0
    recipe = json.loads((tmp_path / "out" / "lox_merge.json").read_text())["job"]["recipe"]
    assert (recipe["rank"], recipe["alpha"]) == ("3", 0.5)
    assert run_cli("harden", *pair, tmp_path / "two", "--rank", "2", LOX_MERGE_HARDEN_RANK="3").returncode == 0
    assert json.loads((tmp_path / "two" / "lox_merge.json").read_text())["job"]["recipe"]["rank"] == "2"


@pytest.mark.parametrize("arguments", [["--help"], ["harden", "--help"], ["--version"], ["no-such-command"]])
def test_help_does_not_load_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from lox_merge.cli.main import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert not any(name in sys.modules for name in ("torch", "transformers", "mergekit", "huggingface_hub")), "heavy imports"
    sys.exit(stop.code)
"""
    seconds = []
    for _ in range(3):
        # Time on the processor: what else the machine does must not decide the test.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert done.returncode == (2 if arguments == ["no-such-command"] else 0), done.stderr
    assert min(seconds) < 0.5
    if arguments == ["--help"]:
        for command in ("asr", "card", "decompose", "demo", "harden", "push", "robustness", "search", "verify", "yaml"):
            assert command in done.stdout
    if arguments == ["--version"]:
        assert lox_merge.__version__ in done.stdout


def test_help_of_every_command_is_quick() -> None:
    """One process asks for the help of all of them: whoever imports torch, or takes half a second of CPU, is named."""
    code = """
import contextlib, io, json, sys, time
from lox_merge.cli.main import _COMMANDS, main
heavy = ("torch", "transformers", "mergekit", "huggingface_hub", "matplotlib", "scipy", "pandas", "ray")
found = {}
for command in sorted(_COMMANDS):
    started, shown = time.process_time(), io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            main([command, "--help"])
        except SystemExit as stop:
            code = stop.code
    found[command] = [code, "Usage: " in shown.getvalue(), time.process_time() - started, [name for name in heavy if name in sys.modules]]
print(json.dumps(found))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) >= 19
    for command, (exit_code, usage, seconds, heavy) in found.items():
        assert exit_code == 0 and usage and not heavy, (command, exit_code, heavy)
        assert seconds < 0.5, (command, seconds)


def test_python_names_are_reachable() -> None:
    for name in lox_merge.__all__:
        assert getattr(lox_merge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lox_merge.nothing


def test_torch_is_imported_without_collections_and_collected_as_before_afterwards() -> None:
    code = (
        "import gc, sys\nfrom lox_merge.cli.start import import_torch\nassert 'torch' not in sys.modules\nbefore = gc.get_stats()[2]['collections']\n"
        "import_torch()\nassert 'torch' in sys.modules and gc.isenabled() and gc.get_freeze_count() > 100_000\n"
        "assert gc.get_stats()[2]['collections'] == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
