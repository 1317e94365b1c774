"""Preflight of a merge by one of our methods: mergekit's own plan, made without writing, held against what the checkpoints really contain.

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
from lox_merge.jobs.edit import Edit
from lox_merge.jobs.filter_checks import check_direction
from lox_merge.jobs.filter_edit import FilterEdit
from lox_merge.jobs.filter_recipe import FilterRecipe
from lox_merge.jobs.layout import is_vector, matrix_views
from lox_merge.jobs.lox_edit import LoxEdit
from lox_merge.jobs.plan import Plan, make_plan
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.settings import Settings
from lox_merge.mergekit.config import Setting, lox_problems, one_line, references, settings
from lox_merge.mergekit.dtype import settle_dtype
from lox_merge.mergekit.plugin import METHOD, OWN_METHODS
from lox_merge.wording import first_few

_MOST_NAMED = 8


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor of mergekit's plan with its resolved parameters. sources: tensors of the mirrored model that it is made of.

    edited: whether the method changes it, by its shape and its parameters.
    """

    name: str
    settings: Mapping[str, Any]
    sources: tuple[str, ...]
    edited: bool


@dataclass
class MergePlan:
    """What a merge will do. config: what mergekit is given (made safe); files: the checkpoints by role and the side files.

    rounded_by_mergekit: whether mergekit casts the method's result to another dtype on writing.
    """

    config: MergeConfiguration
    files: Plan
    tensors: list[PlannedTensor]
    rounded_by_mergekit: bool
    warnings: list[str] = field(default_factory=list)

    @property
    def mirrored(self) -> Checkpoint:
        """The model whose layout, tokenizer and other files the output has."""
        return self.files.mirrored


def plan_merge(raw: Mapping[str, Any], config: MergeConfiguration, out: Path, options: MergeOptions, *, order_is_right: bool = False) -> MergePlan:
    """Checks the whole merge. Raises PlanError with every problem found, or RequestError where mergekit itself refuses."""
    problems = lox_problems(raw, config)
    if problems:
        raise PlanError(problems)
    others = references(config)
    reference = list(others.values())[-1]
    LoaderCache().setup(options=options)
    try:
        opened = {role: _open(model, role, options) for role, model in {"base": config.base_model, **others}.items()}
    except LoxMergeError:
        raise
    except Exception as error:  # mergekit and peft raise many types for adapters that cannot be merged
        raise RequestError(f"the models cannot be opened: {one_line(error)}.") from error
    dtype = (config.out_dtype or config.dtype or "").removeprefix("torch.") or None
    recipe, edit = _widest(config.merge_method, dtype)
    files = make_plan(opened, out, recipe, edit, order_confirmed=order_is_right)
    mirrored = files.mirrored
    notes = [] if options.copy_tokenizer else ["--no-copy-tokenizer: the output has no tokenizer."]
    safe = _without_tokenizer(config, notes)
    try:
        tensors, weights = _mergekit_plan(safe, reference, options, mirrored)
    except LoxMergeError:
        raise
    except Exception as error:
        raise RequestError(f"mergekit cannot plan this merge: {one_line(error)}.") from error
    problems = _coverage_problems(files, tensors, weights)
    problems += _setting_problems(list(settings(config)), tensors, mirrored, notes)
    problems += _feedback_problems(tensors)
    safe, rounded, dtype_problems = settle_dtype(safe, files, tensors)
    problems += dtype_problems
    if not any(tensor.edited for tensor in tensors):
        none = "alpha 0 or rank 0" if config.merge_method == METHOD else "fraction 0 and rank 0"
        problems.append(f"every tensor has {none}: the output would be the {mirrored.role} model unchanged. Check filters and gradients.")
    if problems:
        raise PlanError(problems)
    if config.merge_method != METHOD:
        check_direction(files)
    return MergePlan(safe, files, tensors, rounded, notes)


def _feedback_problems(tensors: list[PlannedTensor]) -> list[str]:
    """What no recipe of a hardening may ask for, where filters bring it together in one tensor."""
    found = [tensor.name for tensor in tensors if tensor.edited and (tensor.settings["rank"], tensor.settings["rounding"]) == ("full", "feedback")]
    if not found:
        return []
    return [
        f"{first_few(found, _MOST_NAMED)}: rounding 'feedback' needs a limited rank; with rank 'full' use `rounding: stochastic`, or "
        "`out_dtype: float32` with `rounding: nearest`."
    ]


def _widest(method: str, dtype: str | None) -> tuple[Settings, Edit]:
    """The recipe under which every tensor is looked at that the configuration may edit."""
    if method == METHOD:
        recipe = Recipe(dtype=dtype)
        return recipe, LoxEdit(recipe)
    whole = FilterRecipe(rank=1, dtype=dtype)
    return whole, FilterEdit(whole)


def _is_edited(method: str, values: Mapping[str, Any], matrices: bool, vectors: bool) -> bool:
    if method == METHOD:
        return matrices and values["rank"] != 0 and values["alpha"] != 0
    return (matrices or vectors) and (values["rank"] != 0 or values["fraction"] != 0)


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


def _mergekit_plan(config: MergeConfiguration, reference: Any, options: MergeOptions, mirrored: Checkpoint) -> tuple[list[PlannedTensor], list[Any]]:
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
    for name, target in model_layout(mirrored.config.get("model_type"), mirrored.names).items():
        written = name if name in planned else alias.get(name) or alias.get(target) or target
        made_of.setdefault(written, []).append(name)
    tensors = []
    for task in tasks:
        name, values = task.output_weight.name, {**task.parameters, **task.input_parameters[reference]}
        sources = tuple(made_of.get(name, ()))
        matrices = any(matrix_views(source, mirrored.info(source).shape, mirrored.config) for source in sources)
        vectors = any(is_vector(mirrored.info(source).shape) for source in sources)
        kept = {parameter.name: values[parameter.name] for parameter in OWN_METHODS[config.merge_method].spec.parameters if parameter.name != "role"}
        tensors.append(PlannedTensor(name, kept, sources, _is_edited(config.merge_method, values, matrices, vectors)))
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
            f"mergekit's architecture template leaves out {len(dropped)} tensor(s) of {files.mirrored.title}, and the output would lack them: "
            f"{first_few(dropped, _MOST_NAMED)}. Use lox-merge {_command(files)}, which keeps every tensor."
        )
    tied = {weight.name for weight in weights if weight.tied_names or weight.optional}
    unknown = [tensor.name for tensor in tensors if not tensor.sources and tensor.name not in tied]
    if unknown:
        problems.append(
            f"mergekit wants {len(unknown)} tensor(s) that {files.mirrored.title} does not have: "
            f"{first_few(unknown, _MOST_NAMED)}. Use lox-merge {_command(files)}."
        )
    vocabulary = [tensor.name for tensor in files.tensors if tensor.reason == "vocabularies differ"]
    if vocabulary:
        shapes = "; ".join(
            f"{name}: base {list(files.base.info(name).shape)}, {files.mirrored.role} {list(files.mirrored.info(name).shape)}" for name in vocabulary
        )
        problems.append(
            f"the vocabularies differ ({shapes}), which mergekit cannot merge without rebuilding them. "
            f"Use lox-merge {_command(files)}, which copies these tensors from the {files.mirrored.role} model."
        )
    for name, source in ((tensor.name, source) for tensor in tensors for source in tensor.sources):
        if files.mirrored.info(source).dtype not in EDITABLE:
            problems += _buffer_problems(files, name, source)
    return problems


def _buffer_problems(files: Plan, name: str, source: str) -> list[str]:
    """mergekit copies whole-number buffers only where all models agree."""
    if all(source in other and torch.equal(other.tensor(source), files.mirrored.tensor(source)) for other in files.others):
        return []
    dtype = files.mirrored.info(source).dtype
    return [f"{name} holds {dtype} values that differ from base's; mergekit cannot choose between them. Use lox-merge {_command(files)}."]


def _command(files: Plan) -> str:
    return "harden" if files.edit.method == "lox" else "project"


def _setting_problems(given: list[Setting], tensors: list[PlannedTensor], mirrored: Checkpoint, notes: list[str]) -> list[str]:
    """Filters that match nothing; and, as a warning, filtered lists that end without a value for all other tensors."""
    problems = []
    names = [tensor.name for tensor in tensors]
    # One configuration may serve tied and untied models: a tied one has no output head of its own.
    known = [*names, "lm_head.weight"] if mirrored.ties_embeddings else names
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
