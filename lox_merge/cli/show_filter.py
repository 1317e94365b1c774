"""Plans and results of the projection filter as tables."""

from __future__ import annotations

from typing import Any

import click

from lox_merge.cli.show import figure, print_pairs, print_plan_rows, skipped_rows, time_rows
from lox_merge.jobs.output_folder import MANIFEST
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.project import ProjectResult


def print_filter_plan(plan: Plan, report: dict[str, Any]) -> None:
    """The dry run's table."""
    print_plan_rows(plan, report, describe(report["recipe"]))


def describe(recipe: dict[str, Any]) -> str:
    """The settings that decide the edit, in a few words."""
    if recipe["projector"] == "safe-lora":
        subspace = "ΔΔᵀ/‖Δ‖"
    else:
        subspace = f"rank {recipe['rank']}" if recipe["fraction"] is None else f"fraction {recipe['fraction']:g}"
    words = [recipe["mode"], f"{subspace} ({recipe['basis']}, {recipe['side']})"]
    if recipe["threshold"] is not None:
        words.append(f"{recipe['below']} where cosine ≤ {recipe['threshold']:g}")
    if recipe["layers"] is not None:
        words.append(f"{recipe['below']} the {recipe['layers']} least similar")
    return ", ".join(words)


def print_filter_result(result: ProjectResult) -> None:
    """The result's table."""
    summary, recipe = result.summary, result.manifest["job"]["recipe"]
    decided = recipe["threshold"] is not None or recipe["layers"] is not None
    rows = [
        ("filter", describe(recipe)),
        ("tensors edited", f"{summary.edited_tensors} ({summary.edited_matrices} matrices)"),
        ("tensors copied", str(summary.copied_tensors) + (f", {summary.zero_deltas} of them not fine-tuned" if summary.zero_deltas else "")),
    ]
    if decided:
        left = f"{summary.left_as_finetuned} left as fine-tuned"
        rows.append(("layers", f"{summary.filtered} projected, {summary.merged} merged, {left}"))
        rows.append(("least similar", f"cosine {figure(summary.smallest_cosine)} ({summary.smallest_cosine_tensor})"))
    if recipe["projector"] == "subspace":
        rows += [
            ("mean rank", figure(summary.mean_rank, ".3g") + (f"; {summary.dense} dense decompositions" if summary.dense else "")),
            ("‖P(update)‖/‖update‖", f"{figure(summary.mean_kept)}, random subspace {figure(summary.mean_kept_random)} (mean of matrices)"),
            ("energy in subspace", f"{figure(summary.energy_kept)}, random subspace {figure(summary.energy_kept_random)} (whole model)"),
        ]
        bound = figure(summary.largest_angle_bound, ".1e")
        if summary.largest_angle_tensor:
            rows.append(("worst certificate", f"sin angle ≤ {bound} ({summary.largest_angle_tensor})"))
            rows.append(("ambiguous subspaces", f"{summary.ambiguous_matrices} of {summary.edited_matrices}"))
    rows.append(
        ("realised gain", f"{figure(summary.realised_gain)} (worst {figure(summary.smallest_gain)}: {summary.smallest_gain_tensor or 'none'})")
    )
    print_pairs(f"Filtered model in {result.out}", rows + skipped_rows(result) + time_rows(result))
    click.echo(f"Every figure per tensor: {result.out / MANIFEST}")
