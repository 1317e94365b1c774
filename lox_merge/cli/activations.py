"""`lox-merge activations`: where models lie between base and aligned in their hidden states, and which subspaces those fill."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lox_merge.cli.measuring import model_options, rendering_of, rendering_options, right_base_option
from lox_merge.cli.options import GIVEN_PATH, json_option, number, seed_option
from lox_merge.cli.start import import_torch
from lox_merge.errors import RecipeError

if TYPE_CHECKING:
    from lox_merge.diagnostics.activations.results import Activations


@click.command("activations", short_help="Alignment direction by layer, residual directions of domains, overlaps of prompt sets' subspaces.")
@click.argument("base")
@click.argument("aligned")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--pairs",
    multiple=True,
    type=GIVEN_PATH,
    metavar="FILE",
    help="Prompts with responses, or conversations (JSONL, JSON, CSV): a domain. Repeatable.",
)
@click.option("--prompts", multiple=True, metavar="[NAME=]FILE", help="Prompts whose last tokens' states are compared. Give two or more.")
@click.option("--tokens", type=click.IntRange(min=1), default=64, show_default=True, metavar="T", help="Read the first T tokens of each response.")
@click.option("--layers", default="all", show_default=True, metavar="0,5,-1|all", help="0: embeddings; -1: what the output head reads.")
@click.option("--eta", default="0.1,0.25,0.5,0.75,0.9,0.95,0.99", show_default=True, metavar="ETA,…", help="Shares of energy for the overlaps.")
@click.option("--directions", type=click.IntRange(min=1), default=4, show_default=True, metavar="J", help="Leading directions of each domain.")
@click.option(
    "--vector", type=click.Choice(["mean", "last"]), default="mean", show_default=True, help="Of the response's states read, for residuals."
)
@click.option(
    "--permutations", type=click.IntRange(min=0), default=200, show_default=True, metavar="N", help="Draws of rows shuffled between domains."
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Read the first N of each file only.")
@rendering_options
@click.option("--one-by-one", is_flag=True, help="Keep one model in memory at a time.  [default: where they do not fit together]")
@model_options
@right_base_option
@seed_option
@click.option("--plot", type=GIVEN_PATH, metavar="FILE", help="Picture of positions by layer and of the overlaps (.svg, .png or .pdf).")
@json_option
def activations_command(base: str, aligned: str, models: tuple[str, ...], json_file: str | None, **options: Any) -> None:
    """Compare the hidden states of BASE, ALIGNED and each MODEL on the same texts.

    \b
    position  of each MODEL on the alignment direction of each layer:
              0 is base, 1 is aligned; also on responses that the direction
              was not made of
    residual  leading directions of what alignment changed at the last layer,
              and whether two domains (--pairs) share them
    overlap   of the subspaces that two prompt sets (--prompts) fill

    Give harmless pairs beside harmful ones: they are the control. A MODEL may be a PEFT adapter over ALIGNED.

    \b
    lox-merge activations base aligned finetuned --pairs harmful.jsonl --pairs harmless.jsonl
    lox-merge activations base aligned --prompts harmful.txt --prompts harmless.txt
    """
    result = _run(base, aligned, models, options)
    import_torch()
    from lox_merge.cli.json_file import give_result
    from lox_merge.cli.show_activations import print_activations

    give_result(json_file, {"command": "activations", **result.to_json()}, lambda: print_activations(result))
    if options["plot"]:
        from lox_merge.publish.documents import activations as documents
        from lox_merge.publish.documents.shape import read_as
        from lox_merge.publish.figures.activations import activations_picture
        from lox_merge.publish.figures.save import save_picture

        document = read_as(documents.Activations, result.to_json(), "the comparison")
        save_picture(lambda: activations_picture(document), options["plot"])


def _run(base: str, aligned: str, models: tuple[str, ...], options: dict[str, Any]) -> Activations:
    layers, etas, prompts = _layers(options["layers"]), [number(text, "--eta") for text in options["eta"].split(",")], _named(options["prompts"])
    if options["plot"]:
        from lox_merge.publish.figures.save import check_picture_file

        check_picture_file(options["plot"], "--plot")
    from lox_merge.diagnostics.activations.run import activations
    from lox_merge.safety.progress import terminal_progress

    same = ("pairs", "tokens", "directions", "vector", "permutations", "limit", "seed", "batch_size", "device", "dtype", "device_map", "cache_dir")
    return activations(
        base,
        aligned,
        models,
        prompts=prompts,
        layers=layers,
        etas=etas,
        rendering=rendering_of(options),
        one_by_one=True if options["one_by_one"] else None,
        progress=terminal_progress,
        base_is_right=options["base_is_right"],
        **{name: options[name] for name in same},
    )


def _layers(text: str) -> list[int] | None:
    if text == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--layers {text!r} is neither all nor numbers such as 0,5,-1.") from None


def _named(values: tuple[str, ...]) -> dict[str, str]:
    """'NAME=FILE' or 'FILE', whose name without suffix is then the set's."""
    found: dict[str, str] = {}
    for value in values:
        name, separator, file = value.partition("=")
        if not separator or Path(value).exists():
            name, file = Path(value).stem, value
        if not name or not file:
            raise RecipeError(f"--prompts {value!r} is not NAME=FILE, such as harmful=prompts.txt.")
        if name in found:
            raise RecipeError(f"two sets of prompts are called {name!r}. Tell them apart: --prompts NAME=FILE.")
        found[name] = file
    return found
