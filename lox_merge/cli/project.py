"""`lox-merge project`: the projection filter, Safe LoRA and SafeMERGE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lox_merge.cli.options import (
    GIVEN_PATH,
    base_option,
    cache_option,
    device_option,
    dtype_option,
    executor_option,
    fused_option,
    json_option,
    number,
    order_option,
    seed_option,
    tolerance_option,
    workers_option,
)
from lox_merge.cli.start import import_torch


@click.command("project", short_help="Filter a fine-tuning update by the alignment subspace.")
@click.argument("base")
@click.argument("aligned")
@click.argument("finetuned")
@click.argument("out", type=GIVEN_PATH)
@click.option(
    "--mode", metavar="orthogonal|parallel", help="Take the part in the subspace out (default), or keep that part alone (default of Safe LoRA)."
)
@click.option("--fraction", metavar="F", help="Size of the subspace: the share F in (0, 1) of each matrix's short side.")
@click.option("--rank", type=int, metavar="K", help="Size of the subspace: K directions of each matrix, instead of --fraction.")
@click.option(
    "--basis",
    default="top",
    show_default=True,
    metavar="top|random-k|random",
    help="Leading directions, or a control: of all at random, or Haar.",
)
@click.option(
    "--side", default="left", show_default=True, metavar="left|right", help="Project in the output space of each layer, or in its input space."
)
@click.option("--threshold", metavar="T", help="Safe LoRA: change only layers with cos(P(update), update) ≤ T.")
@click.option("--layers", type=int, metavar="N", help="Safe LoRA: change only the N layers with the smallest cosine.")
@click.option("--projector", default="subspace", show_default=True, metavar="subspace|safe-lora", help="P, or the authors' ΔΔᵀ/‖Δ‖.")
@click.option("--below", default="project", show_default=True, metavar="project|merge", help="Those layers are projected, or merged (SafeMERGE).")
@click.option("--merge-weight", metavar="W", help="Share of ALIGNED in a merged layer [default: 0.2].")
@click.option("--factors", type=GIVEN_PATH, help="File of lox-merge decompose for BASE and ALIGNED: no SVD is spent.")
@click.option("--include", multiple=True, metavar="REGEX", help="Filter only tensors whose name matches. Repeatable.")
@click.option("--exclude", multiple=True, metavar="REGEX", help="Leave tensors whose name matches as in FINETUNED. Repeatable.")
@click.option("--linear-only", is_flag=True, help="Leave embeddings, lm_head, vectors and convolutions as in FINETUNED.")
@fused_option
@dtype_option("FINETUNED")
@click.option(
    "--rounding", default="nearest", show_default=True, metavar="nearest|feedback|stochastic", help="How edits are rounded to the output dtype."
)
@tolerance_option
@click.option("--skip-non-finite", is_flag=True, help="Copy tensors whose deltas hold NaN or Inf instead of failing.")
@order_option
@base_option
@device_option
@workers_option
@executor_option
@seed_option
@cache_option
@click.option("--overwrite", is_flag=True, help="Start anew where OUT holds another output of lox-merge.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
@json_option
def project_command(
    base: str,
    aligned: str,
    finetuned: str,
    out: Path,
    mode: str | None,
    fraction: str | None,
    rank: int | None,
    basis: str,
    side: str,
    threshold: str | None,
    layers: int | None,
    projector: str,
    below: str,
    merge_weight: str | None,
    factors: Path | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    linear_only: bool,
    fused: str,
    dtype: str | None,
    rounding: str,
    tolerance: str,
    skip_non_finite: bool,
    order_is_right: bool,
    base_is_right: bool,
    device: str,
    workers: str,
    executor: str,
    seed: int,
    cache_dir: Path | None,
    overwrite: bool,
    dry_run: bool,
    json_file: str | None,
) -> None:
    """Write FINETUNED to the folder OUT with its update (FINETUNED − ALIGNED) filtered by the alignment subspace.

    The subspace is spanned by the leading singular vectors of ALIGNED − BASE. Orthogonal filtering takes that part of the
    update out; parallel filtering keeps that part alone. FINETUNED may be a PEFT LoRA adapter over ALIGNED. OUT mirrors
    FINETUNED's files. The paper behind it finds that harm and usefulness go together: measure before you rely on it, against
    --basis random.

    \b
    lox-merge project base aligned finetuned out --fraction 0.25
    lox-merge project base aligned finetuned out --rank 64 --threshold 0.35
    """
    from lox_merge.jobs.early import begin_early
    from lox_merge.jobs.executors.server import warm_up

    if not dry_run:
        # Beside this process's own imports.
        warm_up(workers, executor)
        if workers == "1":
            begin_early([finetuned, aligned, base])
    import_torch()

    from lox_merge.cli.json_file import write_json
    from lox_merge.cli.progress import byte_progress
    from lox_merge.cli.show_filter import print_filter_plan, print_filter_result
    from lox_merge.jobs.beforehand import all_here, check_model_job
    from lox_merge.jobs.estimate import estimate
    from lox_merge.jobs.executors.choose import check_executor, workers_of_dry_run
    from lox_merge.jobs.executors.sizing import parse_workers
    from lox_merge.jobs.factors import open_factors
    from lox_merge.jobs.filter_checks import check_direction
    from lox_merge.jobs.filter_recipe import FilterRecipe
    from lox_merge.jobs.project import execute_projection, plan_projection

    recipe = FilterRecipe(
        mode=mode,  # type: ignore[arg-type]
        fraction=None if fraction is None else number(fraction, "--fraction"),
        rank=rank,
        basis=basis,  # type: ignore[arg-type]
        side=side,  # type: ignore[arg-type]
        threshold=None if threshold is None else number(threshold, "--threshold"),
        layers=layers,
        projector=projector,  # type: ignore[arg-type]
        below=below,  # type: ignore[arg-type]
        merge_weight=None if merge_weight is None else number(merge_weight, "--merge-weight"),
        include=include,
        exclude=exclude,
        linear_only=linear_only,
        dtype=dtype,
        rounding=rounding,  # type: ignore[arg-type]
        tolerance=number(tolerance, "--tolerance"),
        seed=seed,
        fused=fused,
        skip_non_finite=skip_non_finite,
    )
    count = parse_workers(workers)
    check_executor(executor)
    sources: dict[str, Any] = {"order_is_right": order_is_right, "base_is_right": base_is_right, "cache_dir": cache_dir}
    with open_factors(factors) as held:
        plan = plan_projection(base, aligned, finetuned, out, recipe=recipe, factors=held, **sources)
        if dry_run:
            target, _, _ = check_model_job(plan, device=device, workers=count, executor=executor, overwrite=overwrite)
            if all_here(plan):
                check_direction(plan)
            report = estimate(plan, "project", workers_of_dry_run(executor, count, plan, target), target)
            if json_file:
                write_json(json_file, report)
            if json_file != "-":
                print_filter_plan(plan, report)
            return
        with byte_progress(plan.bytes_written, "filtering") as progress:
            result = execute_projection(plan, device=device, workers=count, executor=executor, overwrite=overwrite, progress=progress)
    if json_file:
        write_json(json_file, result.to_json())
    if json_file != "-":
        print_filter_result(result)
