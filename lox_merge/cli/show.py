"""Plans and results as tables for people and JSON for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
from rich.table import Table

from lox_merge.cli.console import plain_console
from lox_merge.jobs.execute import JobResult
from lox_merge.jobs.harden import HardenResult
from lox_merge.jobs.output_folder import MANIFEST
from lox_merge.jobs.plan import Plan
from lox_merge.wording import first_few

_MOST_NAMED = 8


def size(count: float) -> str:
    """Bytes in decimal units, as disks are sold and the Hub shows them."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds // 60)
    return f"{minutes} min {seconds % 60:.0f} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def figure(value: float | None, form: str = ".3f") -> str:
    return "undefined" if value is None else format(value, form)


def print_pairs(title: str, rows: list[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    plain_console().print(table)


def print_utility(head: str, rows: Sequence[tuple[str, Mapping[str, float | None]]]) -> None:
    """A table of utility measures, models or ranks in rows; nothing where none were measured."""
    measures = list(dict.fromkeys(name for _, found in rows for name in found))
    if not measures:
        return
    table = Table(title="\nUtility", title_justify="left", box=None, pad_edge=False)
    table.add_column(head, overflow="fold")
    for measure in measures:
        table.add_column(measure, justify="right", overflow="fold")
    for label, found in rows:
        table.add_row(label, *(figure(found.get(measure), ".4g") for measure in measures))
    plain_console().print(table)


def print_plan(plan: Plan, report: dict[str, Any]) -> None:
    """The dry run's table."""
    recipe = report["recipe"]
    print_plan_rows(plan, report, f"rank {recipe['rank']}, alpha {recipe['alpha']:g}")


def print_plan_rows(plan: Plan, report: dict[str, Any], settings: str) -> None:
    """A dry run's table. settings: those of the edit in a few words."""
    rows = [(checkpoint.role, f"{checkpoint.title} ({size(checkpoint.bytes)})") for checkpoint in plan.others]
    rows += [
        (plan.mirrored.role, f"{plan.mirrored.title} ({size(plan.mirrored.bytes)}, {len(plan.shards)} file(s))"),
        ("edited", f"{report['edited_tensors']} tensors, {report['edited_matrices']} matrices, {settings}"),
    ]
    rows += [("copied", f"{count} tensors: {reason}") for reason, count in report["copied_tensors"].items()]
    rows += [
        ("read", size(report["bytes_read"])),
        ("write", f"{size(report['bytes_written'])} and {len(plan.side_files)} other file(s)"),
        ("peak memory", f"about {size(report['peak_memory'])} beside mapped files"),
        ("time", f"about {duration(report['seconds'])} on this CPU (estimated from a short trial)"),
    ]
    if plan.passing:
        rows.insert(-2, ("downloads", f"at most {size(plan.passing.most_bytes)} on disk at once, beside the output"))
    if plan.store:
        rows.insert(-2, ("weights", f"to {plan.store.identity['repository']} on the Hub, sent by the workers; not kept in {plan.out}"))
    if report["workers"] > 1:
        rows.insert(-2, ("workers", f"{report['workers']}, a shard at a time each"))
    for text in plan.warnings:
        click.echo(f"warning: {text}", err=True)
    print_pairs("Plan (nothing was written)", rows)


def skipped_rows(result: JobResult) -> list[tuple[str, str]]:
    """Which tensors --skip-non-finite left as they were."""
    skipped = [tensor["name"] for tensor in result.manifest["tensors"] if "non_finite" in tensor]
    return [("skipped", f"{len(skipped)} tensor(s) with NaN or Inf in a delta: {first_few(skipped, _MOST_NAMED)}")] if skipped else []


def time_rows(result: JobResult) -> list[tuple[str, str]]:
    """The last lines of a result's table."""
    if not result.bytes_written:
        return [("time", "nothing to do: the output was complete, its hashes were checked")]
    moved = result.bytes_read + result.bytes_written
    rows = [("time", f"{duration(result.seconds)}, {size(moved / max(result.seconds, 1e-9))}/s read and written")]
    return rows + ([("resumed", f"{result.resumed_shards} shard(s) were finished before")] if result.resumed_shards else [])


def print_result(result: HardenResult, *, weights_elsewhere: bool = False) -> None:
    """The result's table. weights_elsewhere: workers sent them to the Hub."""
    summary = result.summary
    recipe = result.manifest["job"]["recipe"]
    bound = figure(summary.largest_angle_bound, ".1e")
    certificate = f"sin angle ≤ {bound} ({summary.largest_angle_tensor})" if summary.largest_angle_tensor else "no SVD was needed"
    rows = [
        ("tensors edited", f"{summary.edited_tensors} ({summary.edited_matrices} matrices), rank {recipe['rank']}, alpha {recipe['alpha']:g}"),
        ("tensors copied", str(summary.copied_tensors) + (f", {summary.zero_deltas} of them with a zero delta" if summary.zero_deltas else "")),
        (
            "mean R_align",
            f"{figure(summary.mean_r_align)} (energy-weighted {figure(summary.energy_r_align)}; mean rank {figure(summary.mean_rank, '.3g')})",
        ),
        ("realised gain", f"{figure(summary.realised_gain)} (worst {figure(summary.smallest_gain)}: {summary.smallest_gain_tensor})"),
        ("worst certificate", certificate),
        ("ambiguous subspaces", f"{summary.ambiguous_matrices} of {summary.edited_matrices}"),
    ]
    rows += skipped_rows(result) + time_rows(result)
    print_pairs(f"Hardened model, all but its weights, in {result.out}" if weights_elsewhere else f"Hardened model in {result.out}", rows)
    click.echo(f"Every figure per tensor: {result.out / MANIFEST}")
