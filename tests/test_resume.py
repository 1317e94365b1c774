"""Interrupted at any moment, a job goes on and ends in the bytes that it would have written undisturbed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import RunCli, start_cli
from forked_cli import CLI, StartedCli
from tiny_models import make_pair

from lox_merge import Recipe, harden
from lox_merge.errors import OutputError, SourceChangedError

# test_faults.py kills other commands; tests/fault_campaign.py does it hundreds of times.
KILLS = 10


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Large enough that a run takes a good part of a second after its start."""
    return make_pair(tmp_path_factory.mktemp("resume"), "llama", base_shards=3, aligned_shards=8, hidden=256, layers=8, vocabulary=2000)


@pytest.fixture(scope="module")
def expected(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected") / "out"
    harden(*pair, out)
    return hashes(out)


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*CLI, "harden", *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_work(process: subprocess.Popen[str] | StartedCli, out: Path) -> None:
    """Returns once this process (not one that was killed before it) writes into the output."""
    began = time.time() - 0.01  # file stamps are a little coarser than the clock
    while process.poll() is None:
        for path in (out / ".lox_merge").glob("*.partial"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime >= began:
                    return
        time.sleep(0.001)


def work_seconds(pair: tuple[Path, Path], out: Path) -> float:
    process = start_cli("harden", *pair, out)
    wait_for_work(process, out)
    began = time.perf_counter()
    while not (out / "lox_merge.json").exists():
        time.sleep(0.002)
    spell = time.perf_counter() - began
    process.finish()
    return spell


def test_killed_at_random_moments_and_resumed(pair: tuple[Path, Path], expected: dict[str, str], run_cli: RunCli, tmp_path: Path) -> None:
    spell = work_seconds(pair, tmp_path / "measured")
    assert hashes(tmp_path / "measured") == expected
    moments = random.Random(0)
    kills, folder, finished_shards = 0, 0, []
    while kills < KILLS:
        out = tmp_path / f"out{folder}"
        while kills < KILLS:
            process = start_cli("harden", *pair, out)
            wait_for_work(process, out)
            time.sleep(moments.uniform(0, spell))
            process.kill()
            process.finish()
            if (out / "lox_merge.json").exists():
                break  # it was through; the next one starts anew
            kills += 1
            finished_shards.append(len(list(out.glob("*.safetensors"))))
            assert not (out / "model.safetensors.index.json").exists() or (out / "config.json").exists()
        done = run_cli("harden", *pair, out)
        assert done.returncode == 0, done.stderr
        assert hashes(out) == expected
        folder += 1
    assert len(set(finished_shards)) > 2, f"the kills were not spread over the run: {finished_shards}"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_by_hand_says_how_to_go_on(
    pair: tuple[Path, Path], expected: dict[str, str], run_cli: RunCli, tmp_path: Path, sent: signal.Signals
) -> None:
    for attempt in range(20):
        out = tmp_path / f"out{attempt}"
        process = start(*pair, out)
        wait_for_work(process, out)
        process.send_signal(sent)
        _, stderr = process.communicate()
        if process.returncode != 0:
            break
    assert process.returncode == 1
    assert stderr.startswith("error: interrupted.") and "run the same command again" in stderr and "Traceback" not in stderr
    assert not (out / "lox_merge.json").exists()
    assert not list((out / ".lox_merge").glob("*.safetensors.partial"))
    assert run_cli("harden", *pair, out).returncode == 0
    assert hashes(out) == expected


def unfinished(pair: tuple[Path, Path], folder: Path) -> Path:
    """An output whose process was killed after its first shards; on a busy machine a run may be through before that."""
    for attempt in range(10):
        out = folder / f"out{attempt}"
        process = start(*pair, out)
        while len(list((out / ".lox_merge").glob("*.safetensors.json"))) < 2 and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        if not (out / "lox_merge.json").exists():
            return out
    raise AssertionError("every run was through before it could be interrupted")


def test_resuming_takes_finished_shards_and_redoes_damaged_ones(pair: tuple[Path, Path], expected: dict[str, str], tmp_path: Path) -> None:
    out = unfinished(pair, tmp_path)
    records = sorted((out / ".lox_merge").glob("*.safetensors.json"))
    kept, damaged = (out / json.loads(record.read_text())["output"]["file"] for record in records[:2])
    stamp = kept.stat().st_mtime_ns
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    result = harden(*pair, out)
    assert result.resumed_shards >= 1
    assert kept.stat().st_mtime_ns == stamp
    assert hashes(out) == expected


def test_another_recipe_or_source_does_not_go_on(pair: tuple[Path, Path], expected: dict[str, str], run_cli: RunCli, tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "pair", "llama", base_shards=3, aligned_shards=8, hidden=256, layers=8, vocabulary=2000)
    out = unfinished((base, aligned), tmp_path)
    before = hashes(out)
    refused = run_cli("harden", base, aligned, out, "--rank", "5")
    assert refused.returncode == 2 and "recipe.rank was 6, is now 5" in refused.stderr
    with pytest.raises(OutputError, match="holds another job"):
        harden(base, aligned, out, recipe=Recipe(alpha=1.0))
    assert hashes(out) == before

    used = sorted(aligned.glob("*.safetensors"))[0]
    data = bytearray(used.read_bytes())
    data[-1] ^= 1
    used.write_bytes(data)
    with pytest.raises(SourceChangedError, match="is not the file that"):
        harden(base, aligned, out)
    harden(base, aligned, out, overwrite=True)
    assert (out / "lox_merge.json").exists()


def test_a_source_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "pair", "llama", base_shards=1, aligned_shards=8, hidden=512, layers=8, vocabulary=2000)
    for attempt in range(10):  # on a busy machine a run may be through before its source is touched
        out = tmp_path / f"out{attempt}"
        process = start(base, aligned, out)
        while not list((out / ".lox_merge").glob("*.safetensors.json")) and process.poll() is None:
            time.sleep(0.001)
        os.utime(sorted(base.glob("*.safetensors"))[0])  # needed until the last shard is done
        _, stderr = process.communicate()
        if process.returncode != 0:
            break
    assert process.returncode == 1, stderr
    assert "changed while it was being read" in stderr
    assert not (out / "lox_merge.json").exists()
