"""`lox-merge harden`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lox_merge.cli.options import (
    GIVEN_PATH,
    base_option,
    cache_option,
    device_option,
    dtype_option,
    executor_option,
    fused_option,
    json_option,
    number,
    order_option,
    pattern_pairs,
    seed_option,
    tolerance_option,
    workers_option,
)
from lox_merge.cli.push import PushWhenDone, push_when_done
from lox_merge.cli.start import import_torch
from lox_merge.errors import RequestError

if TYPE_CHECKING:
    from lox_merge.jobs.quantised import AskedForm


@click.command("harden", short_help="Harden an aligned checkpoint by low-rank extrapolation (LoX).")
@click.argument("base")
@click.argument("aligned")
@click.argument("out", type=GIVEN_PATH)
@click.option(
    "--rank",
    default="6",
    show_default=True,
    metavar="K|full|P%|energy:F|noise-floor|search",
    help="Singular directions of each delta that are extrapolated; search finds the effective rank with --prompts first.",
)
@click.option("--prompts", metavar="FILE|DATASET", help="Harmful requests for --rank search (lox-merge search has more settings).")
@click.option("--judge", metavar="SPEC", help="Who decides in --rank search.  [default: keyword]")
@click.option("--factors", type=GIVEN_PATH, help="File of lox-merge decompose for this pair: no SVD is spent.")
@click.option("--alpha", default="1.25", show_default=True, metavar="FLOAT", help="Extrapolation factor, ≥ 0.")
@click.option("--include", multiple=True, metavar="REGEX", help="Edit only tensors whose name matches. Repeatable.")
@click.option("--exclude", multiple=True, metavar="REGEX", help="Leave tensors whose name matches as in ALIGNED. Repeatable.")
@click.option("--rank-pattern", multiple=True, metavar="REGEX=RANK", help="Another rank where the name matches; the first match wins. Repeatable.")
@click.option("--alpha-pattern", multiple=True, metavar="REGEX=ALPHA", help="Another alpha where the name matches; the first match wins. Repeatable.")
@click.option("--linear-only", is_flag=True, help="Leave embeddings, lm_head and convolutions as in ALIGNED.")
@fused_option
@dtype_option("ALIGNED")
@click.option(
    "--rounding",
    metavar="nearest|feedback|stochastic",
    help="How edits are rounded to the output dtype.  [default: nearest; feedback with --requantise]",
)
@click.option("--requantise", is_flag=True, help="Write a quantised ALIGNED in its own form: same scales, part of the edit lost (docs/quantised.md).")
@tolerance_option
@click.option("--skip-non-finite", is_flag=True, help="Copy tensors whose delta holds NaN or Inf instead of failing.")
@order_option
@base_option
@device_option
@workers_option
@executor_option
@seed_option
@cache_option
@click.option("--low-disk", is_flag=True, help="Have weight files of the Hub on disk only while they are read: for models larger than the disk.")
@click.option("--as-adapter", is_flag=True, help="Write the edit as a PEFT LoRA adapter on ALIGNED (float32, or --dtype), not a model.")
@click.option("--overwrite", is_flag=True, help="Start anew where OUT holds another output of lox-merge.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
@push_when_done
@json_option
def harden_command(
    base: str,
    aligned: str,
    out: Path,
    rank: str,
    prompts: str | None,
    judge: str | None,
    factors: Path | None,
    alpha: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    rank_pattern: tuple[str, ...],
    alpha_pattern: tuple[str, ...],
    linear_only: bool,
    fused: str,
    dtype: str | None,
    rounding: str | None,
    requantise: bool,
    tolerance: str,
    skip_non_finite: bool,
    order_is_right: bool,
    base_is_right: bool,
    device: str,
    workers: str,
    executor: str,
    seed: int,
    cache_dir: Path | None,
    low_disk: bool,
    as_adapter: bool,
    overwrite: bool,
    dry_run: bool,
    push_to: str | None,
    weights_on_hub: bool,
    public: bool,
    revision: str | None,
    pull_request: bool,
    license: str | None,
    license_name: str | None,
    license_link: str | None,
    json_file: str | None,
) -> None:
    """Write ALIGNED + alpha · Proj_k(ALIGNED − BASE) to the folder OUT.

    BASE is the pre-trained checkpoint, ALIGNED the safety-tuned one, or a PEFT LoRA adapter over BASE: local folders or Hub ids
    (org/name or org/name@revision). OUT mirrors ALIGNED's files. Run the same command again after an interruption to go on.

    \b
    lox-merge harden meta-llama/Llama-2-7b-hf me/llama-2-7b-aligned out
    lox-merge harden base aligned out --rank noise-floor --alpha 1.0 --exclude lm_head
    """
    from lox_merge.jobs.early import begin_early
    from lox_merge.jobs.executors.server import warm_up

    if not dry_run:
        # Beside this process's own imports.
        warm_up(workers, executor)
        if workers == "1" and not as_adapter:
            begin_early([aligned, base])
    import_torch()

    from lox_merge.cli.adapter import adapter_json, harden_as_adapter, plan_as_adapter, print_adapter
    from lox_merge.cli.json_file import write_json
    from lox_merge.cli.progress import byte_progress
    from lox_merge.cli.show import print_plan, print_result
    from lox_merge.jobs.beforehand import all_here, check_model_job
    from lox_merge.jobs.estimate import estimate
    from lox_merge.jobs.executors.choose import PROCESSES, check_executor, workers_of_dry_run
    from lox_merge.jobs.executors.sizing import check_workers, parse_workers
    from lox_merge.jobs.factors import open_factors
    from lox_merge.jobs.harden import check_some_delta, execute, plan_hardening
    from lox_merge.jobs.output_folder import check_output
    from lox_merge.jobs.quantised import usual_form_error
    from lox_merge.jobs.recipe import Recipe

    searched = rank == "search"
    if searched and (prompts is None or dry_run):
        raise RequestError("--rank search finds the rank by behaviour: it needs --prompts FILE and cannot be a --dry-run.")
    for option, given in (("--prompts", prompts), ("--judge", judge)):
        if not searched and given is not None:
            raise RequestError(f"{option} is about choosing the rank: it goes with --rank search.")
    recipe = Recipe(
        rank=1 if searched else rank,  # any rank will do to check the request before the search
        alpha=number(alpha, "--alpha"),
        include=include,
        exclude=exclude,
        rank_pattern=pattern_pairs(rank_pattern, "--rank-pattern"),
        alpha_pattern=tuple((pattern, number(value, "--alpha-pattern")) for pattern, value in pattern_pairs(alpha_pattern, "--alpha-pattern")),
        linear_only=linear_only,
        dtype=dtype,
        rounding=rounding or ("feedback" if requantise else "nearest"),  # type: ignore[arg-type]
        requantise=requantise,
        tolerance=number(tolerance, "--tolerance"),
        seed=seed,
        fused=fused,
        skip_non_finite=skip_non_finite,
    )
    if low_disk and (searched or as_adapter):
        raise RequestError(f"--low-disk does not go with {'--rank search, which loads whole models' if searched else '--as-adapter'}. Leave one out.")
    count = parse_workers(workers)
    if weights_on_hub:
        others = {"--factors": factors, "--low-disk": low_disk, "--as-adapter": as_adapter, "--rank search": searched, "--pull-request": pull_request}
        if push_to is None or any(others.values()):
            wrong = next((f"does not go with {name}" for name, given in others.items() if given), "goes with --push REPO")
            raise RequestError(f"--weights-on-hub {wrong}: workers send their shards to the Hub, and this machine has neither those nor the models.")
    check_executor(executor, low_disk=low_disk, as_adapter=as_adapter, weights_on_hub=weights_on_hub)
    check_workers(count, low_disk=low_disk, as_adapter=as_adapter)
    licence = {"license": license, "license_name": license_name, "license_link": license_link}
    if push_to is None and (public or pull_request or revision is not None or any(text is not None for text in licence.values())):
        raise RequestError(
            "--public, --revision, --pull-request, --license, --license-name and --license-link are about publishing: they go with --push REPO."
        )
    sources: dict[str, Any] = {"order_is_right": order_is_right, "base_is_right": base_is_right, "cache_dir": cache_dir}
    form: AskedForm = "adapter" if as_adapter else "usual"
    with open_factors(factors) as held:
        plan = plan_hardening(base, aligned, out, recipe=recipe, factors=held, low_disk=low_disk, form=form, **sources)
        asked, as_adapter = as_adapter, plan.form == "adapter"
        if as_adapter and not asked:
            other = {"--low-disk": low_disk, "--weights-on-hub": weights_on_hub, "--workers": count != 1, "--executor": executor != PROCESSES}
            if wrong := " and ".join(name for name, given in other.items() if given):
                raise usual_form_error(plan.mirrored, f"It is one file, which one worker writes: no {wrong}.", f"Leave out {wrong}")
        pushing = None
        if push_to is not None:
            place: dict[str, Any] = {"public": public, "revision": revision, "pull_request": pull_request}
            others_said: dict[str, Any] = {"licence": licence, "overwrite": overwrite, "cache_dir": cache_dir}
            pushing = PushWhenDone(plan, push_to, **place, **others_said, base=base, aligned=aligned)
            if weights_on_hub:
                pushing.store_weights(plan)
        if searched:
            from lox_merge.cli.search import effective_rank

            check_output(out, overwrite=overwrite)
            settings = {"device": device, "factors": factors, **sources}
            found = effective_rank(base, aligned, recipe, prompts=str(prompts), judges=judge or "keyword", show=json_file != "-", **settings)
            plan = plan_hardening(base, aligned, out, recipe=recipe.with_rank(found), factors=held, form=form, **sources)
        if dry_run and as_adapter:
            plan_as_adapter(plan, asked=asked, device=device, overwrite=overwrite, json_file=json_file)
            return
        if dry_run:
            target, _, _ = check_model_job(plan, device=device, workers=count, executor=executor, overwrite=overwrite)
            if all_here(plan):
                check_some_delta(plan)
            report = estimate(plan, "harden", workers_of_dry_run(executor, count, plan, target), target)
            if json_file:
                write_json(json_file, report)
            if json_file != "-":
                print_plan(plan, report)
            return
        if as_adapter:
            result = harden_as_adapter(plan, asked=asked, device=device, overwrite=overwrite)
            report = adapter_json(result)
        else:
            with byte_progress(plan.bytes_written, "hardening") as progress:
                result = execute(plan, device=device, workers=count, executor=executor, overwrite=overwrite, progress=progress)
            report = result.to_json()
    if json_file and json_file != "-":
        write_json(json_file, report)  # before anything is shown, and again with what publishing adds
    if json_file != "-":
        if as_adapter:
            print_adapter(result)
        else:
            print_result(result, weights_elsewhere=weights_on_hub)
    try:
        if pushing:
            report["push"] = pushing.publish(show=json_file != "-")
    finally:
        if json_file and (pushing or json_file == "-"):
            write_json(json_file, report)
