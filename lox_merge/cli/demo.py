"""`lox-merge demo`: from training to the picture on toy models, offline."""

from __future__ import annotations

from pathlib import Path

import click

from lox_merge.cli.options import GIVEN_PATH, json_option, seed_option
from lox_merge.cli.start import import_torch


@click.command("demo", short_help="Train, harden, search and attack toy models, offline, in about a minute.")
@click.option("--out", type=GIVEN_PATH, default=Path("demo"), show_default=True, help="Folder to write to.")
@click.option(
    "--cache-dir",
    type=GIVEN_PATH,
    help="Where trained toy pairs are kept (default: $LOX_MERGE_CACHE/toy, else ~/.cache/lox-merge/toy).",
)
@click.option("--full", is_flag=True, help="Five seeds from --seed on, with all controls: medians and ranges (about ten minutes).")
@seed_option
@json_option
def demo(out: Path, cache_dir: Path | None, full: bool, seed: int, json_file: str | None) -> None:
    """Harden a toy model and attack it, offline, in about a minute.

    Trains two tiny models of a symbolic language, a base model and one aligned to refuse; hardens the aligned
    checkpoint; searches its effective rank; fine-tunes the aligned model, the hardened one and two equal-norm controls on
    benign and on harmful data; and compares how well each still refuses. Attacked models exist in memory only: OUT
    receives the hardened checkpoint and a picture.
    """
    import_torch()
    from lox_merge.cli.json_file import give_result
    from lox_merge.cli.show import duration
    from lox_merge.cli.show_search import print_search
    from lox_merge.lab.demo import run_demo
    from lox_merge.lab.full import SEEDS, full_json, print_full, run_full
    from lox_merge.lab.picture import draw_picture
    from lox_merge.lab.summary import print_summary

    def report(message: str) -> None:
        click.echo(message, err=True)

    if full:
        results = run_full(out, seeds=range(seed, seed + SEEDS), cache_dir=cache_dir, progress=report)
    else:
        results = [run_demo(out, seed=seed, cache_dir=cache_dir, progress=report)]
    pictures = draw_picture(results, out)

    def show() -> None:
        if full:
            print_full(results)
        else:
            print_search(results[0].search, base="base", aligned="aligned")
            print_summary(results[0])
        for path in (*(result.hardened for result in results), *pictures):
            click.echo(f"Written: {path}")
        click.echo(f"Time: {duration(sum(result.seconds for result in results))}")

    give_result(json_file, full_json(results) if full else results[0].to_json(), show)
