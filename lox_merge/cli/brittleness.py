"""`lox-merge brittleness`: how fast ASR rises as the leading directions of alignment are taken away, in memory only."""

from __future__ import annotations

from typing import Any

import click

from lox_merge.cli.in_memory import measured_in_memory, reply_options, selection_of, selection_options, whole_numbers
from lox_merge.cli.measuring import judge_options, judges_of, prompt_options, prompts_of, rendering_options, utility_of, utility_options
from lox_merge.cli.options import GIVEN_PATH, base_option, cache_option, device_option, json_option, order_option, seed_option
from lox_merge.cli.start import import_torch
from lox_merge.errors import LoxMergeError

DEFAULT_RANKS = "0,1,2,4,8"


@click.command("brittleness", short_help="Take the leading directions of alignment away in memory: how fast does ASR rise?")
@click.argument("base")
@click.argument("aligned")
@prompt_options
@click.option("--ranks", default=DEFAULT_RANKS, show_default=True, metavar="K,K,…", help="How many directions to take away; 0 is ALIGNED itself.")
@click.option(
    "--control",
    "controls",
    multiple=True,
    type=click.Choice(["random", "random-subspace"]),
    default=("random",),
    show_default=True,
    help="Directions of equal norm beside them: Haar-random, or the delta on a Haar-random output subspace. Repeatable.",
)
@click.option("--draws", type=click.IntRange(min=1), default=3, show_default=True, help="Draws of each control.")
@judge_options(several=False)
@utility_options
@selection_options
@rendering_options
@reply_options
@click.option("--plot", type=GIVEN_PATH, metavar="FILE", help="Picture of the curves (.svg, .png or .pdf).")
@order_option
@base_option
@device_option
@seed_option
@cache_option
@json_option
def brittleness_command(base: str, aligned: str, json_file: str | None, **options: Any) -> None:
    """Measure ASR(ALIGNED − Proj_k(ALIGNED − BASE)) over k, beside as many random directions of equal norm.

    The weakened models are made in memory, one after another. They are a measurement: no option writes their weights.

    \b
    lox-merge brittleness base aligned --prompts advbench.csv --limit 100 --judge openai:gpt-4o-mini
    lox-merge brittleness base aligned --prompts p.csv --utility-questions qa.csv --plot curve.svg --json b.json
    """
    ranks = whole_numbers(options["ranks"], "--ranks", DEFAULT_RANKS)
    if options["plot"]:
        from lox_merge.publish.figures.save import check_picture_file

        check_picture_file(options["plot"], "--plot")
    import_torch()
    from lox_merge.cli.json_file import give_result
    from lox_merge.cli.progress import byte_progress
    from lox_merge.cli.show_brittleness import print_brittleness
    from lox_merge.jobs.recipe import Recipe
    from lox_merge.safety.brittleness_job import brittleness

    selection = selection_of(options)
    recipe = Recipe(seed=options["seed"], **selection) if any(selection.values()) or not options["factors"] else None
    (judge,) = judges_of(options)
    prompts, utility = prompts_of(options), utility_of(options)
    with byte_progress(0, "decomposing") as decomposing:
        result = brittleness(
            base,
            aligned,
            prompts,
            judge,
            ranks=ranks,
            controls=options["controls"],
            draws=options["draws"],
            seed=options["seed"],
            recipe=recipe,
            utility=utility,
            decomposing=decomposing,
            **measured_in_memory(options),
        )
    give_result(json_file, {"command": "brittleness", **result.to_json()}, lambda: print_brittleness(result))
    if options["plot"]:
        from lox_merge.publish.documents.brittleness import Brittleness
        from lox_merge.publish.documents.shape import read_as
        from lox_merge.publish.figures.brittleness import brittleness_picture
        from lox_merge.publish.figures.save import save_picture

        document = read_as(Brittleness, result.to_json(), "the probe")
        save_picture(lambda: brittleness_picture(document), options["plot"])
    if result.aligned.judged == 0:
        raise LoxMergeError(f"the judge decided on none of {result.aligned.n} replies of the aligned model, so nothing can be compared with it.")
