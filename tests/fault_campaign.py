"""Kills and faults in real runs: `python tests/fault_campaign.py --moments 200`. Exit code 1 when one of them ended badly."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import click
from preloading import import_all


@click.command()
@click.option("--moments", default=200, show_default=True, help="Kills in all, shared by the commands.")
@click.option("--job", "names", multiple=True, help="Only this command. Repeatable.")
@click.option("--fault", "chosen", default="", metavar="WORDS", help="Only faults whose name holds these words; 'none' for none.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same moments.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write what happened here.")
def main(moments: int, names: tuple[str, ...], chosen: str, seed: int, json_file: Path | None) -> None:
    import_all()
    from transformers.utils import logging

    logging.disable_progress_bar()
    from faults.injected import FAULTS
    from faults.jobs import JOBS, make_sources
    from faults.kills import kill_and_resume

    failures: list[str] = []
    report: dict[str, object] = {"seed": seed}
    with tempfile.TemporaryDirectory(prefix="faults") as name:
        folder = Path(name)
        os.environ["LOX_MERGE_CACHE"] = str(folder / "cache")
        sources = make_sources(folder / "sources")
        jobs = [job for name, job in JOBS.items() if not names or name in names]
        found = []
        for position, job in enumerate(jobs):
            share = moments // len(jobs) + (position < moments % len(jobs))
            if share:
                kills = kill_and_resume(job, sources, folder / "kills", share, seed)
                found.append(asdict(kills))
                failures += [f"{job.name}: {text}" for text in kills.failures]
                click.echo(
                    f"{job.name:10} {len(kills.moments):4} kills in {kills.outputs:3} outputs, {kills.resumed_with_work_done:3} of them "
                    f"gone on with; undisturbed {kills.undisturbed_seconds:.2f} s; {len(kills.failures)} failures"
                )
        report["kills"] = found
        ended = []
        for name, fault in FAULTS.items():
            if chosen not in name:
                continue
            problem = fault(sources, folder / "faults" / name.replace(" ", "_"))
            ended.append({"fault": name, "problem": problem})
            failures += [f"{name}: {problem}"] if problem else []
            click.echo(f"{name:60} {problem or 'as it should'}")
        report["faults"] = ended
    report["failures"] = failures
    click.echo("\n".join(failures) or "nothing ended badly")
    if json_file:
        json_file.write_text(json.dumps(report, indent=2))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
