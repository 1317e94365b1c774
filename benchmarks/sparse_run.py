"""The real `lox-merge harden` on a pair of 100 GB of apparent size, killed halfway and gone on with: time, memory, resumption.

A model of Llama-3-70B's shapes with fewer layers; base in float32, so that the output takes a third of what is read. One layer has data, the
rest are holes: their deltas are zero and their tensors are copied, but they are read, compared, hashed and written like any others.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from measure import anonymous_memory
from shapes import MODELS, Llama, Model
from sparse import apparent_bytes, disk_bytes, make_sparse_pair
from synthetic import matrix_pair

FILLED = "model.layers.1."
# What has to stay free on the disk of a machine that others share.
LEFT_FREE = 30 * 10**9
_POLL = 0.05


def model_of(layers: int) -> Model:
    model = MODELS["70B"]
    assert isinstance(model, Llama)
    return Llama(replace(model.sizes, layers=layers))


def entries(layers: int, *, filled: bool) -> dict[tuple[int, ...], int]:
    """How many matrices of each shape have data, or have none."""
    found: dict[tuple[int, ...], int] = {}
    for name, shape in model_of(layers).tensors():
        if len(shape) == 2 and name.startswith(FILLED) == filled:
            found[shape] = found.get(shape, 0) + 1
    return found


def spell(command: list[str], out: Path, *, kill_at: int | None = None) -> dict[str, Any]:
    """One run: seconds, peak of anonymous memory (process and children), shards finished; SIGKILL once `kill_at` of them are."""
    started = time.perf_counter()
    before = os.times()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    peak, stop = [0], threading.Event()

    def watch() -> None:
        handle = psutil.Process(process.pid)
        while process.poll() is None and not stop.is_set():
            peak[0] = max(peak[0], anonymous_memory(handle))
            if kill_at is not None and len(list(out.glob("*.safetensors"))) >= kill_at:
                process.send_signal(signal.SIGKILL)
                return
            time.sleep(_POLL)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    text, _ = process.communicate()
    stop.set()
    watcher.join()
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    done = len(list(out.glob("*.safetensors")))
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": cpu,
        "peak_anonymous": peak[0],
        "shards": done,
        "code": process.returncode,
        "text": text,
        "load": os.getloadavg()[0],
    }


def run(work: Path, layers: int, shards: int) -> dict[str, Any]:
    """Makes the pair, runs, kills, goes on, removes everything. The report has no path."""
    work.mkdir(parents=True, exist_ok=True)
    model = model_of(layers)
    parameters = sum(math.prod(shape) for _, shape in model.tensors())
    needed = 2 * parameters + 6 * sum(count * math.prod(shape) for shape, count in entries(layers, filled=True).items())
    free = shutil.disk_usage(work).free
    if free - needed < LEFT_FREE:
        raise SystemExit(f"{needed / 1e9:.0f} GB are needed and {LEFT_FREE / 1e9:.0f} GB have to stay free; there are {free / 1e9:.0f} GB")
    pair, out = work / "sparse", work / "sparse_out"
    generator = torch.Generator().manual_seed(0)

    def values(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        base, aligned = matrix_pair(shape, generator)
        return base.float(), aligned

    try:
        started = time.perf_counter()
        folders = make_sparse_pair(pair, model, shards, filled=lambda name: name.startswith(FILLED), pair=values, base_code="F32")
        report: dict[str, Any] = {
            "parameters": parameters,
            "apparent_bytes": sum(map(apparent_bytes, folders)),
            "disk_bytes": sum(map(disk_bytes, folders)),
            "making_seconds": time.perf_counter() - started,
            "shards": len(list(folders[1].glob("*.safetensors"))),
        }
        print(f"{report['apparent_bytes'] / 1e9:.1f} GB apparent, {report['disk_bytes'] / 1e9:.2f} GB on disk", flush=True)
        command = [sys.executable, "-m", "lox_merge.cli.main", "harden", *map(str, (*folders, out)), "--json", str(work / "sparse.json")]
        report["killed"] = spell(command, out, kill_at=report["shards"] // 2)
        print(f"killed after {report['killed']['seconds']:.0f} s with {report['killed']['shards']} shards", flush=True)
        report["resumed"] = spell(command, out)
        if report["resumed"]["code"]:
            raise SystemExit(report["resumed"]["text"])
        result = json.loads((work / "sparse.json").read_text())
        report |= {
            "resumed_shards": result["resumed_shards"],
            "bytes_read": result["bytes_read"],
            "bytes_written": result["bytes_written"],
            "edited": result["summary"]["edited_matrices"],
            "zero_deltas": result["summary"]["zero_deltas"],
            "manifest_bytes": (out / "lox_merge.json").stat().st_size,
        }
        return report
    finally:
        for folder in (pair, out):
            shutil.rmtree(folder, ignore_errors=True)
        (work / "sparse.json").unlink(missing_ok=True)


__all__ = ["entries", "model_of", "run"]
