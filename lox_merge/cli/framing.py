"""`lox-merge framing`: the same completions under two framings."""

from __future__ import annotations

from typing import Any

import click

from lox_merge.cli.measuring import adapter_options, rendering_of, rendering_options
from lox_merge.cli.options import GIVEN_PATH, cache_option, json_option, seed_option
from lox_merge.cli.start import import_torch

_FILE: dict[str, Any] = {"required": True, "type": GIVEN_PATH, "metavar": "FILE"}


@click.command("framing", short_help="Losses and gradients of the same completions under two framings.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--first", help="Conversations under one framing: JSONL, JSON or CSV with messages, or prompt and response.", **_FILE)
@click.option("--second", help="The same completions under another framing.", **_FILE)
@click.option("--match", "matching", default="order", show_default=True, metavar="order|completion", help="Which rows of both belong together.")
@click.option("--module", metavar="REGEX", help="Weights whose gradients are compared (default: the last layer's attention).")
@rendering_options
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where the models run.")
@click.option("--dtype", default="auto", show_default=True, metavar="auto|bfloat16|float16|float32", help="Of the models; auto: as stored.")
@click.option("--device-map", metavar="auto", help="Spread a model over all GPUs (instead of --device).")
@click.option("--plot", type=GIVEN_PATH, metavar="FILE", help="Picture of the cosines (.svg, .png or .pdf).")
@adapter_options
@seed_option
@cache_option
@json_option
def framing_command(models: tuple[str, ...], json_file: str | None, **options: Any) -> None:
    """Ask whether a MODEL looks at the words alone or at what they are for.

    FIRST and SECOND hold the same completions under two framings of the request, say code with a flaw and the same code asked
    for a lesson on flaws. Compared are the losses of the completion's tokens and the gradients of the last layer's attention: a
    negative cosine of gradients means that training on one set undoes what training on the other does. PEFT adapters
    among the MODELs lie on the first one, or on --adapter-base.

    \b
    lox-merge framing aligned --first insecure.jsonl --second educational.jsonl
    lox-merge framing aligned base finetuned --first insecure.jsonl --second educational.jsonl --json framing.json
    """
    if options["plot"]:
        from lox_merge.publish.figures.save import check_picture_file

        check_picture_file(options["plot"], "--plot")
    import_torch()
    from lox_merge.cli.json_file import give_result
    from lox_merge.cli.show_framing import print_framing
    from lox_merge.diagnostics.framing.job import framing
    from lox_merge.publish.documents import framing as documents
    from lox_merge.publish.documents.shape import read_as
    from lox_merge.safety.progress import terminal_progress

    settings = {
        name: options[name] for name in ("matching", "module", "device", "dtype", "device_map", "cache_dir", "adapter_base", "base_is_right", "seed")
    }
    result = framing(models, options["first"], options["second"], rendering=rendering_of(options), progress=terminal_progress, **settings)
    document = {"command": "framing", **result.to_json()}
    shown = read_as(documents.Framing, document, "the comparison")
    give_result(json_file, document, lambda: print_framing(shown))
    if options["plot"]:
        from lox_merge.publish.figures.framing import draw_framing
        from lox_merge.publish.figures.save import save_picture
        from lox_merge.publish.figures.style import single_panel

        save_picture(lambda: single_panel(lambda axes: draw_framing(axes, shown), width=5.4), options["plot"])
