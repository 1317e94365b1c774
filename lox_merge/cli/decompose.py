"""`lox-merge decompose`: singular triplets of every delta, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lox_merge.cli.options import (
    GIVEN_PATH,
    base_option,
    cache_option,
    device_option,
    fused_option,
    json_option,
    number,
    order_option,
    seed_option,
    tolerance_option,
)
from lox_merge.cli.start import import_torch


@click.command("decompose", short_help="Leading singular triplets of every delta as one file, for search to reuse.")
@click.argument("base")
@click.argument("aligned")
@click.argument("factors", type=GIVEN_PATH)
@click.option("--rank", default="64", show_default=True, metavar="K", help="Triplets kept per matrix.")
@click.option("--include", multiple=True, metavar="REGEX", help="Only tensors whose name matches. Repeatable.")
@click.option("--exclude", multiple=True, metavar="REGEX", help="Leave out tensors whose name matches. Repeatable.")
@click.option("--linear-only", is_flag=True, help="Leave out embeddings, lm_head and convolutions.")
@fused_option
@tolerance_option
@click.option("--skip-non-finite", is_flag=True, help="Leave out matrices whose delta holds NaN or Inf instead of failing.")
@order_option
@base_option
@device_option
@seed_option
@cache_option
@click.option("--overwrite", is_flag=True, help="Start anew where FACTORS holds other factors.")
@click.option("--dry-run", is_flag=True, help="Check everything, print what would be decomposed, write nothing.")
@json_option
def decompose_command(
    base: str,
    aligned: str,
    factors: Path,
    rank: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    linear_only: bool,
    fused: str,
    tolerance: str,
    skip_non_finite: bool,
    order_is_right: bool,
    base_is_right: bool,
    device: str,
    seed: int,
    cache_dir: Path | None,
    overwrite: bool,
    dry_run: bool,
    json_file: str | None,
) -> None:
    """Write the leading singular triplets of ALIGNED − BASE, matrix by matrix, to the file FACTORS (*.safetensors).

    Each comes with a certificate of its accuracy, and the file knows which pair it is of. Run the same command again
    after an interruption to go on.

    \b
    lox-merge decompose base aligned factors.safetensors
    lox-merge search base aligned --factors factors.safetensors --prompts prompts.csv
    """
    import_torch()
    from lox_merge.cli.json_file import write_json
    from lox_merge.cli.progress import byte_progress
    from lox_merge.cli.show_search import print_decomposition, print_selection
    from lox_merge.jobs.decompose import check_decomposition, execute_decomposition, plan_decomposition, selection_report
    from lox_merge.jobs.recipe import Recipe

    recipe = Recipe(
        rank=rank,
        include=include,
        exclude=exclude,
        linear_only=linear_only,
        fused=fused,
        tolerance=number(tolerance, "--tolerance"),
        seed=seed,
        skip_non_finite=skip_non_finite,
    )
    sources: dict[str, Any] = {"order_is_right": order_is_right, "base_is_right": base_is_right, "cache_dir": cache_dir}
    plan = plan_decomposition(base, aligned, factors, recipe=recipe, **sources)
    if dry_run:
        check_decomposition(plan, factors, device=device, overwrite=overwrite)
        report = selection_report(plan)
        if json_file:
            write_json(json_file, report)
        if json_file != "-":
            print_selection(plan.base.title, plan.aligned.title, report)
        return
    total = sum(tensor.info.bytes for tensor in plan.edited)
    with byte_progress(total, "decomposing") as progress:
        result = execute_decomposition(plan, factors, device=device, overwrite=overwrite, progress=progress)
    if json_file:
        write_json(json_file, result.to_json())
    if json_file != "-":
        print_decomposition(result)
