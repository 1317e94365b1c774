"""Hostile files for everything that reads a file: `python tests/fuzz_campaign.py --cases 10000`. Exit code 1 when something was found."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import click
import torch


@click.command()
@click.option("--cases", default=10_000, show_default=True, help="In all; a target whose cases take longer gets fewer.")
@click.option("--target", "targets", multiple=True, help="Only this target. Repeatable.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same cases.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write figures and findings here.")
def main(cases: int, targets: tuple[str, ...], seed: int, json_file: Path | None) -> None:
    from fuzz.cases import run_cases
    from fuzz.materials import make_materials
    from fuzz.targets import TARGETS
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    rows, findings = [], []
    with tempfile.TemporaryDirectory(prefix="fuzz") as folder:
        materials = make_materials(Path(folder))
        made = [make(materials) for name, make in TARGETS.items() if not targets or name in targets]
        shares = sum(1 / target.dear for target in made)
        for target in made:
            began = time.perf_counter()
            outcome = run_cases(target, round(cases / target.dear / shares), seed)
            seconds = time.perf_counter() - began
            rows.append({"target": target.name, "cases": outcome.count, **outcome.ended, "seconds": round(seconds, 1)})
            findings += [vars(finding) for finding in outcome.findings.values()]
            click.echo(f"{target.name:16} {outcome.count:6} cases {seconds:7.1f} s  {dict(outcome.ended)}")
            for finding in outcome.findings.values():
                click.echo(f"  FOUND {finding.signature}\n{finding.details}\n    {finding.example[:1500]}")
    total = sum(row["cases"] for row in rows)
    click.echo(f"{total} cases, {len(findings)} kinds of findings")
    if json_file:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        json_file.write_text(json.dumps({"seed": seed, "cases": total, "targets": rows, "findings": findings, "versions": versions}, indent=2))
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    main()
