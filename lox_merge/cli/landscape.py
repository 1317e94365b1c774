"""`lox-merge landscape`: attack success around a model and between models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lox_merge.cli.measuring import (
    adapter_options,
    cache_of,
    judge_options,
    judges_of,
    model_options,
    prompt_options,
    prompts_of,
    rendering_of,
    rendering_options,
    utility_of,
    utility_options,
)
from lox_merge.cli.options import GIVEN_FILE, GIVEN_PATH, json_option, number, seed_option
from lox_merge.cli.start import import_torch
from lox_merge.errors import RecipeError

if TYPE_CHECKING:
    from lox_merge.safety.landscape.results import Landscape


@click.command("landscape", short_help="Measure attack success around a model and between models.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL [OTHER...]")
@prompt_options
@click.option("--random", type=click.IntRange(min=1), metavar="N", help="Random directions.  [default: 3; with an OTHER: controls, none]")
@click.option("--plane", is_flag=True, help="Two directions at a time: two random ones, or towards OTHER and a random one.")
@click.option("--range", "extent", metavar="LOW:HIGH", help="Coordinates measured.  [default: -0.5:0.5; towards models -0.5:1.5]")
@click.option("--second-range", metavar="LOW:HIGH", help="The same of a plane's second direction.")
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Equal parts of that range: N + 1 points.  [default: 20; planes 8]")
@click.option("--mark", "marks", multiple=True, metavar="NAME=MODEL", help="Show where this model lies among them. Repeatable.")
@click.option("--include", multiple=True, metavar="REGEX", help="Random directions move these tensors only (default: all but norms, biases).")
@click.option("--exclude", multiple=True, metavar="REGEX", help="Random directions leave these tensors. Repeatable.")
@rendering_options
@judge_options(several=True)
@utility_options
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=60, show_default=True, help="Longest reply, in tokens.")
@model_options
@adapter_options
@click.option("--points", type=GIVEN_FILE, metavar="FILE", help="Keep points here; the same command goes on from them.")
@click.option("--plot", type=GIVEN_PATH, metavar="FILE", help="Picture of it (.svg, .png or .pdf).")
@seed_option
@json_option
def landscape_command(models: tuple[str, ...], json_file: str | None, **options: Any) -> None:
    """Measure ASR (and utility) at MODEL + a·d₁ (+ b·d₂), the weights of every point made in memory and never written.

    MODEL alone: random directions, Gaussian and scaled in every tensor to its norm, and VISAGE with its spread over them. One
    OTHER: the line to it and beyond. Two or three: the plane d₁ = OTHER₁ − MODEL, d₂ = the mean of the further ones − MODEL. Name
    an OTHER by NAME=MODEL; an OTHER may be a PEFT adapter over MODEL, or all of
    them over --adapter-base.

    \b
    lox-merge landscape aligned --prompts advbench.csv --limit 80 --points points.jsonl --plot basin.svg
    lox-merge landscape aligned base --mark hardened=out --random 2 --prompts p.csv --utility-text wiki.txt
    lox-merge landscape aligned base ft1 ft2 --prompts p.csv --json plane.json --plot plane.svg
    """
    import_torch()
    from lox_merge.cli.json_file import give_result
    from lox_merge.cli.show_landscape import print_landscape
    from lox_merge.safety.decoding import Decoding
    from lox_merge.safety.landscape.run import landscape
    from lox_merge.safety.progress import terminal_progress

    # Everything that can be refused is refused before a model is loaded.
    if options["plot"]:
        from lox_merge.publish.figures.save import check_picture_file

        check_picture_file(options["plot"], "--plot")
    judges, prompts, utility = judges_of(options), prompts_of(options), utility_of(options)
    result = landscape(
        models[0],
        prompts,
        judges,
        others=_named(models[1:]),
        marks=_named(options["marks"]),
        plane=options["plane"] or None,
        random=options["random"],
        extent=_range(options["extent"], "--range"),
        second_extent=_range(options["second_range"], "--second-range"),
        steps=options["steps"],
        include=options["include"],
        exclude=options["exclude"],
        seed=options["seed"],
        loading={
            "dtype": options["dtype"],
            "device_map": options["device_map"],
            "decoding": Decoding(max_new_tokens=options["max_new_tokens"]),
            "rendering": rendering_of(options),
            "batch_size": options["batch_size"],
        },
        adapter_base=options["adapter_base"],
        base_is_right=options["base_is_right"],
        utility=utility,
        cache=cache_of(options),
        points=options["points"],
        device=options["device"],
        cache_dir=options["cache_dir"],
        progress=terminal_progress,
    )
    give_result(json_file, result.to_json(), lambda: print_landscape(result))
    if options["plot"]:
        _plot(result, options["plot"])


def _plot(result: Landscape, file: Path) -> None:
    from lox_merge.publish.documents.landscape import Landscape as Document
    from lox_merge.publish.documents.shape import read_as
    from lox_merge.publish.figures.landscape import landscape_figure
    from lox_merge.publish.figures.save import save_picture

    document = read_as(Document, result.to_json(), "the landscape")
    save_picture(lambda: landscape_figure(document, next(iter(document.judges))), file)


def _named(texts: tuple[str, ...]) -> dict[str, str]:
    """'NAME=MODEL' or MODEL, whose name is then its folder's. Raises RecipeError for two of one name."""
    found: dict[str, str] = {}
    for text in texts:
        name, separator, model = text.partition("=")
        if not separator or Path(text).exists():
            name, model = Path(text).name, text
        if not name or not model:
            raise RecipeError(f"{text!r} is not NAME=MODEL, such as hardened=out.")
        if name in found:
            raise RecipeError(f"two models are called {name!r}, so their results could not be told apart. Name them: first={model} second=….")
        found[name] = model
    return found


def _range(text: str | None, option: str) -> tuple[float, float] | None:
    if text is None:
        return None
    low, separator, high = text.partition(":")
    if not separator:
        raise RecipeError(f"{option} {text!r} is not LOW:HIGH, such as -0.5:0.5.")
    return number(low, option), number(high, option)
