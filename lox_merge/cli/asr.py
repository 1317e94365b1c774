"""`lox-merge asr`: attack success rate of one or more models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lox_merge.cli.options import cache_option, json_option, number
from lox_merge.errors import RecipeError

if TYPE_CHECKING:
    from lox_merge.safety.types import PromptSet, ReplySource


@click.command("asr", short_help="Measure the attack success rate of models, with honest statistics.")
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--prompts", required=True, metavar="FILE|DATASET", help="Prompts: CSV, JSONL, JSON, text, or a Hub data set id.")
@click.option("--column", metavar="NAME", help="Column that holds the prompts (default: goal, prompt, text, …).")
@click.option("--split", metavar="NAME", help="Split of a Hub data set.")
@click.option("--limit", type=int, metavar="N", help="Ask N prompts only.")
@click.option("--seed", type=int, help="Draw the --limit prompts at random by this seed (default: take the first).")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--no-chat-template", is_flag=True, help="Give the bare prompts, for base models.")
@click.option("--prefill", metavar="TEXT", help="Words put into the assistant's mouth; the model goes on from there.")
@click.option(
    "--judge",
    "judges",
    multiple=True,
    default=("keyword",),
    show_default=True,
    metavar="SPEC",
    help="keyword, classifier:MODEL#LABEL, openai:MODEL, python:module:function, inspect:package/scorer. Repeatable.",
)
@click.option("--rubric", type=click.Path(path_type=Path), help="Rubric of the openai judge, with {prompt} and {reply} in it.")
@click.option("--threshold", metavar="SCORE", help="Score from which an attack counts as a success (openai: 5; python, inspect: 0.5).")
@click.option("--judge-endpoint", metavar="URL", help="Where the openai judge is served (default: OPENAI_BASE_URL, else OpenAI).")
@click.option("--judge-key-variable", default="OPENAI_API_KEY", show_default=True, metavar="NAME", help="Environment variable of its key.")
@click.option("--judge-temperature", default="0", show_default=True, metavar="FLOAT|default", help="Its temperature; default: the server's.")
@click.option("--judge-concurrency", type=click.IntRange(min=1), default=8, show_default=True, help="Its requests at a time.")
@click.option("--no-cache", is_flag=True, help="Judge anew what was judged before.")
@click.option("--max-new-tokens", type=int, default=60, show_default=True, help="Longest reply, in tokens.")
@click.option("--batch-size", type=int, help="Prompts at a time (default: found automatically).")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where the models run.")
@click.option("--dtype", default="auto", show_default=True, metavar="auto|bfloat16|float16|float32", help="Of the models; auto: as stored.")
@click.option("--device-map", metavar="auto", help="Spread a model over all GPUs (instead of --device).")
@click.option("--endpoint", metavar="URL", help="Ask an OpenAI-compatible endpoint; MODEL is its name there.")
@click.option("--key-variable", default="OPENAI_API_KEY", show_default=True, metavar="NAME", help="Environment variable of its key.")
@click.option("--no-key", is_flag=True, help="The endpoint asks for no key.")
@click.option("--replies", type=click.Path(path_type=Path), metavar="FOLDER", help="Keep replies here; the same command goes on from them.")
@click.option("--transcripts", type=click.Path(path_type=Path), metavar="FILE", help="Write prompts, replies and verdicts as JSONL.")
@cache_option
@click.option("--dry-run", is_flag=True, help="Check prompts and judges, print one filled judge prompt, cost nothing.")
@json_option
def asr_command(
    models: tuple[str, ...],
    prompts: str,
    column: str | None,
    split: str | None,
    limit: int | None,
    seed: int | None,
    judges: tuple[str, ...],
    rubric: Path | None,
    threshold: str | None,
    judge_endpoint: str | None,
    judge_key_variable: str,
    judge_temperature: str,
    judge_concurrency: int,
    no_cache: bool,
    device: str,
    transcripts: Path | None,
    cache_dir: Path | None,
    dry_run: bool,
    json_file: str | None,
    **settings: Any,
) -> None:
    """Ask every MODEL the prompts and judge the replies.

    A MODEL is a local folder or a Hub id. Several are compared with the first, paired on the same prompts. Undecided replies
    count neither as safe nor as a success. The keyword judge is a smoke test; name another for figures to report.

    \b
    lox-merge asr aligned hardened --prompts advbench.csv --limit 100 --judge openai:gpt-4.1
    """
    from lox_merge.cli.show import write_json
    from lox_merge.cli.show_asr import print_dry_run, print_evaluations
    from lox_merge.safety.asr import check_judges
    from lox_merge.safety.judges.factory import JudgeOptions, make_judge
    from lox_merge.safety.prompts import load_prompts

    options = JudgeOptions(
        endpoint=judge_endpoint,
        key_variable=judge_key_variable,
        rubric=rubric,
        threshold=None if threshold is None else number(threshold, "--threshold"),
        temperature=None if judge_temperature == "default" else number(judge_temperature, "--judge-temperature"),
        concurrency=judge_concurrency,
        device=device,
        cache_dir=cache_dir,
        dry_run=dry_run,
    )
    if rubric is not None and not any(text.startswith("openai:") for text in judges):
        raise RecipeError("--rubric is for the openai judge, which is not among the judges. Add --judge openai:MODEL, or leave it out.")
    if options.threshold is not None and len({text.partition(":")[0] for text in judges} & {"openai", "python", "inspect"}) > 1:
        raise RecipeError("--threshold would apply to judges with different scales. Name judges of one kind, or leave it out.")
    # Everything that can be refused is refused before a model is loaded.
    made = [make_judge(text, options) for text in judges]
    check_judges(made)
    asked = load_prompts(prompts, column=column, split=split, limit=limit, seed=seed, cache_dir=cache_dir)
    if transcripts is not None and not transcripts.absolute().parent.is_dir():
        raise RecipeError(f"--transcripts {transcripts}: the folder is not there. Make it first.")
    if dry_run:
        print_dry_run(models, asked, made)
        return
    if not settings["endpoint"]:
        _check_models(models, cache_dir, need_template=not settings["no_chat_template"])
    result, evaluations, comparisons = _run(models, asked, made, {**settings, "device": device, "cache_dir": cache_dir}, no_cache, transcripts)
    if json_file:
        write_json(json_file, result)
    if json_file != "-":
        print_evaluations(evaluations, comparisons)
    _check_decided(evaluations)


def _check_models(models: tuple[str, ...], cache_dir: Path | None, need_template: bool) -> None:
    """Looks at every checkpoint's files, so that the last model's misspelling does not cost the work on the first."""
    from lox_merge.checkpoint.checkpoint import open_checkpoint

    for model in models:
        checkpoint = open_checkpoint(model, "model", cache_dir)
        template = checkpoint.has_chat_template
        checkpoint.close()
        if need_template and not template:
            raise RecipeError(
                f"{checkpoint.title} has no chat template, as is usual for base models. Pass --no-chat-template to give every model the bare prompts."
            )


def _run(
    models: tuple[str, ...], prompts: PromptSet, judges: list[Any], settings: dict[str, Any], no_cache: bool, transcripts: Path | None
) -> tuple[dict[str, Any], list[Any], list[Any]]:
    from dataclasses import asdict, replace

    from lox_merge._version import __version__
    from lox_merge.safety.asr import compare, evaluate, summary
    from lox_merge.safety.cache import VerdictCache

    cache = None if no_cache else VerdictCache()
    evaluations: list[Any] = []
    for position, model in enumerate(models):
        source = _source(model, position, settings)
        evaluation = evaluate(source, prompts, judges, cache=cache)
        del source  # one model in memory at a time
        if any(evaluation.title == other.title for other in evaluations):
            evaluation = replace(evaluation, title=f"{evaluation.title} ({position + 1})")
        evaluations.append(evaluation)
        if transcripts is not None:
            _write_transcripts(transcripts, evaluations, prompts)
    comparisons = [compare(evaluations[0], other, judge.name) for other in evaluations[1:] for judge in judges]
    result = {
        "lox_merge": __version__,
        "command": "asr",
        "evaluations": [summary(evaluation) for evaluation in evaluations],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    return result, evaluations, comparisons


def _source(model: str, position: int, settings: dict[str, Any]) -> ReplySource:
    """The model loaded here, or behind --endpoint."""
    import re

    from lox_merge.safety.chat import Rendering
    from lox_merge.safety.decoding import Decoding
    from lox_merge.safety.progress import terminal_progress

    rendering = Rendering(system=settings["system"], chat_template=False if settings["no_chat_template"] else None, prefill=settings["prefill"])
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
        decoding=decoding,
        rendering=rendering,
        batch_size=settings["batch_size"],
        store=store,
        progress=terminal_progress,
    )


def _write_transcripts(file: Path, evaluations: list[Any], prompts: PromptSet) -> None:
    """All records so far, so that a later model's failure leaves the earlier ones' work."""
    import json

    from lox_merge.errors import WriteError
    from lox_merge.safety.asr import transcripts

    records = [record for evaluation in evaluations for record in transcripts(evaluation, prompts)]
    try:
        file.write_text("".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records), encoding="utf-8")
    except OSError as error:
        raise WriteError(f"the transcripts {file} can't be written: {error.strerror}.") from error


def _check_decided(evaluations: list[Any]) -> None:
    """Raises LoxMergeError where a judge decided nothing: a rate that is undefined is no result."""
    from lox_merge.errors import LoxMergeError

    for evaluation in evaluations:
        for judge, figures in evaluation.attack_success.items():
            if figures.judged == 0:
                reason = evaluation.verdicts[judge][0].explanation
                raise LoxMergeError(f"the judge {judge} decided on none of {figures.n} replies of {evaluation.title}. The first reason: {reason}")
