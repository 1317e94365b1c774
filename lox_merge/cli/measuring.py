"""What measuring commands ask for alike: prompts, judges, models, rendering and utility, as options and as the objects they name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lox_merge.cli.options import GIVEN_PATH, Decorator, cache_option, number
from lox_merge.errors import RecipeError

if TYPE_CHECKING:
    from lox_merge.safety.cache import VerdictCache
    from lox_merge.safety.chat import Rendering
    from lox_merge.safety.judges.factory import JudgeOptions
    from lox_merge.safety.search_utility import UtilityMeasures
    from lox_merge.safety.types import Judge, PromptSet

_JUDGES = "keyword, classifier:MODEL#LABEL, openai:MODEL, python:FILE:NAME, inspect:package/scorer."


def options_in_order(*options: Decorator) -> Decorator:
    """Several options as one decorator; --help shows them in this order."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


prompt_options = options_in_order(
    click.option("--prompts", required=True, metavar="FILE|DATASET", help="Harmful requests: CSV, JSONL, JSON or text file, or a Hub data set id."),
    click.option("--column", metavar="NAME", help="Column that holds the prompts (default: goal, prompt, text, …)."),
    click.option("--split", metavar="NAME", help="Split of a Hub data set."),
    click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask N prompts only."),
)


# Settings of the openai judge alone.
_OF_OPENAI = ("rubric", "judge_endpoint", "judge_key_variable", "judge_temperature", "judge_concurrency")


def on_command_line(name: str) -> bool:
    """Whether the parameter of this name was given by the command line that runs, not by a default or the environment."""
    context = click.get_current_context(silent=True)
    return context is not None and context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def judge_options(*, several: bool) -> Decorator:
    """Which judge decides (`judges`: a tuple of texts, also where only one is taken) and its settings."""
    which: dict[str, Any] = {"multiple": True, "default": ("keyword",)} if several else {"default": "keyword"}
    return options_in_order(
        click.option("--judge", "judges", show_default=True, metavar="SPEC", help=_JUDGES + (" Repeatable." if several else ""), **which),
        click.option("--rubric", type=GIVEN_PATH, help="Rubric of the openai judge, with {prompt} and {reply} in it."),
        click.option("--threshold", metavar="SCORE", help="Score from which an attack counts as a success (openai: 5; python, inspect: 0.5)."),
        click.option("--judge-endpoint", metavar="URL", help="Where the openai judge is served (default: OPENAI_BASE_URL, else OpenAI)."),
        click.option("--judge-key-variable", default="OPENAI_API_KEY", show_default=True, metavar="NAME", help="Environment variable of its key."),
        click.option("--judge-temperature", default="0", show_default=True, metavar="FLOAT|default", help="Its temperature; default: the server's."),
        click.option("--judge-concurrency", type=click.IntRange(min=1), default=8, show_default=True, help="Its requests at a time."),
        click.option("--no-cache", is_flag=True, help="Judge anew what was judged before."),
    )


utility_options = options_in_order(
    click.option("--utility-questions", type=GIVEN_PATH, metavar="FILE", help="Questions and answers: exact match."),
    click.option("--utility-text", type=GIVEN_PATH, metavar="FILE", help="Plain text: its perplexity."),
    click.option("--utility-prompts", metavar="FILE|DATASET", help="Harmless prompts: KL from ALIGNED (asr: the first MODEL)."),
    click.option("--lm-eval", metavar="TASK,…", help="Standard tasks of lm-eval, by its names."),
    click.option("--lm-eval-limit", type=click.IntRange(min=1), metavar="N", help="Only N examples of each of these tasks."),
)

model_options = options_in_order(
    click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where the models run."),
    click.option("--dtype", default="auto", show_default=True, metavar="auto|bfloat16|float16|float32", help="Of the models; auto: as stored."),
    click.option("--device-map", metavar="auto", help="Spread a model over all GPUs (instead of --device)."),
    click.option("--batch-size", type=click.IntRange(min=1), help="Texts at a time.  [default: found automatically]"),
    cache_option,
)

right_base_option: Decorator = click.option(
    "--base-is-right", is_flag=True, help="PEFT adapters lie over the model that they are given over, although they name another."
)
adapter_options = options_in_order(
    click.option("--adapter-base", metavar="MODEL", help="What PEFT adapters among the models lie over.  [default: the first of them]"),
    right_base_option,
)

rendering_options = options_in_order(
    click.option("--system", metavar="TEXT", help="System message."),
    click.option("--no-chat-template", is_flag=True, help="Give the bare prompts, for base models."),
    click.option("--prefill", metavar="TEXT", help="Words put into the assistant's mouth; the model goes on from there."),
)


def prompts_of(options: dict[str, Any], *, seed: int | None = None) -> PromptSet:
    """The prompts that `prompt_options` name. seed: of a random --limit. Raises RequestError."""
    from lox_merge.safety.prompts import load_prompts

    where = {name: options[name] for name in ("column", "split", "limit", "cache_dir")}
    return load_prompts(options["prompts"], seed=seed, **where)


def judges_of(options: dict[str, Any], *, dry_run: bool = False) -> list[Judge]:
    """The judges that `judge_options` name, ready to judge: a missing key or file is found here. Raises RequestError."""
    from lox_merge.safety.asr import check_judges
    from lox_merge.safety.judges.factory import make_judge

    named = options["judges"]
    texts: tuple[str, ...] = (named,) if isinstance(named, str) else tuple(named)
    if not any(text.startswith("openai:") for text in texts):
        for name in filter(on_command_line, _OF_OPENAI):
            option = f"--{name.replace('_', '-')}"
            raise RecipeError(f"{option} is for the openai judge, which is not among the judges. Add --judge openai:MODEL, or leave it out.")
    scoring = {text.partition(":")[0] for text in texts} & {"openai", "python", "inspect"}
    if options["threshold"] is not None and not scoring:
        raise RecipeError("--threshold is for judges that give scores (openai, python, inspect), and none is among the judges. Leave it out.")
    if options["threshold"] is not None and len(scoring) > 1:
        raise RecipeError("--threshold would apply to judges with different scales. Name judges of one kind, or leave it out.")
    settings = _judge_settings(options, dry_run=dry_run)
    judges = [make_judge(text, settings) for text in texts]
    check_judges(judges)
    return judges


def _judge_settings(options: dict[str, Any], *, dry_run: bool) -> JudgeOptions:
    from lox_merge.safety.judges.factory import JudgeOptions

    threshold, temperature = options["threshold"], options["judge_temperature"]
    return JudgeOptions(
        endpoint=options["judge_endpoint"],
        key_variable=options["judge_key_variable"],
        rubric=options["rubric"],
        threshold=None if threshold is None else number(threshold, "--threshold"),
        temperature=None if temperature == "default" else number(temperature, "--judge-temperature"),
        concurrency=options["judge_concurrency"],
        device=options["device"],
        cache_dir=options["cache_dir"],
        dry_run=dry_run,
    )


def cache_of(options: dict[str, Any]) -> VerdictCache | None:
    """Verdicts given before, unless --no-cache."""
    from lox_merge.safety.cache import VerdictCache

    return None if options["no_cache"] else VerdictCache()


def rendering_of(options: dict[str, Any]) -> Rendering:
    from lox_merge.safety.chat import Rendering

    return Rendering(options["system"], False if options["no_chat_template"] else None, options["prefill"])


def utility_of(options: dict[str, Any]) -> UtilityMeasures | None:
    """The measures that `utility_options` name; None for none. Raises RequestError."""
    from lox_merge.safety.search_utility import load_measures

    tasks = [task for task in (options["lm_eval"] or "").split(",") if task.strip()]
    if options["lm_eval_limit"] is not None and not tasks:
        raise RecipeError("--lm-eval-limit is for the tasks of --lm-eval. Name some, or leave it out.")
    measures = load_measures(
        options["utility_questions"],
        options["utility_text"],
        options["utility_prompts"],
        tasks=[task.strip() for task in tasks],
        task_limit=options["lm_eval_limit"],
        cache_dir=options["cache_dir"],
    )
    return measures or None
