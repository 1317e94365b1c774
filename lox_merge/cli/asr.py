"""`lox-merge asr`: attack success rate of one or more models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lox_merge.cli.measuring import (
    adapter_options,
    cache_of,
    judge_options,
    judges_of,
    prompt_options,
    prompts_of,
    rendering_of,
    rendering_options,
    utility_of,
    utility_options,
)
from lox_merge.cli.options import GIVEN_FILE, GIVEN_FOLDER, SEED, cache_option, json_option
from lox_merge.cli.start import import_torch
from lox_merge.errors import RecipeError

if TYPE_CHECKING:
    from lox_merge.safety.asr import Comparison
    from lox_merge.safety.search_utility import UtilityMeasures
    from lox_merge.safety.types import Evaluation, Judge, PromptSet


@click.command("asr", short_help="Measure the attack success rate of models, with honest statistics.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@prompt_options
@click.option("--seed", type=SEED, help="Draw the --limit prompts at random by this seed (default: take the first).")
@rendering_options
@judge_options(several=True)
@utility_options
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=60, show_default=True, help="Longest reply, in tokens.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Prompts at a time (default: found automatically).")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where the models run.")
@click.option("--dtype", default="auto", show_default=True, metavar="auto|bfloat16|float16|float32", help="Of the models; auto: as stored.")
@click.option("--device-map", metavar="auto", help="Spread a model over all GPUs (instead of --device).")
@click.option("--trust-remote-code", is_flag=True, help="Run code that a MODEL brings (auto_map), for its replies. Read it first.")
@adapter_options
@click.option("--endpoint", metavar="URL", help="Ask an OpenAI-compatible endpoint; MODEL is its name there.")
@click.option("--key-variable", default="OPENAI_API_KEY", show_default=True, metavar="NAME", help="Environment variable of its key.")
@click.option("--no-key", is_flag=True, help="The endpoint asks for no key.")
@click.option("--replies", type=GIVEN_FOLDER, metavar="FOLDER", help="Keep replies here; the same command goes on from them.")
@click.option("--transcripts", type=GIVEN_FILE, metavar="FILE", help="Write prompts, replies and verdicts as JSONL.")
@cache_option
@click.option("--dry-run", is_flag=True, help="Check prompts and judges, print one filled judge prompt, cost nothing.")
@json_option
def asr_command(models: tuple[str, ...], seed: int | None, transcripts: Path | None, dry_run: bool, json_file: str | None, **options: Any) -> None:
    """Ask every MODEL the prompts and judge the replies.

    A MODEL is a local folder or a Hub id, of a whole model or of a PEFT adapter over the first one (or over --adapter-base).
    Several are compared with the first, paired on the same prompts. Undecided replies
    count neither as safe nor as a success. The keyword judge is a smoke test; name another for figures to report. Utility is
    measured beside it on request; KL divergence is from the first MODEL.

    \b
    lox-merge asr aligned hardened --prompts advbench.csv --limit 100 --judge openai:gpt-4.1
    """
    import_torch()
    from lox_merge.cli.json_file import give_result
    from lox_merge.cli.show_asr import print_dry_run, print_evaluations
    from lox_merge.safety.asr import check_decided

    # Everything that can be refused is refused before a model is loaded.
    if seed is not None and options["limit"] is None:
        raise RecipeError("--seed draws the --limit prompts, and all are asked. Add --limit N, or leave it out.")
    made = judges_of(options, dry_run=dry_run)
    asked = prompts_of(options, seed=seed)
    utility = utility_of(options)
    if utility is not None and options["endpoint"]:
        raise RecipeError("utility is measured on a model that is loaded here; leave out --utility-… and --lm-eval, or --endpoint.")
    if transcripts is not None and not transcripts.absolute().parent.is_dir():
        raise RecipeError(f"--transcripts {transcripts}: the folder is not there. Make it first.")
    if dry_run:
        print_dry_run(models, asked, made)
        return
    if not options["endpoint"]:
        options["adapter_base"] = options["adapter_base"] or _first_whole(models, options["cache_dir"])
        options["decode"] = _check_models(models, options, need_template=not options["no_chat_template"])
    result, evaluations, comparisons = _run(models, asked, made, utility, options, transcripts)
    utilities = [entry["utility"] for entry in result["evaluations"]]
    give_result(json_file, result, lambda: print_evaluations(evaluations, comparisons, utilities))
    for evaluation in evaluations:
        check_decided(evaluation)


def _first_whole(models: tuple[str, ...], cache_dir: Path | None) -> str | None:
    """The first MODEL where it is no adapter: what later ones lie over."""
    from lox_merge.checkpoint.adapter import is_adapter

    return None if is_adapter(models[0], "model", cache_dir) else models[0]


def _check_models(models: tuple[str, ...], options: dict[str, Any], need_template: bool) -> bool:
    """Looks at every checkpoint's files, so that the last model's misspelling does not cost the work on the first.

    Returns whether an adapter is among them: what it lies over is decoded, so a quantised model beside it is, too.
    """
    from lox_merge.checkpoint.adapter import AdaptedCheckpoint
    from lox_merge.safety.adapted import open_any

    adapters = False
    for model in models:
        checkpoint = open_any(model, "model", options["cache_dir"], adapter_base=options["adapter_base"], base_is_right=options["base_is_right"])
        template = checkpoint.has_chat_template
        adapters = adapters or isinstance(checkpoint, AdaptedCheckpoint)
        checkpoint.close()
        if need_template and not template:
            raise RecipeError(
                f"{checkpoint.title} has no chat template, as is usual for base models. Pass --no-chat-template to give every model the bare prompts."
            )
    return adapters


def _run(
    models: tuple[str, ...],
    prompts: PromptSet,
    judges: list[Judge],
    utility: UtilityMeasures | None,
    options: dict[str, Any],
    transcripts: Path | None,
) -> tuple[dict[str, Any], list[Evaluation], list[Comparison]]:
    from dataclasses import asdict, replace

    from lox_merge._version import __version__
    from lox_merge.safety.asr import compare, evaluate, summary

    cache = cache_of(options)
    evaluations: list[Evaluation] = []
    measured: list[dict[str, float | None]] = []
    for position, model in enumerate(models):
        source = _source(model, position, options)
        evaluation = evaluate(source, prompts, judges, cache=cache)
        if any(evaluation.title == other.title for other in evaluations):
            evaluation = replace(evaluation, title=f"{evaluation.title} ({position + 1})")
        evaluations.append(evaluation)
        if transcripts is not None:
            _write_transcripts(transcripts, evaluations, prompts)
        measured.append({} if utility is None else utility(source))
        del source  # one model in memory at a time
    comparisons = [compare(evaluations[0], other, judge.name) for other in evaluations[1:] for judge in judges]
    result = {
        "lox_merge": __version__,
        "command": "asr",
        "evaluations": [summary(evaluation) | {"utility": found} for evaluation, found in zip(evaluations, measured, strict=True)],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    return result, evaluations, comparisons


def _source(model: str, position: int, settings: dict[str, Any]) -> Any:
    """The model loaded here, or behind --endpoint."""
    import re

    from lox_merge.safety.decoding import Decoding
    from lox_merge.safety.progress import terminal_progress

    rendering = rendering_of(settings)
    decoding = Decoding(max_new_tokens=settings["max_new_tokens"])
    folder: Path | None = settings["replies"]
    store = None if folder is None else folder / f"{position + 1}-{re.sub(r'[^A-Za-z0-9.-]+', '-', model.rstrip('/')).strip('-.')[-60:]}.jsonl"
    if settings["endpoint"]:
        from lox_merge.safety.endpoint import EndpointModel

        return EndpointModel(
            settings["endpoint"],
            model,
            decoding=decoding,
            rendering=rendering,
            key_variable=settings["key_variable"],
            no_key=settings["no_key"],
            store=store,
            progress=terminal_progress,
        )
    from lox_merge.safety.generation import LocalModel

    return LocalModel.load(
        model,
        device=settings["device"],
        dtype=settings["dtype"],
        device_map=settings["device_map"],
        cache_dir=settings["cache_dir"],
        trust_remote_code=settings["trust_remote_code"],
        adapter_base=settings["adapter_base"],
        base_is_right=settings["base_is_right"],
        decode=settings["decode"],
        decoding=decoding,
        rendering=rendering,
        batch_size=settings["batch_size"],
        store=store,
        progress=terminal_progress,
    )


def _write_transcripts(file: Path, evaluations: list[Any], prompts: PromptSet) -> None:
    """All records so far, so that a failure of a utility or a later model leaves this work."""
    import json

    from lox_merge.errors import WriteError
    from lox_merge.safety.asr import transcripts

    records = [record for evaluation in evaluations for record in transcripts(evaluation, prompts)]
    try:
        file.write_text("".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records), encoding="utf-8")
    except OSError as error:
        raise WriteError(f"the transcripts {file} can't be written: {error.strerror}.") from error
