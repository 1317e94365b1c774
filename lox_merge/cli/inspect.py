"""`lox-merge inspect`: what alignment did to the weights, and what fine-tuning undid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lox_merge.cli.options import (
    GIVEN_PATH,
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
from lox_merge.errors import RequestError


@click.command("inspect", short_help="What alignment did to the weights and fine-tuning undid, beside what chance would give.")
@click.argument("base")
@click.argument("aligned")
@click.argument("finetuned", nargs=-1)
@click.option("--rank", default="6", show_default=True, metavar="K|P%", help="Directions of R_align and R_ft.")
@click.option("--fractions", default="0.01", show_default=True, metavar="F,F,…", help="Shares of the short side for the energy-kept ratio.")
@click.option("--etas", metavar="E,E,…", help="Energies for the subspace overlap (MSO).  [default: 13 from 0.01 to 0.99]")
@click.option("--side", default="left", show_default=True, metavar="left|right", help="Singular vectors that span the subspaces: left is the output.")
@click.option("--full-spectrum", is_flag=True, help="Every singular value of every delta: slower, and nothing stays undecided.")
@click.option("--factors", type=GIVEN_PATH, metavar="FILE", help="Triplets of `lox-merge decompose`: no SVD of ALIGNED − BASE.")
@click.option("--draws", type=int, default=20, show_default=True, help="Random subspaces per matrix.")
@click.option("--include", multiple=True, metavar="REGEX", help="Only tensors whose name matches. Repeatable.")
@click.option("--exclude", multiple=True, metavar="REGEX", help="Leave out tensors whose name matches. Repeatable.")
@click.option("--linear-only", is_flag=True, help="Leave out embeddings, output heads, convolutions and vectors.")
@fused_option
@tolerance_option
@click.option("--skip-non-finite", is_flag=True, help="Leave out matrices whose deltas hold NaN or Inf instead of failing.")
@click.option("--by", default="kind", show_default=True, metavar="kind|layer|none", help="Rows of the second table.")
@order_option
@device_option
@seed_option
@cache_option
@json_option
def inspect_command(
    base: str, aligned: str, finetuned: tuple[str, ...], json_file: str | None, by: str, factors: Path | None, **options: Any
) -> None:
    """Say what alignment did to the weights (ALIGNED − BASE) and what each FINETUNED model, trained from ALIGNED, undid.

    Beside every ratio stands what a random subspace of the same rank would give. One pass over the files, nothing is written but
    --json.

    \b
    lox-merge inspect base aligned
    lox-merge inspect base aligned finetuned --json inspect.json
    lox-merge inspect base aligned useful harmful --full-spectrum --fractions 0.01,0.25,0.5
    """
    if by not in ("kind", "layer", "none"):
        raise RequestError(f"--by {by!r} is not known; use kind, layer or none.")
    import_torch()
    from lox_merge.cli.json_file import give_result
    from lox_merge.cli.progress import byte_progress
    from lox_merge.cli.show_inspect import print_inspection
    from lox_merge.diagnostics.weights import execute_inspection, plan_inspection
    from lox_merge.jobs.factors import Factors

    settings = _settings(options)
    known = None if factors is None else Factors.open(factors)
    sources = plan_inspection(
        base, aligned, finetuned, settings=settings, factors=known, order_is_right=options["order_is_right"], cache_dir=options["cache_dir"]
    )
    with byte_progress(sources.bytes, "inspecting") as progress:
        result = execute_inspection(sources, settings, factors=known, device=options["device"], progress=progress)
    give_result(json_file, result.to_json(), lambda: print_inspection(result, by))


def _settings(options: dict[str, Any]) -> Any:
    from lox_merge.diagnostics.settings import DEFAULT_ETAS, InspectSettings

    return InspectSettings(
        rank=options["rank"],
        fractions=_numbers(options["fractions"], "--fractions"),
        etas=DEFAULT_ETAS if options["etas"] is None else _numbers(options["etas"], "--etas"),
        tolerance=number(options["tolerance"], "--tolerance"),
        **{
            name: options[name]
            for name in ("side", "full_spectrum", "draws", "include", "exclude", "linear_only", "fused", "seed", "skip_non_finite")
        },
    )


def _numbers(text: str, option: str) -> tuple[float, ...]:
    return tuple(number(part, option) for part in text.split(",") if part.strip())
