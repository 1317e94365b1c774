"""Options about a model card that `card`, `push` and `harden --push` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lox_merge.publish.card import CardSettings

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

license_option: Decorator = click.option(
    "--license", metavar="ID", help="Licence of the output, such as apache-2.0 (default: that of ALIGNED's card)."
)
results_option: Decorator = click.option(
    "--results",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What --json of lox-merge asr, search or robustness wrote about this output. Repeatable.",
)
license_name_option: Decorator = click.option("--license-name", metavar="NAME", help="Its name, for --license other.")
license_link_option: Decorator = click.option("--license-link", metavar="URL", help="Where it can be read, for --license other.")
base_option: Decorator = click.option("--base", metavar="FOLDER", help="Where the base checkpoint is, if the manifest names a local folder.")
aligned_option: Decorator = click.option("--aligned", metavar="FOLDER", help="Where the aligned checkpoint is, if the manifest names a local folder.")


def license_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--license, --license-name and --license-link."""
    return license_option(license_name_option(license_link_option(command)))


def card_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--results, those of `license_options`, --base and --aligned."""
    return results_option(license_options(base_option(aligned_option(command))))


def card_settings(options: dict[str, Any]) -> CardSettings:
    """What the options of `card_options` and --cache-dir say. Raises RequestError."""
    from lox_merge.publish.card import CardSettings
    from lox_merge.publish.licence import given_licence

    return CardSettings(
        results=tuple(options.get("results") or ()),
        licence=given_licence(options["license"], options.get("license_name"), options.get("license_link")),
        sources={"base": options.get("base"), "aligned": options.get("aligned")},
        cache_dir=options.get("cache_dir"),
    )
