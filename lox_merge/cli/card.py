"""`lox-merge card`: the model card of an output."""

from __future__ import annotations

from typing import Any

import click

from lox_merge.cli.options import cache_option, json_option
from lox_merge.cli.publishing import card_options, card_settings


@click.command("card", short_help="Write the model card of a hardened model, from its manifest and from results.")
@click.argument("out")
@click.option("--repo", metavar="NAMESPACE/NAME", help="Where it will be published, for the lines that show how to use it.")
@card_options
@click.option("--print", "print_only", is_flag=True, help="Print the card and write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace a README.md that was written or changed by hand.")
@cache_option
@json_option
def card_command(out: str, repo: str | None, print_only: bool, overwrite: bool, json_file: str | None, **options: Any) -> None:
    """Write README.md (and its picture) into the finished output OUT.

    The card says what was done, from lox_merge.json, and what was measured, from --results; without results it says that the model
    was not evaluated. lox-merge push publishes it, with what you add to it by hand.

    \b
    lox-merge card out --repo me/model-lox --results asr.json --results robustness.json
    lox-merge card out --license apache-2.0 --print
    """
    from lox_merge.cli.json_file import write_json
    from lox_merge.publish.access import check_repository_name
    from lox_merge.publish.card import build_card
    from lox_merge.publish.output import open_output
    from lox_merge.publish.readme import write_card

    if repo is not None:
        check_repository_name(repo)
    output = open_output(out)
    card = build_card(output, repo, card_settings(options))
    if print_only:
        if json_file != "-":
            click.echo(card.content, nl=False)
    else:
        write_card(output, card, overwrite=overwrite)
    if json_file:
        metadata = card.data.to_dict()  # type: ignore[no-untyped-call]
        write_json(json_file, {"command": "card", "output": output.name, "metadata": metadata, "files": list(card.files), "written": not print_only})
    if json_file != "-" and not print_only:
        evaluated = "with results" if options["results"] else 'it says "not evaluated": give --results'
        click.echo(f"{' and '.join(card.files)} written to {output.name} ({evaluated}; licence {card.data.license}).")
