"""`lox-merge yaml`: mergekit-yaml with this package's merge method, and with the checks and files that `lox` needs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from lox_merge.cli.options import json_option

_HELP = """Merge as mergekit-yaml does, with the merge methods `lox` and `lox_project` registered.

The configuration names the pre-trained model as base_model and the aligned one under models; merge_configs/ has examples.
For lox_project two models are listed, with `role: aligned` and `role: finetuned` among their parameters. All options of
mergekit-yaml hold. With these methods everything is checked first, the folder appears only when it is complete, and config,
tokenizer, chat template and code are the aligned (or fine-tuned) model's. mergekit's own methods run as they are.

\b
lox-merge yaml merge_configs/paper_defaults.yaml out
"""


# In a context's `meta`: only our own options are asked for.
_QUICK = "lox_merge.cli.yaml.quick"
_ALL_OPTIONS = "--mergekit-help"


class MergekitCommand(click.Command):
    """Takes arguments and options from mergekit's own command, so that a newer mergekit's options appear by themselves.

    They are read when the command runs, or shows all of them: importing mergekit takes seconds, too long for --help.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        asked = set(args)
        if _ALL_OPTIONS in asked or asked & set(ctx.help_option_names):
            ctx.meta[_QUICK] = _ALL_OPTIONS not in asked
            click.echo(ctx.get_help(), color=ctx.color)
            ctx.exit()
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["[OPTIONS]", "CONFIG_FILE", "OUT_PATH"]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if not ctx.meta.get(_QUICK) and not any(parameter.name == "config_file" for parameter in self.params):
            from mergekit.scripts.run_yaml import main

            from lox_merge.mergekit.options import refusing

            taken = {parameter.name for parameter in self.params}
            self.params = [*(refusing(parameter) for parameter in main.params if parameter.name not in taken), *self.params]
        return super().get_params(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if ctx.meta.get(_QUICK):
            super().format_options(ctx, formatter)
            return
        from mergekit.options import PrettyPrintHelp

        PrettyPrintHelp.format_options(self, ctx, formatter)


@click.command("yaml", cls=MergekitCommand, help=_HELP, short_help="Run a mergekit configuration; adds the merge methods lox and lox_project.")
@click.option("--overwrite", is_flag=True, help="With our methods: replace OUT_PATH if mergekit or lox-merge wrote it.")
@click.option("--order-is-right", is_flag=True, help="With our methods: the models are not swapped, although only base_model has a chat template.")
@click.option(_ALL_OPTIONS, is_flag=True, expose_value=False, help="Show mergekit-yaml's options too: all of them hold here.")
@json_option
def yaml_command(overwrite: bool, order_is_right: bool, json_file: str | None, config_file: str, out_path: str, **values: Any) -> None:
    from mergekit.scripts.run_yaml import main

    from lox_merge.cli.json_file import write_json
    from lox_merge.errors import LoxMergeError
    from lox_merge.jobs.output_folder import output_folder
    from lox_merge.mergekit.config import one_line, read_configuration
    from lox_merge.mergekit.options import usable_options
    from lox_merge.mergekit.plugin import METHOD, OWN_METHODS
    from lox_merge.mergekit.run import merge

    _, config = read_configuration(Path(config_file))
    target, own = output_folder(out_path), config.merge_method in OWN_METHODS
    options = usable_options(values, put_into_effect=own)
    if own:
        result = merge(Path(config_file), target, options, overwrite=overwrite, order_is_right=order_is_right)
        if json_file:
            write_json(json_file, result.to_json())
        if json_file != "-" and not options.quiet:
            plan = result.plan
            verb = "hardened" if config.merge_method == METHOD else "filtered"
            click.echo(f"{verb} {plan.mirrored.title}: {result.edited} of {len(plan.tensors)} tensors edited, written to {target}")
        return
    try:
        main.callback(config_file=config_file, out_path=str(target), **values)
    except (LoxMergeError, click.ClickException, OSError):
        raise
    except Exception as error:
        logging.getLogger(__name__).info("mergekit failed", exc_info=error)
        raise LoxMergeError(f"mergekit failed: {one_line(error)}. Add -v for the traceback.") from error
    if json_file:
        write_json(json_file, {"command": "yaml", "method": config.merge_method, "output": Path(out_path).name})
