"""Entry point: the group of commands, and how errors and warnings look."""

from __future__ import annotations

import gc
import importlib
import io
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import click

from lox_merge._version import __version__
from lox_merge.cli.signals import interrupted_between_imports
from lox_merge.errors import Interrupted, LoxMergeError, LoxMergeWarning, RequestError

# Command name: module and attribute. Modules are imported when their help or their work is asked for.
_COMMANDS = {
    "activations": "lox_merge.cli.activations:activations_command",
    "asr": "lox_merge.cli.asr:asr_command",
    "brittleness": "lox_merge.cli.brittleness:brittleness_command",
    "behaviour": "lox_merge.cli.behaviour:behaviour_command",
    "card": "lox_merge.cli.card:card_command",
    "curvature": "lox_merge.cli.curvature:curvature_command",
    "decompose": "lox_merge.cli.decompose:decompose_command",
    "demo": "lox_merge.cli.demo:demo",
    "framing": "lox_merge.cli.framing:framing_command",
    "harden": "lox_merge.cli.harden:harden_command",
    "inspect": "lox_merge.cli.inspect:inspect_command",
    "landscape": "lox_merge.cli.landscape:landscape_command",
    "project": "lox_merge.cli.project:project_command",
    "push": "lox_merge.cli.push:push_command",
    "report": "lox_merge.cli.report:report_command",
    "robustness": "lox_merge.cli.robustness:robustness_command",
    "search": "lox_merge.cli.search:search_command",
    "verify": "lox_merge.cli.verify:verify_command",
    "yaml": "lox_merge.cli.yaml:yaml_command",
}


_PREFIX = "LOX_MERGE"  # of environment variables


class LazyGroup(click.Group):
    """A group whose commands are imported on demand, so that --help stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        name_variables(command, f"{ctx.auto_envvar_prefix or _PREFIX}_{cmd_name}")
        return command


def name_variables(command: click.Command, prefix: str) -> None:
    """Lets each option be set by prefix and its long name, as the help says: LOX_MERGE_ASR_JUDGE for --judge of asr.

    click takes the name of the Python parameter (LOX_MERGE_ASR_JUDGES), which nobody can guess; it goes on counting, after this one.
    """
    for option in command.params:
        if isinstance(option, click.Option):
            names = [name.removeprefix("--") for name in option.opts if name.startswith("--")]
            option.envvar = [f"{prefix}_{name}".upper().replace("-", "_") for name in names]


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": _PREFIX, "max_content_width": 100},
)
@click.version_option(__version__, prog_name="lox-merge")
def cli() -> None:
    """Make safety alignment of open-weight models harder to fine-tune away.

    \b
    lox-merge demo                        see it work on a toy pair, offline
    lox-merge harden BASE ALIGNED OUT     harden a checkpoint (LoX)
    lox-merge asr MODEL... --prompts P    how often attacks succeed
    lox-merge search BASE ALIGNED ...     find rank and alpha by behaviour
    lox-merge robustness BASE ALIGNED ... fine-tune alike, compare what is left
    lox-merge brittleness BASE ALIGNED .. take leading directions away, in memory
    lox-merge project BASE ALIGNED FT OUT filter a fine-tuning update
    lox-merge inspect BASE ALIGNED FT...  what the weights say, beside chance
    lox-merge behaviour BASE ALIGNED ...  how deep alignment is, what undid it
    lox-merge activations BASE ALIGNED .. where hidden states moved
    lox-merge landscape MODEL [OTHER...]  attack success around and between models
    lox-merge framing MODEL --first A ... the same replies under two framings
    lox-merge curvature ALIGNED FT...     how fine-tuning bends into safety
    lox-merge report RUN...               one page from the JSON of runs
    lox-merge verify OUT                  check an output, make it again
    lox-merge push OUT REPO               publish it with its model card

    Every option can be set by an environment variable: LOX_MERGE_HARDEN_RANK=6.
    Exit codes: 0 done, 1 the work failed, 2 the request was wrong.
    """


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, LoxMergeWarning):
        click.echo(f"warning: {message}", err=True)


def _open_streams() -> None:
    """Something behind every standard stream: a file that is opened later would else have the number of a closed one, and be written to by
    libraries that complain."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def _check_folder() -> None:
    """Raises RequestError where the current folder was removed: names are looked up from it, by libraries too, which end the process."""
    try:
        Path.cwd()
    except OSError as error:
        raise RequestError("the current folder is not there any more. Change to another one.") from error


def _is_of_what_is_shown(error: OSError) -> bool:
    """Whether it comes from what writes to the terminal: a full disk behind standard output says nothing else of itself."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).partition(".")[0] in ("click", "rich")


def _out_of_memory(error: Exception) -> bool:
    """torch has no class of its own for memory of the host that ran out, nor has a thread that cannot be started."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in ("out of memory", "can't allocate memory", "can't start new thread"))


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Errors of this package are printed without a traceback; their class decides the exit code."""
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that knows no Greek letters gets question marks for them: what was worked for hours must not end in an error.
            stream.reconfigure(errors="replace")
    warnings.simplefilter("always", LoxMergeWarning)
    warnings.showwarning = _show_warning
    if not sys.stderr.isatty():
        # Bars of libraries would fill a log. Some are asked for by name (disable=False), but none is shown before its delay has passed.
        os.environ.setdefault("TQDM_DELAY", "1e9")
    try:
        _check_folder()
        # A scheduler's SIGTERM leaves the same resumable state as Ctrl-C.
        with interrupted_between_imports(sys._getframe()):
            code = cli.main(args=arguments, standalone_mode=False)
    except LoxMergeError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):  # before RuntimeError, which click.Abort is
        click.echo("error: interrupted", err=True)
        sys.exit(Interrupted.exit_code)
    except OSError as error:  # a disk or a permission that no check foresaw
        what = "standard output can't be written: " if _is_of_what_is_shown(error) else ""
        click.echo(f"error: {what}{error.strerror or error}{f': {error.filename}' if error.filename else ''}", err=True)
        sys.exit(LoxMergeError.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        click.echo(
            "error: memory ran out. What was finished before is kept: run the same command again to go on, with less beside it, on a machine "
            "with more, or (where a model is loaded) with a smaller --batch-size.",
            err=True,
        )
        sys.exit(LoxMergeError.exit_code)
    finally:
        # Before it ends Python looks for cycles among all that torch made: the process takes them with it, so leave them out.
        gc.freeze()
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
