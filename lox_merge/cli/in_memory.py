"""What commands ask for alike that change the rank of a model in memory: which matrices, how replies are made and kept."""

from __future__ import annotations

from typing import Any

import click

from lox_merge.cli.measuring import cache_of, options_in_order, rendering_of
from lox_merge.cli.options import GIVEN_FOLDER, GIVEN_PATH
from lox_merge.errors import RequestError

selection_options = options_in_order(
    click.option("--factors", type=GIVEN_PATH, help="File of lox-merge decompose for this pair: no SVD is spent."),
    click.option("--include", multiple=True, metavar="REGEX", help="Only tensors whose name matches; others stay as in ALIGNED. Repeatable."),
    click.option("--exclude", multiple=True, metavar="REGEX", help="Tensors whose name matches stay as in ALIGNED. Repeatable."),
    click.option("--linear-only", is_flag=True, help="Embeddings, lm_head and convolutions stay as in ALIGNED."),
)

reply_options = options_in_order(
    click.option("--max-new-tokens", type=click.IntRange(min=1), default=60, show_default=True, help="Length of a reply."),
    click.option("--batch-size", type=click.IntRange(min=1), help="Prompts at once.  [default: found automatically]"),
    click.option("--dtype", default="auto", show_default=True, metavar="auto|float32|bfloat16|float16", help="dtype of the model in memory."),
    click.option("--device-map", metavar="auto", help="Spread the model over several GPUs."),
    click.option("--replies", type=GIVEN_FOLDER, metavar="FOLDER", help="Keep replies here; the same command goes on from them."),
)


def selection_of(options: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe that `selection_options` name."""
    return {name: options[name] for name in ("include", "exclude", "linear_only")}


def source_options(options: dict[str, Any]) -> dict[str, Any]:
    """How the pair is opened."""
    return {name: options[name] for name in ("order_is_right", "base_is_right", "cache_dir")}


def measured_in_memory(options: dict[str, Any]) -> dict[str, Any]:
    """What `search` and `brittleness` take alike beside pair, prompts, judge, utility and recipe."""
    from lox_merge.safety.decoding import Decoding
    from lox_merge.safety.progress import terminal_progress

    model = {
        "dtype": options["dtype"],
        "device_map": options["device_map"],
        "decoding": Decoding(max_new_tokens=options["max_new_tokens"]),
        "rendering": rendering_of(options),
        "batch_size": options["batch_size"],
        "progress": terminal_progress,
    }
    same = {name: options[name] for name in ("factors", "replies", "device")}
    return {"model": model, "cache": cache_of(options), **same, **source_options(options)}


def whole_numbers(text: str, option: str, example: str) -> list[int]:
    """A list of whole numbers given as text. Raises RequestError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"{option} {text!r} is not a list of whole numbers, such as {example}.") from None
