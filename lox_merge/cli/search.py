"""`lox-merge search`: the smallest rank whose model is about as safe as the aligned one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lox_merge.cli.in_memory import measured_in_memory, reply_options, selection_of, selection_options, source_options, whole_numbers
from lox_merge.cli.measuring import judge_options, judges_of, prompt_options, prompts_of, rendering_options, utility_of, utility_options
from lox_merge.cli.options import GIVEN_PATH, base_option, cache_option, device_option, json_option, number, order_option, seed_option
from lox_merge.cli.start import import_torch
from lox_merge.cli.tune import check_tune_options, picked_recipe, tune_models, tune_options
from lox_merge.errors import LoxMergeError, RequestError

if TYPE_CHECKING:
    from lox_merge.jobs.recipe import Recipe
    from lox_merge.safety.search import RankSearch
    from lox_merge.safety.tuning import Tuning

DEFAULT_RANKS = "0,1,2,3,4,6,8"
DEFAULT_BISECT_LIMIT = 64


@click.command("search", short_help="Find the smallest rank that is as safe as the aligned model (effective rank).")
@click.argument("base")
@click.argument("aligned")
@prompt_options
@click.option("--ranks", metavar="R,R,…", help=f"Ranks to measure.  [default: {DEFAULT_RANKS}]")
@click.option("--bisect", is_flag=True, help="Bisect instead of a list of ranks; neighbours are measured too.")
@click.option("--max-rank", type=click.IntRange(min=1), help=f"Highest rank of --bisect.  [default: {DEFAULT_BISECT_LIMIT}, or what --factors holds]")
@click.option("--rho", default="0.01", show_default=True, metavar="FLOAT", help="A rank passes when its ASR is above the aligned model's by less.")
@click.option("--confident", is_flag=True, help="A rank passes only when the upper 95 % bound of that increase is below rho.")
@judge_options(several=False)
@utility_options
@selection_options
@rendering_options
@reply_options
@tune_options
@click.option("--write", type=GIVEN_PATH, metavar="OUT", help="Harden with the rank found (or the trial picked), to the folder OUT.")
@click.option("--alpha", default="1.25", show_default=True, metavar="FLOAT", help="Extrapolation factor of --write.")
@click.option("--plot", type=GIVEN_PATH, metavar="FILE", help="Picture of the curve (.svg, .png or .pdf).")
@order_option
@base_option
@device_option
@seed_option
@cache_option
@click.option("--overwrite", is_flag=True, help="Start anew where OUT holds another output of lox-merge.")
@json_option
def search_command(base: str, aligned: str, json_file: str | None, **options: Any) -> None:
    """Measure ASR(base + Proj_r(ALIGNED − BASE)) over ranks r and find the smallest r that is as safe as ALIGNED.

    The models with little alignment that this needs are made in memory, one after another, and never written. Without a
    rank that satisfies --rho the exit code is 1; the curve is shown and written all the same.

    \b
    lox-merge search base aligned --prompts advbench.csv --limit 100 --judge openai:gpt-4o-mini
    lox-merge search base aligned --prompts p.csv --bisect --confident --write hardened --plot curve.svg
    lox-merge search base aligned --prompts p.csv --tune --attack train.jsonl --utility-prompts harmless.txt --study study.log
    """
    import_torch()
    from lox_merge.jobs.recipe import Recipe

    check_tune_options(click.get_current_context())
    recipe = Recipe(alpha=number(options["alpha"], "--alpha"), seed=options["seed"], **selection_of(options))
    chosen = recipe if any(selection_of(options).values()) or not options["factors"] else None
    if options["write"]:
        from lox_merge.jobs.harden import plan_hardening
        from lox_merge.jobs.output_folder import check_output

        plan_hardening(base, aligned, options["write"], recipe=recipe, form="usual", **source_options(options))  # before an hour of replies
        check_output(options["write"], overwrite=options["overwrite"])
    if options["pick"] is not None:
        recipe = picked_recipe(base, aligned, options)
        _write(base, aligned, recipe, options, json_file)
        return
    if options["tune"]:
        _tune(base, aligned, chosen, options, json_file)
        return
    result = _search(base, aligned, chosen, options, json_file, show=json_file != "-")
    _check_found(result, write=options["write"] is not None)
    if options["write"]:
        assert result.effective_rank is not None
        _write(base, aligned, recipe.with_rank(result.effective_rank), options, None, quiet=json_file == "-")


def _tune(base: str, aligned: str, recipe: Recipe | None, options: dict[str, Any], json_file: str | None) -> None:
    """Runs the study and shows it in every way asked for."""
    from lox_merge.cli.json_file import give_result
    from lox_merge.cli.show_tune import print_tuning

    if options["plot"]:
        from lox_merge.publish.figures.save import check_picture_file

        check_picture_file(options["plot"], "--plot")
    result = tune_models(base, aligned, recipe, options)
    give_result(json_file, {"command": "search --tune", **result.to_json()}, lambda: print_tuning(result))
    if options["plot"]:
        _plot_tuning(result, options["plot"])
    if not result.trials:
        raise LoxMergeError("no trial gave figures; what each of them met is said above. Ask for other ranks and alphas, or another attack.")


def effective_rank(base: str, aligned: str, recipe: Recipe, *, prompts: str, show: bool, **given: Any) -> int:
    """The rank that `lox-merge search` finds, with its defaults for all options but those given. show: print its table.

    Raises LoxMergeError when there is none to harden with.
    """
    arguments = ["--prompts", prompts, "--", base, aligned]
    options = search_command.make_context("search", arguments, auto_envvar_prefix="LOX_MERGE_SEARCH").params | given
    result = _search(base, aligned, recipe, options, None, show=show)
    _check_found(result, write=True)
    assert result.effective_rank is not None
    return result.effective_rank


def _search(base: str, aligned: str, recipe: Recipe | None, options: dict[str, Any], json_file: str | None, *, show: bool) -> RankSearch:
    """Searches and shows the result in every way asked for."""
    ranks, rho = chosen_ranks(options), number(options["rho"], "--rho")
    if options["plot"]:
        from lox_merge.publish.figures.save import check_picture_file

        check_picture_file(options["plot"], "--plot")
    from lox_merge.cli.json_file import give_result
    from lox_merge.cli.progress import byte_progress
    from lox_merge.cli.show_search import print_search
    from lox_merge.safety.search_job import search

    (judge,) = judges_of(options)
    prompts, utility = prompts_of(options), utility_of(options)
    with byte_progress(0, "decomposing") as decomposing:
        result = search(
            base,
            aligned,
            prompts,
            judge,
            ranks=ranks,
            rho=rho,
            bisect=options["bisect"],
            confident=options["confident"],
            recipe=recipe,
            utility=utility,
            decomposing=decomposing,
            **measured_in_memory(options),
        )

    def shown() -> None:
        if show:
            print_search(result, base=Path(base).name, aligned=Path(aligned).name)

    give_result(json_file, {"command": "search", **result.to_json()}, shown)
    if options["plot"]:
        _plot(result, options["plot"])
    return result


def _plot_tuning(result: Tuning, file: Path) -> None:
    from lox_merge.publish.documents.shape import read_as
    from lox_merge.publish.documents.tuning import Tuning as Document
    from lox_merge.publish.figures.save import save_picture
    from lox_merge.publish.figures.style import single_panel
    from lox_merge.publish.figures.tuning import draw_front

    document = read_as(Document, result.to_json(), "the study")
    save_picture(lambda: single_panel(lambda axes: draw_front(axes, document), width=6.4, height=4.0), file)


def _plot(result: RankSearch, file: Path) -> None:
    from lox_merge.publish.documents.search import Search
    from lox_merge.publish.documents.shape import read_as
    from lox_merge.publish.figures.save import save_picture
    from lox_merge.publish.figures.search import draw_rank_curve
    from lox_merge.publish.figures.style import single_panel

    document = read_as(Search, result.to_json(), "the search")
    save_picture(lambda: single_panel(lambda axes: draw_rank_curve(axes, document), width=6.4, height=4.0), file)


def chosen_ranks(options: dict[str, Any]) -> list[int]:
    """The list of ranks, or the highest one of a bisection. Raises RequestError."""
    if options["bisect"]:
        if options["ranks"]:
            raise RequestError("--ranks names what to measure and --bisect chooses it; give one of the two (--max-rank bounds a bisection).")
        if options["max_rank"] is None and options["factors"]:
            from lox_merge.jobs.factors import Factors

            with Factors.open(options["factors"]) as factors:
                return [min(DEFAULT_BISECT_LIMIT, factors.rank)]
        return [options["max_rank"] or DEFAULT_BISECT_LIMIT]
    if options["max_rank"] is not None:
        raise RequestError("--max-rank bounds a bisection; add --bisect, or name the ranks with --ranks.")
    return whole_numbers(options["ranks"] or DEFAULT_RANKS, "--ranks", DEFAULT_RANKS)


def _check_found(result: RankSearch, *, write: bool) -> None:
    """Raises LoxMergeError when there is no rank to go on with."""
    if result.effective_rank is None:
        raise LoxMergeError(
            f"no measured rank satisfies rho = {result.rho:g}{' with confidence' if result.confident else ''}; "
            f"{'nothing was hardened; ' if write else ''}try higher ranks, more prompts, or another rho."
        )
    if write and result.effective_rank == 0:
        raise LoxMergeError(
            "the effective rank is 0: the base model's matrices are as safe as the aligned ones on these prompts, so there is nothing to "
            "extrapolate and nothing was hardened. Check the prompts and the judge, or choose a rank yourself: lox-merge harden."
        )


def _write(base: str, aligned: str, recipe: Recipe, options: dict[str, Any], json_file: str | None, *, quiet: bool = False) -> None:
    from lox_merge.cli.adapter import adapter_json, harden_as_adapter, print_adapter
    from lox_merge.cli.json_file import write_json
    from lox_merge.cli.progress import byte_progress
    from lox_merge.cli.show import print_result
    from lox_merge.jobs.factors import open_factors
    from lox_merge.jobs.harden import execute, plan_hardening

    with open_factors(options["factors"]) as held:
        plan = plan_hardening(base, aligned, options["write"], recipe=recipe, factors=held, form="usual", **source_options(options))
        settings, show = {"device": options["device"], "overwrite": options["overwrite"]}, not quiet and json_file != "-"
        as_adapter = plan.form == "adapter"
        if as_adapter:
            result = harden_as_adapter(plan, asked=False, **settings)
        else:
            with byte_progress(plan.bytes_written, "hardening") as progress:
                result = execute(plan, progress=progress, **settings)
    if json_file:
        write_json(json_file, adapter_json(result) if as_adapter else result.to_json())
    if show:
        (print_adapter if as_adapter else print_result)(result)
