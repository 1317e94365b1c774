"""`lox-merge harden --as-adapter`: what it prints, and its dry run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from lox_merge.cli.json_file import write_json
from lox_merge.cli.progress import byte_progress
from lox_merge.cli.show import figure, print_pairs, size, skipped_rows
from lox_merge.jobs.adapter import check_adapter_job, check_room_for, execute_adapter
from lox_merge.jobs.adapter_plan import AdapterPlan, plan_adapter
from lox_merge.jobs.beforehand import all_here
from lox_merge.jobs.harden import HardenResult, check_some_delta
from lox_merge.jobs.output_folder import MANIFEST
from lox_merge.jobs.plan import Plan
from lox_merge.wording import first_few

_MOST_NAMED = 3


def plan_as_adapter(plan: Plan, *, device: str, overwrite: bool, json_file: str | None, asked: bool = True) -> None:
    """Shows what the adapter of a plan would be. asked: as in `plan_adapter`."""
    made = plan_adapter(plan, asked=asked)
    check_adapter_job(made, device=device, overwrite=overwrite)
    check_room_for(made)
    if all_here(plan):
        check_some_delta(plan)
    report = _report(made)
    if json_file:
        write_json(json_file, report)
    if json_file != "-":
        _print_plan(made, report)


def harden_as_adapter(plan: Plan, *, device: str, overwrite: bool, asked: bool = True) -> HardenResult:
    """Carries a plan out as an adapter. asked: as in `plan_adapter`."""
    made = plan_adapter(plan, asked=asked)
    with byte_progress(sum(tensor.info.bytes for tensor in plan.edited), "hardening") as progress:
        return execute_adapter(made, device=device, overwrite=overwrite, progress=progress)


def adapter_json(result: HardenResult) -> dict[str, Any]:
    """The value for --json."""
    return result.to_json() | {"adapter": result.manifest["adapter"]}


def _report(made: AdapterPlan) -> dict[str, Any]:
    plan = made.plan
    return {
        "command": "harden --as-adapter --dry-run",
        "edited_tensors": len(plan.edited) - len(made.left_out),
        "modules": len(made.pairs),
        "left_out": dict(made.left_out),
        "copied_tensors": dict(plan.copied_by_reason()),
        "bytes_read": plan.bytes_read,
        "bytes_written": made.largest_bytes,
        "model_bytes": plan.aligned.bytes,
        "dtype": made.dtype,
        "recipe": plan.recipe.to_json(),
        "warnings": plan.warnings,
        "targets": [pair.target for pair in made.pairs],
    }


def _print_plan(made: AdapterPlan, report: dict[str, Any]) -> None:
    plan = made.plan
    recipe = report["recipe"]
    rows = [
        ("base", f"{plan.base.title} ({size(plan.base.bytes)})"),
        ("aligned", f"{plan.aligned.title} ({size(plan.aligned.bytes)}), which the adapter goes on"),
        ("adapted", f"{report['edited_tensors']} tensors as {len(made.pairs)} modules, rank {recipe['rank']}, alpha {recipe['alpha']:g}"),
    ]
    rows += [("left out", text) for text in _by_reason(made.left_out)]
    most = "not known before the spectra are" if made.largest_bytes is None else f"at most {size(made.largest_bytes)}"
    rows.append(("write", f"{most}, in {made.dtype}"))
    for text in plan.warnings:
        click.echo(f"warning: {text}", err=True)
    print_pairs("Plan of an adapter (nothing was written)", rows)


def print_adapter(result: HardenResult) -> None:
    """The result's table."""
    summary, found = result.summary, result.manifest["adapter"]
    recipe = result.manifest["job"]["recipe"]
    share = found["bytes"] / found["model_bytes"]
    rows = [
        ("tensors adapted", f"{summary.edited_tensors} as {found['modules']} modules, rank {recipe['rank']}, alpha {recipe['alpha']:g}"),
        ("size", f"{size(found['bytes'])} in {found['dtype']}, {share:.2%} of the model's {size(found['model_bytes'])}"),
        (
            "mean R_align",
            f"{figure(summary.mean_r_align)} (energy-weighted {figure(summary.energy_r_align)}; mean rank {figure(summary.mean_rank, '.3g')})",
        ),
        ("realised gain", f"{figure(summary.realised_gain)} (worst {figure(summary.smallest_gain)}: {summary.smallest_gain_tensor})"),
    ]
    if found["nearest_gain"] is not None:
        rows.append(("", f"rounding into the weights to nearest would have kept {figure(found['nearest_gain'])}"))
    if found["left_out"]:
        rows.append(("left out", f"{len(found['left_out'])} tensor(s), {figure(found['left_out_share'], '.1%')} of the edit's squared norm"))
        rows += [("", text) for text in _by_reason(found["left_out"])]
    rows += skipped_rows(result)
    rows.append(("ambiguous subspaces", f"{summary.ambiguous_matrices} of {summary.edited_matrices}"))
    print_pairs(f"Adapter in {result.out}", rows)
    click.echo(f"Every figure per tensor: {result.out / MANIFEST}")


def _by_reason(left_out: Mapping[str, str]) -> list[str]:
    """A line for each reason: a model of sixty layers has sixty tensors of one kind."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return [f"{first_few(found, _MOST_NAMED)}: {reason}" for reason, found in names.items()]
