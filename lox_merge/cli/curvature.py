"""`lox-merge curvature`: how sharply safe behaviour is curved in the weights, and what fine-tuning does or would do to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lox_merge.cli.measuring import adapter_options, model_options
from lox_merge.cli.options import GIVEN_PATH, json_option, number, seed_option
from lox_merge.cli.start import import_torch
from lox_merge.errors import RequestError

if TYPE_CHECKING:
    from lox_merge.diagnostics.curvature.job import Curvature


@click.command("curvature", short_help="How curved safe behaviour is in the weights, and how data sets would bend towards it.")
@click.argument("aligned")
@click.argument("finetuned", nargs=-1)
@click.option(
    "--completions",
    required=True,
    type=GIVEN_PATH,
    metavar="FILE",
    help="Safe completions: JSONL, JSON or CSV with messages, prompt and response, or text.",
)
@click.option(
    "--data",
    multiple=True,
    type=GIVEN_PATH,
    metavar="FILE",
    help="Data that might be fine-tuned on: its coupling and predicted loss. Repeatable; ranked by risk.",
)
@click.option("--limit", default="100", show_default=True, metavar="N|all", help="Safe completions, a seeded sample of more.")
@click.option("--max-length", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a conversation that are kept.")
@click.option("--reduction", type=click.Choice(["sum", "mean"]), default="sum", show_default=True, help="Of log-likelihoods over tokens.")
@click.option("--energy", default="0.9", show_default=True, metavar="FLOAT", help="d is the fewest eigenvalues with this share of the trace.")
@click.option("--dimension", type=click.IntRange(min=1), metavar="D", help="d itself, instead of --energy.")
@click.option("--layers", metavar="N,N,…", help="Only these layers.")
@click.option("--only", multiple=True, metavar="REGEX", help="Only parameters whose names match. Repeatable.")
@click.option("--exclude", multiple=True, metavar="REGEX", help="Without parameters whose names match. Repeatable.")
@click.option("--batches", type=click.IntRange(min=1), default=8, show_default=True, help="Batches of each data set.")
@click.option("--data-batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Examples in each.")
@click.option("--learning-rate", default="1e-5", show_default=True, metavar="FLOAT", help="Predictions are at t = learning rate × steps.")
@click.option("--steps", default="10,30,100", show_default=True, metavar="N,N,…", help="Steps of plain gradient descent.")
@click.option("--projected", type=click.IntRange(min=2), metavar="K", help="Also the paper's estimate of overlap: random projection to K (4096).")
@click.option("--projection-seeds", type=click.IntRange(min=1), default=3, show_default=True, help="How often it is drawn.")
@click.option("--memory", default="2", show_default=True, metavar="GB", help="Beside the model; with less, more passes over the completions.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--no-chat-template", is_flag=True, help="Prompts and responses as bare text.")
@model_options
@adapter_options
@seed_option
@click.option("--plot", type=GIVEN_PATH, metavar="FILE", help="Picture of spectra, overlaps and predictions (.svg, .png or .pdf).")
@json_option
def curvature_command(aligned: str, finetuned: tuple[str, ...], json_file: str | None, **options: Any) -> None:
    """Fisher spectra of ALIGNED on safe completions, overlap scores of FINETUNED models, and the risk of --data.

    ALIGNED and FINETUNED are folders or Hub ids; FINETUNED may be PEFT adapters over ALIGNED, or all of them
    over --adapter-base. Everything is exact, without a random
    projection and without a gradient per completion in memory. Nothing is written but --json and --plot.

    \b
    lox-merge curvature aligned --completions refusals.jsonl
    lox-merge curvature aligned tuned adapter --completions refusals.jsonl
    lox-merge curvature aligned --completions refusals.jsonl --data mine.jsonl --data other.csv
    """
    result = _run(aligned, finetuned, options)
    import_torch()
    from lox_merge.cli.json_file import give_result
    from lox_merge.cli.show_curvature import print_curvature

    give_result(json_file, {"command": "curvature", **result.to_json()}, lambda: print_curvature(result))
    if options["plot"]:
        from lox_merge.publish.documents import curvature as documents
        from lox_merge.publish.documents.shape import read_as
        from lox_merge.publish.figures.curvature import curvature_picture
        from lox_merge.publish.figures.save import save_picture

        document = read_as(documents.Curvature, result.to_json(), "the measurement")
        save_picture(lambda: curvature_picture(document), options["plot"])


def _run(aligned: str, finetuned: tuple[str, ...], options: dict[str, Any]) -> Curvature:
    layers = None if options["layers"] is None else tuple(_whole_numbers(options["layers"], "--layers"))
    steps = tuple(_whole_numbers(options["steps"], "--steps"))
    limit = _limit(options["limit"])
    memory = number(options["memory"], "--memory") * 1e9
    if not 1 <= memory < 2**63:
        raise RequestError(f"--memory {options['memory']!r} is not an amount of memory in GB, such as 2.")
    if options["plot"]:
        from lox_merge.publish.figures.save import check_picture_file

        check_picture_file(options["plot"], "--plot")
    from lox_merge.diagnostics.curvature.job import curvature
    from lox_merge.diagnostics.curvature.settings import CurvatureSettings
    from lox_merge.safety.chat import Rendering
    from lox_merge.safety.progress import terminal_progress

    settings = CurvatureSettings(
        energy=number(options["energy"], "--energy"),
        layers=layers,
        limit=limit,
        steps=steps,
        learning_rate=number(options["learning_rate"], "--learning-rate"),
        memory=int(memory),
        projection=options["projected"],
        **{
            name: options[name]
            for name in ("reduction", "dimension", "only", "exclude", "max_length", "batches", "data_batch_size", "projection_seeds", "seed")
        },
    )
    return curvature(
        aligned,
        options["completions"],
        finetuned=finetuned,
        data=options["data"],
        settings=settings,
        rendering=Rendering(options["system"], False if options["no_chat_template"] else None),
        progress=terminal_progress,
        **{name: options[name] for name in ("device", "dtype", "device_map", "batch_size", "cache_dir", "adapter_base", "base_is_right")},
    )


def _limit(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise RequestError(f"--limit {text!r} is neither all nor a whole number, such as 100.") from None


def _whole_numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"{option} {text!r} is not a list of whole numbers, such as 0,1,2.") from None
