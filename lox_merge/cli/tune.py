"""`lox-merge search --tune`: rank and alpha by behaviour, as a Pareto front to choose from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from lox_merge.cli.in_memory import selection_of
from lox_merge.cli.measuring import cache_of, judges_of, on_command_line, options_in_order, prompts_of, rendering_of
from lox_merge.cli.options import GIVEN_FILE, GIVEN_PATH, number
from lox_merge.errors import RequestError

if TYPE_CHECKING:
    from lox_merge.jobs.recipe import Recipe
    from lox_merge.safety.tuning import TuneSpace, Tuning

# Options that only mean something with --tune, and those that only do without it.
_OWN = ("attack", "attack_steps", "attack_batch_size", "learning_rate", "lora", "trials", "rank_range", "alpha_range", "group", "study", "pick")
_OTHERS = (
    "ranks",
    "bisect",
    "max_rank",
    "rho",
    "confident",
    "alpha",
    "replies",
    "utility_questions",
    "utility_text",
    "lm_eval",
    "dtype",
    "device_map",
)

tune_options = options_in_order(
    click.option("--tune", is_flag=True, help="Choose rank and alpha: ASR after --attack against KL on --utility-prompts."),
    click.option("--attack", type=GIVEN_PATH, metavar="DATA", help="With --tune: data of the fine-tuning attack, as in robustness."),
    click.option("--attack-steps", type=click.IntRange(min=1), default=50, show_default=True, help="Its training steps."),
    click.option("--attack-batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Its examples a step."),
    click.option("--learning-rate", default="2e-5", show_default=True, metavar="FLOAT", help="Its learning rate."),
    click.option("--lora", is_flag=True, help="It trains LoRA adapters instead of all weights."),
    click.option("--trials", type=click.IntRange(min=1), default=20, show_default=True, help="Settings to measure, those of the study counted in."),
    click.option("--rank-range", default="1-16", show_default=True, metavar="LOW-HIGH", help="Ranks to choose from."),
    click.option("--alpha-range", default="0.25-2", show_default=True, metavar="LOW-HIGH", help="Alphas to choose from."),
    click.option("--group", multiple=True, metavar="REGEX", help="Tensors that get a rank and alpha of their own. Repeatable."),
    click.option("--study", type=GIVEN_FILE, metavar="FILE", help="Keep the trials here; the same command goes on from them."),
    click.option("--pick", type=click.IntRange(min=0), metavar="TRIAL", help="Harden with this trial of --study, to --write OUT; measure nothing."),
)


def check_tune_options(context: click.Context) -> None:
    """Raises RequestError for options of a command line that do not go together."""
    options = context.params
    # What the environment has for the other way of searching stands in nobody's way.
    given = [parameter.name for parameter in context.command.params if parameter.name and on_command_line(parameter.name)]
    if not options["tune"]:
        wrong = [name for name in given if name in _OWN]
        if wrong:
            raise RequestError(f"--{wrong[0].replace('_', '-')} goes with --tune.")
        return
    wrong = [name for name in given if name in _OTHERS]
    if wrong:
        what = "chooses it" if wrong[0] == "alpha" else "measures ASR after an attack and KL"
        raise RequestError(f"--{wrong[0].replace('_', '-')} does not go with --tune, which {what}.")
    if options["pick"] is not None:
        if options["write"] is None or options["study"] is None:
            raise RequestError("--pick hardens with a trial of a study: it needs --study FILE and --write OUT.")
        return
    if options["write"] is not None:
        raise RequestError("--tune gives several settings to choose from and writes none: look at them, then add --study FILE --pick TRIAL.")
    missing = [name for name in ("attack", "utility_prompts") if options[name] is None]
    if missing:
        raise RequestError(f"--tune needs --{missing[0].replace('_', '-')}: data to attack with, and harmless prompts for the KL divergence.")


def tune_models(base: str, aligned: str, recipe: Recipe | None, options: dict[str, Any]) -> Tuning:
    """Runs the study that the options ask for."""
    from lox_merge.cli.progress import byte_progress
    from lox_merge.safety.attack import AttackSettings
    from lox_merge.safety.conversations import load_conversations
    from lox_merge.safety.decoding import Decoding
    from lox_merge.safety.prompts import load_prompts
    from lox_merge.safety.tune_job import tune

    (judge,) = judges_of(options)
    settings = AttackSettings(
        steps=(options["attack_steps"],),
        learning_rate=number(options["learning_rate"], "--learning-rate"),
        batch_size=options["attack_batch_size"],
        lora=options["lora"],
    )
    with byte_progress(0, "decomposing") as decomposing:
        return tune(
            base,
            aligned,
            prompts_of(options),
            judge,
            load_prompts(options["utility_prompts"], cache_dir=options["cache_dir"]),
            load_conversations(options["attack"]),
            space=_space(options),
            trials=options["trials"],
            settings=settings,
            study=options["study"],
            seed=options["seed"],
            factors=options["factors"],
            recipe=recipe,
            model={"decoding": Decoding(max_new_tokens=options["max_new_tokens"]), "batch_size": options["batch_size"]},
            rendering=rendering_of(options),
            cache=cache_of(options),
            device=options["device"],
            cache_dir=options["cache_dir"],
            order_is_right=options["order_is_right"],
            base_is_right=options["base_is_right"],
            decomposing=decomposing,
            report=lambda text: click.echo(text, err=True),
        )


def picked_recipe(base: str, aligned: str, options: dict[str, Any]) -> Recipe:
    """The recipe of the trial that --pick names, after seeing that the study is of this pair. Raises RequestError."""
    from lox_merge.jobs.factors import source_difference
    from lox_merge.jobs.harden import open_checkpoints
    from lox_merge.safety.tune_study import read_study

    found = read_study(options["study"])
    opened = open_checkpoints({"base": base, "aligned": aligned}, options["cache_dir"], base_is_right=options["base_is_right"])
    for role, checkpoint in opened.items():
        difference = source_difference(found.identity["sources"][role], checkpoint)
        checkpoint.close()
        if difference:
            raise RequestError(f"{options['study'].name} is a study of another pair ({difference}). Give the models that it was made with.")
    recipe = found.trial(options["pick"]).recipe
    for name, value in selection_of(options).items():
        if value and value != getattr(recipe, name):
            option = f"--{name.replace('_', '-')}"
            raise RequestError(
                f"{option} is not what {options['study'].name} was made with; --pick hardens with the recipe of its trial: leave it out."
            )
    return recipe


def _space(options: dict[str, Any]) -> TuneSpace:
    from lox_merge.safety.tuning import TuneSpace

    low, high = _range(options["rank_range"], "--rank-range")
    if low != int(low) or high != int(high):
        raise RequestError(f"--rank-range {options['rank_range']!r} is not two whole numbers, such as 1-16.")
    return TuneSpace((int(low), int(high)), _range(options["alpha_range"], "--alpha-range"), options["group"])


def _range(text: str, option: str) -> tuple[float, float]:
    parts = text.split("-")
    if len(parts) != 2:
        raise RequestError(f"{option} {text!r} is not LOW-HIGH, such as 1-16.")
    return number(parts[0], option), number(parts[1], option)
