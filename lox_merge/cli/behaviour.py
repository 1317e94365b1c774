"""`lox-merge behaviour`: what models expect, token by token, between the base model and the aligned one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lox_merge.cli.measuring import model_options, rendering_of, rendering_options, right_base_option
from lox_merge.cli.options import GIVEN_PATH, json_option, seed_option
from lox_merge.cli.start import import_torch
from lox_merge.errors import RequestError

if TYPE_CHECKING:
    from lox_merge.diagnostics.behaviour.results import Behaviour


@click.command("behaviour", short_help="Per-token KL from base, log-probabilities, next tokens: is alignment a few tokens deep, is it undone?")
@click.argument("base")
@click.argument("aligned")
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option(
    "--pairs",
    multiple=True,
    type=GIVEN_PATH,
    metavar="FILE",
    help="Prompts with responses, conversations, or texts (JSONL, JSON, CSV). Repeatable: each file is a set of its own.",
)
@click.option("--next", "prompts", multiple=True, metavar="PROMPT", help="Show what each model says next to this prompt. Repeatable.")
@click.option("--next-file", type=GIVEN_PATH, metavar="FILE", help="Such prompts, with a column prefill or not; or bare text.")
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, metavar="N", help="Most probable tokens of each model to show.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Read the first N texts of each file only.")
@rendering_options
@click.option("--shared-vocabulary", is_flag=True, help="Compare models of different vocabulary sizes over the tokens they share.")
@click.option("--one-by-one", is_flag=True, help="Keep one model in memory at a time.  [default: where they do not fit together]")
@model_options
@right_base_option
@seed_option
@click.option("--plot", type=GIVEN_PATH, metavar="FILE", help="Picture of KL by token and of the reversion (.svg, .png or .pdf).")
@json_option
def behaviour_command(base: str, aligned: str, models: tuple[str, ...], json_file: str | None, **options: Any) -> None:
    """Compare what BASE, ALIGNED and each MODEL expect of the same texts and after the same prompts.

    \b
    KL        of ALIGNED and every MODEL from BASE at each token of the
              responses: does alignment sit in the first few tokens?
    log p     of the texts under every model
    reversion where a MODEL lies between ALIGNED (0) and BASE (1)
    next      most probable tokens, entropy, Jensen–Shannon distances

    Give harmless pairs beside harmful ones: a model that only changed its style moves on both. --prefill begins the replies to --next.
    A MODEL may be a PEFT adapter over ALIGNED.

    \b
    lox-merge behaviour base aligned finetuned --pairs harmful.jsonl --pairs harmless.jsonl
    lox-merge behaviour base aligned --next "How do I begin?" --prefill "Sure"
    """
    if options["prefill"] is not None and not options["prompts"]:
        raise RequestError("--prefill is how the replies to --next begin; responses of --pairs are given whole. Add --next, or leave it out.")
    result = _run(base, aligned, models, options)
    import_torch()
    from lox_merge.cli.json_file import give_result
    from lox_merge.cli.show_behaviour import print_behaviour

    give_result(json_file, {"command": "behaviour", **result.to_json()}, lambda: print_behaviour(result))
    if options["plot"]:
        from lox_merge.publish.documents import behaviour as documents
        from lox_merge.publish.documents.shape import read_as
        from lox_merge.publish.figures.behaviour import behaviour_picture
        from lox_merge.publish.figures.save import save_picture

        document = read_as(documents.Behaviour, result.to_json(), "the comparison")
        save_picture(lambda: behaviour_picture(document), options["plot"])


def _run(base: str, aligned: str, models: tuple[str, ...], options: dict[str, Any]) -> Behaviour:
    if options["plot"]:
        from lox_merge.publish.figures.save import check_picture_file

        check_picture_file(options["plot"], "--plot")
    from dataclasses import replace

    from lox_merge.diagnostics.behaviour.run import behaviour
    from lox_merge.diagnostics.behaviour.texts import Prefix, load_prefixes
    from lox_merge.safety.progress import terminal_progress

    prefixes = [Prefix(prompt, options["prefill"]) for prompt in options["prompts"]]
    if options["next_file"] is not None:
        prefixes += load_prefixes(options["next_file"])
    return behaviour(
        base,
        aligned,
        models,
        pairs=options["pairs"],
        next_tokens=prefixes,
        rendering=replace(rendering_of(options), prefill=None),
        one_by_one=True if options["one_by_one"] else None,
        progress=terminal_progress,
        report=lambda text: click.echo(text, err=True),
        **{
            name: options[name]
            for name in ("top", "limit", "shared_vocabulary", "seed", "batch_size", "device", "dtype", "device_map", "cache_dir", "base_is_right")
        },
    )
