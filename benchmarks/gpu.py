"""The GPU path on 8B shapes: seconds in transfer, SVD, update and I/O, and the share of the device's memory bandwidth reached.

Every distinct shape of a Llama-3-8B is made on the device, measured, and multiplied by how often it occurs. Needs CUDA:
    python benchmarks/gpu.py --json gpu.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from synthetic import SIZES

from lox_merge.maths.edits import apply_update, lox_update
from lox_merge.maths.spectral import truncated_svd


def seconds(work: Any, repeat: int = 3) -> float:
    """Mean device time of a call after a warm-up, by events."""
    work()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeat):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / repeat


def bandwidth() -> float:
    """Bytes per second of a device copy, read plus written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), 10)


def pair(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device="cuda").manual_seed(0)
    rows, columns = shape

    def normal(*sides: int) -> torch.Tensor:
        return torch.randn(*sides, generator=generator, device="cuda")

    base = (normal(rows, columns) * 0.02).bfloat16()
    low = (normal(rows, 64) * torch.arange(1, 65, device="cuda").float() ** -0.8) @ normal(64, columns)
    low *= 0.006 * base.float().norm() / low.norm()
    return base, (base.float() + low + normal(rows, columns) * 8e-5).bfloat16()


def disk(size: int = 2**31) -> tuple[float, float]:
    """Bytes per second of writing with fsync, and of reading back (from the page cache)."""
    data = torch.randint(0, 255, (size,), dtype=torch.uint8).numpy().data
    with tempfile.NamedTemporaryFile() as file:
        started = time.perf_counter()
        file.write(data)
        file.flush()
        torch.cuda.synchronize()
        written = time.perf_counter() - started
        started = time.perf_counter()
        Path(file.name).read_bytes()
        return size / written, size / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="8B", choices=sorted(SIZES))
    parser.add_argument("--rank", type=int, default=6)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    peak = bandwidth()
    written, read = disk()
    shapes = Counter(shape for _, shape in SIZES[arguments.size].tensors() if len(shape) == 2)
    total: Counter[str] = Counter()
    rows = []
    for shape, count in shapes.items():
        base, aligned = pair(shape)
        host = base.cpu()
        delta = aligned.float() - base.float()
        subspace = truncated_svd(delta, arguments.rank)
        update = lox_update(subspace, 1.25)
        row = {
            "transfer": 2 * seconds(lambda host=host: host.to("cuda")) + seconds(lambda aligned=aligned: aligned.cpu()),
            "svd": seconds(lambda delta=delta: truncated_svd(delta, arguments.rank)),
            "update": seconds(lambda aligned=aligned, update=update: apply_update(aligned, update)),
        }
        passes = subspace.certificate.passes
        reached = passes * 4 * delta.numel() / row["svd"]
        print(f"{shape!s:16s} ×{count:3d}  transfer {row['transfer'] * 1e3:7.2f} ms  SVD {row['svd'] * 1e3:7.2f} ms ({passes} passes, "
              f"{reached / peak:.0%} of {peak / 1e9:.0f} GB/s)  update {row['update'] * 1e3:7.2f} ms", flush=True)  # fmt: skip
        rows.append({"shape": shape, "count": count, "passes": passes, "bandwidth_share": reached / peak, **row})
        for part, value in row.items():
            total[part] += count * value  # type: ignore[assignment]
        del base, aligned, delta, host
    size = sum(2 * torch.Size(shape).numel() * count for shape, count in shapes.items())
    total["io"] = 2 * size / read + size / written  # type: ignore[assignment]
    print(f"{arguments.size}: " + ", ".join(f"{part} {value:.1f} s" for part, value in total.items()) + f"; disk {written / 1e9:.2f} GB/s written")
    if arguments.json:
        report = {
            "device": torch.cuda.get_device_name(),
            "bandwidth": peak,
            "disk_write": written,
            "disk_read": read,
            "shapes": rows,
            "total": dict(total),
        }
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
