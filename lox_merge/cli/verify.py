"""`lox-merge verify`: is an output what its manifest says?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from lox_merge.cli.options import cache_option, device_option, json_option, seed_option
from lox_merge.cli.start import import_torch
from lox_merge.errors import RequestError, WriteError

if TYPE_CHECKING:
    from lox_merge.jobs.verify import Verification


@click.command("verify", short_help="Check a hardened model against its manifest and its sources.")
@click.argument("out")
@click.option("--base", help="Where the base checkpoint is, if the manifest names a local folder.")
@click.option("--aligned", help="Where the aligned checkpoint is, if the manifest names a local folder.")
@click.option("--finetuned", help="Where the fine-tuned checkpoint of lox-merge project is, if the manifest names a local folder.")
@click.option("--sample", type=click.IntRange(min=1), metavar="N", help="Recompute N tensors drawn at random (see --seed) instead of all.")
@click.option("--offline", is_flag=True, help="Check hashes and structure only; recompute nothing.")
@device_option
@seed_option
@cache_option
@json_option
def verify_command(
    out: str,
    base: str | None,
    aligned: str | None,
    finetuned: str | None,
    sample: int | None,
    offline: bool,
    device: str,
    seed: int,
    cache_dir: Path | None,
    json_file: str | None,
) -> None:
    """Check that OUT (a folder or a Hub id) is what its manifest says.

    First hashes and structure of its files; then its weights are made again from the sources named in the manifest and compared.
    Exit code 1, with a list, when anything differs.

    \b
    lox-merge verify out --base base --aligned aligned
    lox-merge verify out --base base --aligned aligned --finetuned finetuned
    lox-merge verify org/hardened --sample 20
    """
    about_sources = {"sample": sample, "base": base, "aligned": aligned, "finetuned": finetuned}
    unused = [f"--{name}" for name, value in about_sources.items() if value is not None]
    if offline and unused:
        raise RequestError(
            f"--offline looks at the output alone, and {', '.join(unused)} {'is' if len(unused) == 1 else 'are'} about making its weights again. "
            "Leave one of them out."
        )
    import_torch()
    from lox_merge.cli.json_file import write_json
    from lox_merge.cli.progress import byte_progress
    from lox_merge.jobs.beforehand import resolve_device
    from lox_merge.jobs.verify import raise_for_problems, verify

    with byte_progress(None, "verifying") as progress:
        result = verify(
            out,
            base=base,
            aligned=aligned,
            finetuned=finetuned,
            sample=sample,
            seed=seed,
            offline=offline,
            device=resolve_device(device),
            cache_dir=cache_dir,
            progress=progress,
        )
    failure: WriteError | None = None
    try:
        if json_file:
            write_json(json_file, result.to_json(), left="The check itself was finished; --json - writes its result to standard output.")
    except WriteError as error:
        failure = error  # told last, and no reason to keep the verdict
    if result.problems and failure:
        click.echo(f"error: {failure}", err=True)
    raise_for_problems(result)
    if json_file != "-":
        _show(result)
    if failure:
        raise failure


def _show(result: Verification) -> None:
    click.echo(f"{result.output}: {result.files} files and {result.tensors} tensors are what the manifest says.")
    if result.sources_checked:
        click.echo(f"{result.tensors_recomputed} tensors made again from the sources: equal.")
        if result.rounded_apart:
            count = len(result.rounded_apart)
            click.echo(f"{count} of them differ in the last place here and there, as another machine or thread count rounds them.")
    else:
        click.echo("The weights were not recomputed (--offline).")
