"""What measured throughput means for models of 8 billion to a trillion parameters: time, memory, disk, network, and what bounds each.

    python benchmarks/throughput.py --json benchmarks/out/throughput.json
    python benchmarks/scale.py benchmarks/out/throughput.json
    python benchmarks/scale.py benchmarks/out/throughput.json --run

Memory comes from the program's own estimate, on a plan of header-only checkpoints with the models' names and shapes (bf16). Time is a
model: entries by shape over measured rates, bytes over measured rates, overlapping where the program overlaps them. --run checks the model on
100 GB of apparent size (see benchmarks/sparse_run.py; 40 GB of disk for some minutes).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sparse_run
from shapes import MODELS, Model, parameters, stored_bytes
from sparse import make_sparse_pair

from lox_merge.jobs.estimate import PROCESS_BYTES, peak_memory
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.hashing import hashing_threads

START_SECONDS = 3.0  # interpreter and imports
RAY_WORKERS, RAY_CORES = 8, 16
GIGABIT = 1e9 / 8
NAMES = ("8B", "70B", "405B", "671B", "1T")


@dataclass(frozen=True)
class Rates:
    """Measured seconds a matrix by shape, and bytes a second."""

    shapes: list[dict[str, Any]]
    sha256: float
    write: float
    read: float
    moved: float  # per core

    @classmethod
    def of(cls, report: dict[str, Any]) -> Rates:
        return cls(report["shapes"], report["sha256"], report["disk"]["write"], report["disk"]["read_cold"], report["disk"]["moved_by_core"])

    def seconds(self, shape: tuple[int, ...], stage: str) -> float:
        """Of one core, by the measured shape that is nearest in both sides: the rate per entry is taken to be the same."""
        long, short = max(shape), min(shape)

        def distance(row: dict[str, Any]) -> float:
            return abs(math.log(max(row["shape"]) / long)) + abs(math.log(min(row["shape"]) / short))

        row = min(self.shapes, key=distance)
        return float(row[f"{stage}_seconds"]) * math.prod(shape) / row["entries"]

    def measured(self, shape: tuple[int, ...]) -> bool:
        return any(sorted(row["shape"]) == sorted(shape) for row in self.shapes)


@dataclass(frozen=True)
class Work:
    """What a hardening takes. Core-seconds by stage; bytes of the two sources together and of the output."""

    core_seconds: dict[str, float]
    read: int
    written: int
    extrapolated: float  # share of the entries whose shape was not measured

    @classmethod
    def of(cls, model: Model, rates: Rates) -> Work:
        stages: Counter[str] = Counter()
        matrices = Counter(shape for _, shape in model.tensors() if len(shape) == 2)
        entries = sum(count * math.prod(shape) for shape, count in matrices.items())
        new = sum(count * math.prod(shape) for shape, count in matrices.items() if not rates.measured(shape))
        for shape, count in matrices.items():
            for stage in ("delta", "svd", "update"):
                stages[stage] += count * rates.seconds(shape, stage)
        size = stored_bytes(model)
        stages["sha256"] += 3 * size / rates.sha256
        stages["copies"] += 3 * size / rates.moved
        return cls(dict(stages), 2 * size, size, new / entries)

    def on(self, cores: int, rates: Rates) -> tuple[float, str]:
        """Seconds on one machine with the measured disk, and what bounds them. A thread of four cores each hashes the sources, one the output."""
        bounds = {
            "arithmetic": sum(self.core_seconds.values()) / cores,
            "hashing": self.read * (1 / rates.sha256 + 1 / rates.moved) / hashing_threads(cores),
            "disk": self.read / rates.read + self.written / rates.write,
        }
        bound = max(bounds, key=lambda name: bounds[name])
        return START_SECONDS + bounds[bound], bound

    def on_cluster(self, workers: int, cores: int, bandwidth: float, largest_shard: float, rates: Rates) -> tuple[float, str]:
        """Seconds with shared storage that serves every worker at `bandwidth` bytes/s. largest_shard: its share of the model."""
        total = sum(self.core_seconds.values())
        share = max(1 / workers, largest_shard)
        bounds = {
            "arithmetic": total / cores * share,
            "hashing": self.read * (1 / rates.sha256 + 1 / rates.moved) * share,
            "network": (self.read + self.written) / bandwidth * share,
        }
        bound = max(bounds, key=lambda name: bounds[name])
        return START_SECONDS + bounds[bound], bound


def planned(model: Model) -> dict[str, Any]:
    """What the program itself says of a header-only pair (bf16) of this model."""
    with tempfile.TemporaryDirectory() as folder:
        pair = make_sparse_pair(Path(folder) / "pair", model, model.shards)
        plan = plan_hardening(*pair, Path(folder) / "out")
        sizes = {(role, file): header.file_size for role, checkpoint in plan.checkpoints.items() for file, header in checkpoint.headers.items()}
        at_once = max(sum(sizes[source] for source in shard.sources(plan.checkpoints)) for shard in plan.shards)
        largest = max(shard.header.file_size for shard in plan.shards)
        one = peak_memory(plan)
        result = {
            "tensors": len(plan.tensors),
            "matrices": len(plan.edited),
            "peak_memory": one,
            "peak_memory_2_workers": PROCESS_BYTES + 2 * one,
            "bytes": plan.bytes_written,
            "sources_at_once": at_once / plan.bytes_written,
            "largest_shard": largest / plan.bytes_written,
        }
        plan.close()
        return result


def on_gpu(model: Model, sizes: list[dict[str, Any]]) -> float | None:
    """Seconds of all but disk and hashing on one GPU: those that benchmarks/gpu.py took to stream the nearest of its sizes, by parameters.
    None without one, and for fp8, whose weights it does not take out."""
    if not sizes or model.fp8:
        return None

    def entries(row: dict[str, Any]) -> int:
        return int(sum(kind["batches"] * kind["together"] * math.prod(kind["shape"]) for kind in row["kinds"]))

    row = min(sizes, key=lambda row: abs(math.log(entries(row) / parameters(model))))
    return float(row["streamed"]) * parameters(model) / entries(row)


def span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f}" if count < 1e11 else f"{count / 1e9:,.0f}"


def table(head: list[str], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def paper(rates: Rates, gpu: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in NAMES:
        model = MODELS[name]
        work, plan = Work.of(model, rates), planned(model)
        cluster = work.on_cluster(RAY_WORKERS, RAY_CORES, 10 * GIGABIT, plan["largest_shard"], rates)
        found[name] = {
            "parameters": parameters(model),
            "fp8": model.fp8,
            **plan,
            "read": work.read,
            "written": work.written,
            "core_seconds": work.core_seconds,
            "extrapolated": work.extrapolated,
            "seconds": {str(cores): work.on(cores, rates) for cores in (1, 2, 16)},
            "cluster": cluster,
            "gpu_seconds": on_gpu(model, gpu),
            "disk_seconds": work.read / rates.read + work.written / rates.write,
            "download_seconds": {"1": work.read / GIGABIT, "10": work.read / GIGABIT / 10},
            "low_disk": work.written * (1 + plan["sources_at_once"]),
        }
    return found


def show(found: dict[str, Any]) -> None:
    head = ["model", "parameters", "stored as", "tensors", "matrices", "peak memory, GB", "disk, GB", "with `--low-disk`, GB"]
    table(head, [[
        name, f"{row['parameters'] / 1e9:,.0f} B", "fp8" if row["fp8"] else "bf16", f"{row['tensors']:,}", f"{row['matrices']:,}",
        gigabytes(row["peak_memory"]), gigabytes(row["read"] + row["written"]), gigabytes(row["low_disk"]),
    ] for name, row in found.items()])  # fmt: skip
    head = ["core time in", "delta", "SVD", "update, rounding", "sha256", "copies", "together", "shapes extrapolated"]
    table(head, [[
        name, *(span(row["core_seconds"][stage]) for stage in ("delta", "svd", "update", "sha256", "copies")),
        span(sum(row["core_seconds"].values())), f"{row['extrapolated']:.0%}",
    ] for name, row in found.items()])  # fmt: skip
    clustered = f"{RAY_WORKERS} Ray workers of {RAY_CORES} cores"
    head = [
        "time, and its bound",
        "1 core",
        "2 cores",
        "16 cores",
        clustered,
        "GPU, all but disk and hashing",
        "this disk alone",
        "download, 1 Gbit/s",
        "10 Gbit/s",
    ]
    table(head, [[
        name, *(f"{span(seconds)} ({bound})" for seconds, bound in [*row["seconds"].values(), row["cluster"]]),
        "not measured" if row["gpu_seconds"] is None else span(row["gpu_seconds"]), span(row["disk_seconds"]),
        *(span(seconds) for seconds in row["download_seconds"].values()),
    ] for name, row in found.items()])  # fmt: skip


def predicted(rates: Rates, ran: dict[str, Any], layers: int) -> dict[str, float]:
    """CPU seconds of a run that was killed and resumed: what is done once, and what the second spell hashes again."""
    once = 0.0
    for filled, stages in ((True, ("delta", "svd", "update")), (False, ("delta", "copy"))):
        for shape, count in sparse_run.entries(layers, filled=filled).items():
            once += count * sum(rates.seconds(shape, stage) for stage in stages)
    read, written = ran["bytes_read"], ran["bytes_written"]
    share = ran["resumed_shards"] / ran["shards"]
    hashed = read + written
    return {
        "arithmetic": once,
        "sha256": hashed / rates.sha256,
        "copies": hashed / rates.moved,
        "both again": share * hashed * (1 / rates.sha256 + 1 / rates.moved),
        "starts": 2 * START_SECONDS,
    }


def compare(rates: Rates, ran: dict[str, Any], layers: int) -> dict[str, Any]:
    parts = predicted(rates, ran, layers)
    observed = ran["killed"]["cpu_seconds"] + ran["resumed"]["cpu_seconds"]
    model = sparse_run.model_of(layers)
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_hardening(*make_sparse_pair(Path(folder) / "pair", model, ran["shards"], base_code="F32"), Path(folder) / "out")
        memory = peak_memory(plan)
        plan.close()
    peak = max(ran["killed"]["peak_anonymous"], ran["resumed"]["peak_anonymous"])
    print(f"\n{ran['parameters'] / 1e9:.1f} B parameters, {ran['apparent_bytes'] / 1e9:.1f} GB apparent ({ran['disk_bytes'] / 1e9:.2f} GB on disk), "
          f"{ran['shards']} files; {ran['edited']} matrices edited, {ran['zero_deltas']} with a zero delta")  # fmt: skip
    for name in ("killed", "resumed"):
        spell = ran[name]
        print(f"{name}: {spell['seconds']:.0f} s wall (load {spell['load']:.1f}), {spell['cpu_seconds']:.0f} s CPU, "
              f"peak anonymous {spell['peak_anonymous'] / 1e9:.2f} GB, {spell['shards']} files finished")  # fmt: skip
    print("CPU predicted: " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in parts.items())
          + f", together {sum(parts.values()):.0f} s; observed {observed:.0f} s. "
          f"Memory predicted at most {memory / 1e9:.2f} GB, observed {peak / 1e9:.2f} GB")  # fmt: skip
    return {"predicted_cpu": parts, "observed_cpu": observed, "predicted_memory": memory, "observed_memory": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("throughput", type=Path, help="JSON of benchmarks/throughput.py")
    parser.add_argument("--gpu", type=Path, action="append", default=[], help="JSON of benchmarks/gpu.py; repeatable")
    parser.add_argument("--run", action="store_true", help="check the model by a run on a sparse pair")
    parser.add_argument("--ran", type=Path, help="JSON of such a run, to compare again")
    parser.add_argument("--layers", type=int, default=18, help="of the pair: 18 are 105 GB of apparent size, 35 GB of output")
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured = json.loads(arguments.throughput.read_text())
    rates = Rates.of(measured)
    print(f"rates of {measured['machine']}, load average {measured['load'][0]:.1f} to {measured['load'][1]:.1f}")
    found = paper(rates, [row for file in arguments.gpu for row in json.loads(file.read_text())["sizes"]])
    show(found)
    report: dict[str, Any] = {"models": found}
    if arguments.run:
        ran = sparse_run.run(arguments.work, arguments.layers, arguments.shards)
        (arguments.work / "sparse_run.json").write_text(json.dumps(ran, indent=2) + "\n")
    elif arguments.ran:
        ran = json.loads(arguments.ran.read_text())
    else:
        ran = None
    if ran:
        report |= {"run": ran, "check": compare(rates, ran, arguments.layers)}
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
