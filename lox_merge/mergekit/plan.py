"""Preflight of a `lox` merge: mergekit's own plan, made without writing, held against what the checkpoints really contain.

mergekit writes the tensors that its architecture template names and drops all others without a word; it meets a missing
tensor, other shapes or a differing vocabulary in the middle of writing. Both plans are compared here first.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from lox_merge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lox_merge.checkpoint.dtypes import EDITABLE
from lox_merge.errors import LoxMergeError, LoxMergeWarning, PlanError, RequestError
from lox_merge.jobs.layout import matrix_views
from lox_merge.jobs.lox_edit import LoxEdit
from lox_merge.jobs.plan import Plan, make_plan
from lox_merge.jobs.recipe import Recipe
from lox_merge.mergekit.config import Setting, aligned_reference, lox_problems, one_line, settings
from lox_merge.mergekit.dtype import settle_dtype

_MOST_NAMED = 8


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor of mergekit's plan with its resolved parameters. sources: aligned's tensors that it is made of.

    is_matrix: whether it holds a matrix at all; vectors stay as in aligned whatever the parameters say.
    """

    name: str
    rank: int | str
    alpha: float
    rounding: str
    sources: tuple[str, ...]
    is_matrix: bool

    @property
    def edited(self) -> bool:
        return self.is_matrix and self.rank != 0 and self.alpha != 0


@dataclass
class MergePlan:
    """What a `lox` merge will do. config: what mergekit is given (made safe); files: base, aligned and side files.

    rounded_by_mergekit: whether mergekit casts the method's result to another dtype on writing.
    """

    config: MergeConfiguration
    files: Plan
    tensors: list[PlannedTensor]
    rounded_by_mergekit: bool
    warnings: list[str] = field(default_factory=list)

    @property
    def aligned(self) -> Checkpoint:
        return self.files.aligned


def plan_merge(raw: Mapping[str, Any], config: MergeConfiguration, out: Path, options: MergeOptions, *, order_is_right: bool = False) -> MergePlan:
    """Checks the whole merge. Raises PlanError with every problem found, or RequestError where mergekit itself refuses."""
    problems = lox_problems(raw, config)
    if problems:
        raise PlanError(problems)
    reference = aligned_reference(config)
    LoaderCache().setup(options=options)
    try:
        base = _open(config.base_model, "base", options)
        aligned = _open(reference, "aligned", options)
    except LoxMergeError:
        raise
    except Exception as error:  # mergekit and peft raise many types for adapters that cannot be merged
        raise RequestError(f"the models cannot be opened: {one_line(error)}.") from error
    dtype = (config.out_dtype or config.dtype or "").removeprefix("torch.") or None
    recipe = Recipe(dtype=dtype)
    files = make_plan({"base": base, "aligned": aligned}, out, recipe, LoxEdit(recipe), order_confirmed=order_is_right)
    notes = [] if options.copy_tokenizer else ["--no-copy-tokenizer: the output has no tokenizer."]
    safe = _without_tokenizer(config, notes)
    try:
        tensors, weights = _mergekit_plan(safe, reference, options, aligned)
    except LoxMergeError:
        raise
    except Exception as error:
        raise RequestError(f"mergekit cannot plan this merge: {one_line(error)}.") from error
    problems = _coverage_problems(files, tensors, weights)
    problems += _setting_problems(list(settings(config)), tensors, aligned, notes)
    safe, rounded, dtype_problems = settle_dtype(safe, files, tensors)
    problems += dtype_problems
    if not any(tensor.edited for tensor in tensors):
        problems.append("every tensor has alpha 0 or rank 0: the output would be the aligned model unchanged. Check filters and gradients.")
    if problems:
        raise PlanError(problems)
    return MergePlan(safe, files, tensors, rounded, notes)


def warn(plan: MergePlan) -> None:
    for text in plan.warnings:
        warnings.warn(text, LoxMergeWarning, stacklevel=3)


def _open(reference: Any, role: str, options: MergeOptions) -> Checkpoint:
    """mergekit's reference as files; an adapter (`model+lora`) is merged first, into mergekit's own cache."""
    if reference.lora is not None and not options.lora_merge_cache:
        raise RequestError(f"{role}: {reference} has an adapter; add --lora-merge-cache FOLDER, where the merged model is kept.")
    merged = reference.merged(
        cache_dir=options.lora_merge_cache, trust_remote_code=options.trust_remote_code, lora_merge_dtype=options.lora_merge_dtype
    )
    cache = Path(options.transformers_cache) if options.transformers_cache else None
    return open_checkpoint(str(merged.model), role, cache)


def _without_tokenizer(config: MergeConfiguration, notes: list[str]) -> MergeConfiguration:
    """The same merge on the vocabulary as it is. mergekit would rebuild embeddings to the tokenizer's length, which cuts
    padded vocabularies, and the result would no longer fit the aligned model's files."""
    ignored = [key for key in ("tokenizer_source", "tokenizer", "chat_template") if getattr(config, key)]
    if ignored:
        notes.append(f"{', '.join(ignored)} ignored: the output keeps the aligned model's vocabulary, tokenizer and chat template.")
    return config.model_copy(update={"tokenizer_source": None, "tokenizer": None, "chat_template": None}, deep=True)


def _mergekit_plan(config: MergeConfiguration, reference: Any, options: MergeOptions, aligned: Checkpoint) -> tuple[list[PlannedTensor], list[Any]]:
    """mergekit's plan (on a copy, since planning rewrites the configuration), and its weight descriptions."""
    architecture = get_architecture_info(config, options)
    out_config = config.base_model.config(trust_remote_code=options.trust_remote_code)
    copy = config.model_copy(deep=True)
    # plan_in_memory cannot make its tasks in mergekit 0.1.5; this one writes nothing either before its tasks run.
    planned_tasks = MergePlanner(copy, architecture, options=options, out_model_config=out_config).plan_to_disk(out_path="")
    tasks = [task.tensor_task for task in planned_tasks if isinstance(task, SaveTensor)]
    made_of: dict[str, list[str]] = {}
    weights = [task.output_weight for task in tasks]
    alias = {other: weight.name for weight in weights for other in weight.aliases or ()}
    planned = {weight.name for weight in weights}
    for name, target in model_layout(aligned.config.get("model_type"), aligned.names).items():
        written = name if name in planned else alias.get(name) or alias.get(target) or target
        made_of.setdefault(written, []).append(name)
    tensors = []
    for task in tasks:
        name, values = task.output_weight.name, task.input_parameters[reference]
        sources = tuple(made_of.get(name, ()))
        is_matrix = any(matrix_views(source, aligned.info(source).shape, aligned.config) for source in sources)
        tensors.append(PlannedTensor(name, values["rank"], values["alpha"], values["rounding"], sources, is_matrix))
    return tensors, weights


def model_layout(model_type: str | None, names: Iterable[str]) -> dict[str, str]:
    """Checkpoint name to the name in transformers' model, for layouts that transformers converts on loading (fused experts)."""
    transforms = (get_checkpoint_conversion_mapping(model_type) if model_type else None) or []
    layout = {}
    for name in names:
        current = name
        for transform in transforms:
            renamed, pattern = transform.rename_source_key(current)
            if pattern is not None:
                current = renamed
        layout[name] = current
    return layout


def _coverage_problems(files: Plan, tensors: list[PlannedTensor], weights: list[Any]) -> list[str]:
    """What mergekit would drop, could not load, or would fail on halfway."""
    problems = []
    written = {source for tensor in tensors for source in tensor.sources}
    # make_plan has settled the other ways in which two checkpoints differ.
    dropped = [tensor.name for tensor in files.tensors if tensor.name not in written and tensor.reason != "constant buffer"]
    if dropped:
        problems.append(
            f"mergekit's architecture template leaves out {len(dropped)} tensor(s) of {files.aligned.title}, and the output would lack them: "
            f"{_shown(dropped)}. Use lox-merge harden, which keeps every tensor."
        )
    tied = {weight.name for weight in weights if weight.tied_names or weight.optional}
    unknown = [tensor.name for tensor in tensors if not tensor.sources and tensor.name not in tied]
    if unknown:
        problems.append(f"mergekit wants {len(unknown)} tensor(s) that {files.aligned.title} does not have: {_shown(unknown)}. Use lox-merge harden.")
    vocabulary = [tensor.name for tensor in files.tensors if tensor.reason == "vocabularies differ"]
    if vocabulary:
        shapes = "; ".join(f"{name}: base {list(files.base.info(name).shape)}, aligned {list(files.aligned.info(name).shape)}" for name in vocabulary)
        problems.append(
            f"the vocabularies differ ({shapes}), which mergekit cannot merge without rebuilding them. "
            "Use lox-merge harden, which copies these tensors from the aligned model."
        )
    for name, source in ((tensor.name, source) for tensor in tensors for source in tensor.sources):
        if files.aligned.info(source).dtype not in EDITABLE:
            problems += _buffer_problems(files, name, source)
    return problems


def _buffer_problems(files: Plan, name: str, source: str) -> list[str]:
    """mergekit copies whole-number buffers only where all models agree."""
    if source in files.base and torch.equal(files.base.tensor(source), files.aligned.tensor(source)):
        return []
    dtype = files.aligned.info(source).dtype
    return [f"{name} holds {dtype} values that differ from base's; mergekit cannot choose between them. Use lox-merge harden."]


def _setting_problems(given: list[Setting], tensors: list[PlannedTensor], aligned: Checkpoint, notes: list[str]) -> list[str]:
    """Filters that match nothing; and, as a warning, filtered lists that end without a value for all other tensors."""
    problems = []
    names = [tensor.name for tensor in tensors]
    # One configuration may serve tied and untied models: a tied one has no output head of its own.
    known = [*names, "lm_head.weight"] if aligned.ties_embeddings else names
    for setting in given:
        conditions = setting.conditions()
        for condition in conditions:
            if condition.filter not in (None, "*") and not any(condition.filter in name for name in known):
                problems.append(
                    f"{setting.where}.{setting.name}: the filter {condition.filter!r} is part of no tensor name; "
                    f"a name looks like {names[len(names) // 2]!r}."
                )
        if all(condition.filter not in (None, "*") for condition in conditions):
            notes.append(
                f"{setting.where}.{setting.name} has filters only: all other tensors get the default. "
                "Add a last entry `- value: …` to say what they get."
            )
    return problems


def _shown(names: list[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")
