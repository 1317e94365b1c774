"""Options that several commands share."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lox_merge.checkpoint.dtypes import OUTPUT_DTYPES
from lox_merge.errors import RecipeError, RequestError
from lox_merge.home_paths import expanded
from lox_merge.safety.seeds import HIGHEST_SEED

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class GivenPath(click.Path):
    """A file or folder of the user's. An empty text would be the current folder, and `~` a folder of that name where no shell expands it."""

    def __init__(self, **kinds: bool) -> None:
        super().__init__(path_type=Path, **kinds)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty. Give a path.", param, ctx)
        return super().convert(expanded(value), param, ctx)


GIVEN_PATH, GIVEN_FILE, GIVEN_FOLDER = GivenPath(), GivenPath(dir_okay=False), GivenPath(file_okay=False)

_json_option: Decorator = click.option(
    "--json", "json_file", metavar="FILE", help="Write the result as JSON to FILE ('-': standard output, without the table)."
)
device_option: Decorator = click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where the SVD runs; auto takes a GPU when there is one."
)
workers_option: Decorator = click.option(
    "--workers",
    default="1",
    show_default=True,
    metavar="N|auto",
    help="Processes that write shards at a time, if memory holds them. The bytes are the same.",
)
executor_option: Decorator = click.option(
    "--executor",
    default="processes",
    show_default=True,
    metavar="processes|ray|ray://HOST:PORT",
    help="Where workers are: processes of this machine, or a Ray cluster (shared storage, or --weights-on-hub).",
)
SEED = click.IntRange(0, HIGHEST_SEED)
seed_option: Decorator = click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of every random number.")
cache_option: Decorator = click.option("--cache-dir", type=GIVEN_PATH, help="Hub cache folder (default: the Hub's own).")


def dtype_option(mirrored: str) -> Decorator:
    """mirrored: the argument whose dtypes the output has otherwise."""
    return click.option("--dtype", metavar="|".join(OUTPUT_DTYPES), help=f"Output dtype of every floating tensor (default: as in {mirrored}).")


fused_option: Decorator = click.option(
    "--fused", default="split", show_default=True, metavar="split|whole", help="Gate and up fused inside stacked experts: two matrices, or one."
)
tolerance_option: Decorator = click.option(
    "--tolerance", default="1e-3", show_default=True, metavar="FLOAT", help="Relative error wanted of each truncated SVD."
)
order_option: Decorator = click.option(
    "--order-is-right", is_flag=True, help="BASE and ALIGNED are not swapped, although only BASE has a chat template."
)
base_option: Decorator = click.option(
    "--base-is-right", is_flag=True, help="BASE holds the weights that an adapter was trained on, although it names another model."
)


_STANDARD_OUTPUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """--json, looked at before a command does anything: a file that can't be written at the end would cost its work."""

    @functools.wraps(function)
    def checked(*arguments: Any, **options: Any) -> Any:
        if options["json_file"] in _STANDARD_OUTPUT:  # opened anew it would have a place of its own in a file, and the table another
            options["json_file"] = "-"
        if options["json_file"] == "-" and sys.stdout is None:
            raise RequestError("--json -: standard output is closed. Name a file, or leave it open.")
        if options["json_file"] not in (None, "-"):
            from lox_merge.cli.json_file import check_json_file

            check_json_file(expanded(options["json_file"]), [value for name, value in options.items() if name != "json_file"])
        return function(*arguments, **options)

    return _json_option(checked)


def pattern_pairs(values: tuple[str, ...], option: str) -> tuple[tuple[str, str], ...]:
    """'REGEX=VALUE' texts as pairs; the last '=' separates, since a regular expression may hold one."""
    pairs = []
    for text in values:
        pattern, separator, value = text.rpartition("=")
        if not separator or not pattern or not value:
            raise RecipeError(f"{option} {text!r} is not REGEX=VALUE, such as 'mlp=4'.")
        pairs.append((pattern, value))
    return tuple(pairs)


def number(text: str, option: str) -> float:
    """A finite float given as text. Raises RecipeError."""
    try:
        value = float(text)
    except ValueError:
        raise RecipeError(f"{option}: {text!r} is not a number.") from None
    # NaN compares as false with everything: as a threshold it would make every attack a failure.
    if not math.isfinite(value):
        raise RecipeError(f"{option}: {text!r} is not a finite number. Give one.")
    return value
