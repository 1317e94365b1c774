"""`lox-merge robustness`: aligned and hardened models under the same fine-tuning attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lox_merge.cli.in_memory import whole_numbers
from lox_merge.cli.measuring import (
    cache_of,
    judge_options,
    judges_of,
    on_command_line,
    prompt_options,
    prompts_of,
    rendering_of,
    rendering_options,
    utility_of,
    utility_options,
)
from lox_merge.cli.options import GIVEN_FOLDER, GIVEN_PATH, base_option, cache_option, json_option, number, order_option
from lox_merge.cli.start import import_torch
from lox_merge.errors import RequestError
from lox_merge.safety.seeds import check_seed

if TYPE_CHECKING:
    from lox_merge.safety.robustness import Robustness


@click.command("robustness", short_help="Fine-tune aligned and hardened models alike and compare what is left of their safety.")
@click.argument("base")
@click.argument("aligned")
@click.argument("hardened", required=False)
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    required=True,
    type=GIVEN_PATH,
    metavar="DATA",
    help="Data to fine-tune on: JSONL, JSON or CSV with messages, prompt and response, or text. Repeatable.",
)
@prompt_options
@judge_options(several=True)
@click.option("--steps", default="0,50,100", show_default=True, metavar="N,N,…", help="Training steps at which to measure; 0 is before.")
@click.option("--seeds", default="0", show_default=True, metavar="N,N,…", help="Seeds of the order of the data and of the random controls.")
@click.option("--controls", is_flag=True, help="Also attack three edits of equal norm: full-rank, random-subspace, gaussian.")
@click.option("--learning-rate", default="2e-5", show_default=True, metavar="FLOAT", help="Constant after the warm-up.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Examples a training step.")
@click.option("--warmup-steps", type=click.IntRange(min=0), default=0, show_default=True, help="Steps of linear warm-up.")
@click.option("--adam-beta2", default="0.999", show_default=True, metavar="FLOAT", help="Second moment's decay in AdamW.")
@click.option("--max-length", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens of an example that are kept.")
@click.option("--lora", is_flag=True, help="Train LoRA adapters instead of all weights.")
@click.option("--lora-rank", type=click.IntRange(min=1), default=16, show_default=True, help="Their rank.")
@click.option("--lora-alpha", type=click.IntRange(min=1), default=32, show_default=True, help="Their scale, as in PEFT.")
@click.option("--rank", default="6", show_default=True, help="Rank of the hardening in memory, of R_ft and of the controls.")
@click.option("--alpha", default="1.25", show_default=True, metavar="FLOAT", help="Extrapolation factor of the hardening in memory.")
@click.option("--factors", type=GIVEN_PATH, help="File of lox-merge decompose for this pair: no SVD is spent.")
@utility_options
@rendering_options
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=60, show_default=True, help="Length of a reply.")
@click.option("--eval-batch-size", type=click.IntRange(min=1), help="Prompts at once.  [default: found automatically]")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda", help="Where the models are trained and run.")
@click.option("--curves", type=GIVEN_FOLDER, metavar="FOLDER", help="Keep finished curves here, replies too; the same command goes on from them.")
@click.option("--plot", type=GIVEN_PATH, metavar="FILE", help="Picture of ASR against steps (.svg, .png or .pdf).")
@order_option
@base_option
@cache_option
@json_option
def robustness_command(base: str, aligned: str, hardened: str | None, json_file: str | None, **options: Any) -> None:
    """Fine-tune ALIGNED and HARDENED on the same data, in the same order, and measure both at the same --steps.

    ALIGNED may be a PEFT adapter over BASE, HARDENED one over ALIGNED. Without HARDENED the hardening is done in memory
    (--rank, --alpha). Attacked weights exist in memory only and are never written. Training is in float32; a full fine-tuning
    needs about 16 bytes of memory a parameter, --lora about 5.

    \b
    lox-merge robustness base aligned --attack my_data.jsonl --prompts advbench.csv --judge openai:gpt-4o-mini
    lox-merge robustness base aligned hardened --attack a.jsonl --attack b.csv --prompts p.csv --controls --seeds 0,1,2
    """
    result = _run(base, aligned, hardened, options)
    import_torch()
    from lox_merge.cli.json_file import give_result
    from lox_merge.cli.show_robustness import print_robustness
    from lox_merge.safety.asr import check_decided

    give_result(json_file, {"command": "robustness", **result.to_json()}, lambda: print_robustness(result))
    if options["plot"]:
        from lox_merge.publish.documents import robustness as documents
        from lox_merge.publish.documents.shape import read_as
        from lox_merge.publish.figures.robustness import robustness_picture
        from lox_merge.publish.figures.save import save_picture

        document = read_as(documents.Robustness, result.to_json(), "the comparison")
        save_picture(lambda: robustness_picture(document), options["plot"])
    for curve in result.curves:
        for point in curve.points:
            check_decided(point.evaluation, f"{curve.model} after {point.step} steps")


def _check_options(hardened: str | None, options: dict[str, Any]) -> None:
    """Raises RequestError for options that nothing would follow."""
    named = set(filter(on_command_line, ("alpha", "lora_rank", "lora_alpha")))
    if "alpha" in named and hardened is not None:
        raise RequestError("--alpha is of a hardening in memory, and HARDENED is one on disk, with an alpha of its own. Leave one of them out.")
    if not options["lora"] and (wrong := sorted(named - {"alpha"})):
        raise RequestError(f"--{wrong[0].replace('_', '-')} is of adapters: add --lora, or leave it out.")


def _run(base: str, aligned: str, hardened: str | None, options: dict[str, Any]) -> Robustness:
    _check_options(hardened, options)
    steps, seeds = whole_numbers(options["steps"], "--steps", "0,50,100"), whole_numbers(options["seeds"], "--seeds", "0,1,2")
    for seed in seeds:
        check_seed(seed)
    if options["plot"]:
        from lox_merge.publish.figures.save import check_picture_file

        check_picture_file(options["plot"], "--plot")
    from lox_merge.jobs.recipe import Recipe
    from lox_merge.safety.attack import AttackSettings, check_attack_packages
    from lox_merge.safety.conversations import load_conversations
    from lox_merge.safety.decoding import Decoding
    from lox_merge.safety.robustness import compare_under_attack

    settings = AttackSettings(
        steps=tuple(steps),
        learning_rate=number(options["learning_rate"], "--learning-rate"),
        adam_beta2=number(options["adam_beta2"], "--adam-beta2"),
        **{name: options[name] for name in ("batch_size", "warmup_steps", "max_length", "lora", "lora_rank", "lora_alpha")},
    )
    check_attack_packages(settings.lora)
    return compare_under_attack(
        base,
        aligned,
        hardened,
        [load_conversations(path) for path in options["attacks"]],
        prompts_of(options),
        judges_of(options),
        settings=settings,
        recipe=Recipe(rank=options["rank"], alpha=number(options["alpha"], "--alpha")),
        factors=options["factors"],
        seeds=seeds,
        controls=options["controls"],
        model={"decoding": Decoding(max_new_tokens=options["max_new_tokens"]), "batch_size": options["eval_batch_size"]},
        rendering=rendering_of(options),
        utility=utility_of(options),
        cache=cache_of(options),
        curves=options["curves"],
        device=options["device"],
        cache_dir=options["cache_dir"],
        order_is_right=options["order_is_right"],
        base_is_right=options["base_is_right"],
        report=lambda text: click.echo(text, err=True),
    )
