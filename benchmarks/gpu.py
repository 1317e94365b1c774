"""The GPU path on shapes of 1B, 8B and 70B models: seconds in read, transfer, SVD, update and write, the share of the device's memory
bandwidth that the SVD reaches, and whether what comes out is right.

Weights come from a generator; nothing of the size of a model is on disk. One call on a machine with a GPU measures everything:
    python benchmarks/gpu.py --json gpu.json
The same script runs without one, on small shapes, to be tried:
    python benchmarks/gpu.py --device cpu --size small --json gpu.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpu_checks import check_certificates, check_job
from gpu_stages import Weights, bandwidth, disk, kinds, measure, outline, products, stream, svds_together
from synthetic import SIZES

from lox_merge.jobs.batches import batches_of
from lox_merge.jobs.work import available_cores
from lox_merge.maths.precision import full_precision_matmul

# The disk that the targets are set against, bytes per second.
NOMINAL_READ = 3e9


def measure_size(size: str, folder: Path, device: torch.device, arguments: argparse.Namespace, rates: dict[str, float]) -> dict[str, Any]:
    """Seconds of a whole model: stages by themselves from one batch of each kind, times how often it occurs; and all of it streamed."""
    plan, weights = outline(folder, size, arguments.rank), Weights(device)
    counted = kinds(plan)
    examples = {(batch.shape, len(batch.members)): batch for position in range(len(plan.shards)) for batch in batches_of(plan, position)}
    rows: list[dict[str, Any]] = []
    total = dict.fromkeys(("transfer", "svd", "update"), 0.0)
    moved = 0.0
    with ThreadPoolExecutor(max(1, min(8, available_cores()))) as pool:
        for kind, count in counted.items():
            stage = measure(plan, examples[kind], weights, device, pool.map, arguments.repeat)
            (shape, members), entries = kind, kind[0][0] * kind[0][1]
            reached = 4 * entries * stage.passes / stage.svd
            rows.append({"shape": shape, "together": members, "batches": count, "bandwidth_share": reached / rates["memory"], **vars(stage)})
            total["transfer"] += count * (stage.up + stage.down)
            total["svd"] += count * stage.svd
            total["update"] += count * (stage.delta + stage.update)
            moved += count * 4 * entries * stage.passes
            milliseconds = {name: 1e3 * value for name, value in vars(stage).items()}
            print(
                f"  {size} {shape!s:16s} {members:2d} together, {count:3d} times: up {milliseconds['up']:8.1f} ms, "
                f"delta {milliseconds['delta']:7.1f} ms, SVD {milliseconds['svd']:8.1f} ms ({stage.passes / members:.0f} passes, "
                f"{reached / rates['memory']:4.0%} of bandwidth), update {milliseconds['update']:8.1f} ms, down {milliseconds['down']:8.1f} ms",
                flush=True,
            )
        first, together = svds_together(plan, weights, device, pool.map)
    streamed, peak = stream(plan, weights, device)
    result = {
        "size": size,
        "read": plan.bytes_read / rates["disk_read"],
        **total,
        "write": plan.bytes_written / rates["disk_write"],
        "streamed": streamed,
        # Of the copies within the device that rates["memory"] is of: one at a time, and as many at a time as the pipeline edits.
        "bandwidth_share": moved / total["svd"] / rates["memory"],
        "svds_together_at_first": first,
        "svds_together": together,
        "bandwidth_share_together": moved / together / rates["memory"],
        # Below 1 the disk is what one waits for, at 3 GB/s.
        "svd_and_update_to_reading": (total["svd"] + total["update"]) / (plan.bytes_read / NOMINAL_READ),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_device_memory": peak,
        "kinds": rows,
    }
    plan.close()
    return result


def table(results: list[dict[str, Any]]) -> str:
    columns = ("shapes", "read", "transfer", "SVD", "update", "write", "streamed (all but disk)")
    columns += ("SVD: share of bandwidth", "three at a time", "SVD + update ÷ reading at 3 GB/s", "peak device memory")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in results:
        peak = row["peak_device_memory"]
        times = " | ".join(f"{row[part]:.2f} s" for part in ("read", "transfer", "svd", "update", "write", "streamed"))
        shares = f"{row['bandwidth_share']:.0%} | {row['bandwidth_share_together']:.0%}"
        lines.append(
            f"| {row['size']} | {times} | {shares} | {row['svd_and_update_to_reading']:.2f} | {'–' if peak is None else f'{peak / 2**30:.1f} GiB'} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the script")
    parser.add_argument("--size", action="append", choices=sorted(SIZES), help="repeatable; default 1B, 8B and 70B")
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--pair", default=None, choices=sorted(SIZES), help="size of the pair that is hardened on both; default 117M (cpu: small)")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--folder", type=Path, help="where files are read and written; default a temporary one")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is there; --device cpu --size small tries the script on the CPU")
    on_gpu = device.type == "cuda"
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        folder = Path(place)
        report: dict[str, Any] = {"device": torch.cuda.get_device_name(device) if on_gpu else "cpu", "torch": torch.__version__}
        if not arguments.no_checks:
            report["certificates"] = check_certificates(device, arguments.rank)
            print(f"certificates: {report['certificates']}", flush=True)
            report["job"] = check_job(folder, arguments.pair or ("117M" if on_gpu else "small"), device, arguments.rank)
            print(f"whole job: {report['job']}", flush=True)
        written, read = disk(folder, 2**31 if on_gpu else 2**26)
        report["rates"] = rates = {"memory": bandwidth(device), "disk_write": written, "disk_read": read}
        print(", ".join(f"{name} {rate / 1e9:.2f} GB/s" for name, rate in rates.items()), flush=True)
        large = [(16, 4096, 4096), (4, 4096, 14336), (4, 14336, 4096), (16, 1024, 4096)]
        with full_precision_matmul(device):
            report["products"] = products(large if on_gpu else [(2, 256, 512)], 8, device)
        for row in report["products"]:
            rates_of = ", ".join(f"{way} {row[way] / 1e9:.0f} GB/s" for way in ("torch", "kernels") if way in row)
            print(f"  8 rows times {row['shape']}, {row['side']}: {rates_of}", flush=True)
        report["sizes"] = []
        for size in arguments.size or ["1B", "8B", "70B"]:
            report["sizes"].append(measure_size(size, folder, device, arguments, rates))
            if arguments.json:  # after each: a machine that is lent may be taken back
                arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report["sizes"]))
    checks = [report[name] for name in ("certificates", "job") if name in report]
    if not all(value for check in checks for value in check.values() if isinstance(value, bool)):
        raise SystemExit("a check failed")


if __name__ == "__main__":
    main()
