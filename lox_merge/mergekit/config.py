"""Reading a mergekit configuration and finding what is wrong with it for method `lox`, before anything is written.

mergekit ignores keys that it does not know, takes no notice of parameters in places where a method has none, and finds a
negative factor only when it reaches the tensor. All of that is an error here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.merge_methods import registered_methods
from pydantic import ValidationError

from lox_merge.errors import RecipeError, RequestError
from lox_merge.mergekit.plugin import METHOD, OWN_METHODS
from lox_merge.mergekit.projection import ROLES

_DEEPEST = 100


@dataclass(frozen=True)
class Setting:
    """One `parameters:` entry. where: its place, for messages."""

    where: str
    name: str
    value: Any

    def conditions(self) -> list[ConditionalParameter]:
        """The setting as filtered values, the first match of which holds; a plain value or gradient has no filter."""
        if isinstance(self.value, ConditionalParameter):
            return [self.value]
        if isinstance(self.value, list) and any(isinstance(part, ConditionalParameter) for part in self.value):
            return list(self.value)
        return [ConditionalParameter(value=self.value)]


def read_configuration(path: Path) -> tuple[dict[str, Any], MergeConfiguration]:
    """The YAML as written and as mergekit understands it. Raises RequestError for anything that is no configuration."""
    try:
        text = path.read_text(encoding="utf-8")
        if _depth(text) > _DEEPEST:
            raise RequestError(f"the configuration {path.name} is nested too deeply: a merge has a handful of levels.")
        raw = yaml.safe_load(text)
    except OSError as error:
        raise RequestError(f"the configuration {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, or a date or number that there is not
        raise RequestError(f"the configuration {path.name} is not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(raw, dict):
        raise RequestError(f"the configuration {path.name} holds no settings; see merge_configs/ for examples.")
    try:
        config = MergeConfiguration.model_validate(raw)
    except ValidationError as error:
        reasons = dict.fromkeys(f"{'.'.join(map(str, part['loc'])) or 'the configuration'}: {part['msg']}" for part in error.errors())
        raise RequestError(f"the configuration {path.name} is not valid: {'; '.join(list(reasons)[:5])}.") from error
    except RuntimeError as error:  # mergekit's own checks
        raise RequestError(f"the configuration {path.name} is not valid: {one_line(error)}.") from error
    known = sorted(method.spec.name for method in registered_methods())
    if config.merge_method not in known:
        raise RequestError(
            f"merge_method {config.merge_method!r} is not known; use {', '.join(map(repr, OWN_METHODS))} or one of mergekit's: {', '.join(known)}."
        )
    return raw, config


def _depth(text: str) -> int:
    """The deepest level of brackets, those inside texts included: PyYAML takes ten seconds for a thousand."""
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def one_line(error: Exception) -> str:
    """An error of mergekit's in one paragraph: some of its messages print a whole model configuration."""
    text = " ".join(re.sub(r"\{.*\}", "{…}", str(error), flags=re.DOTALL).split()).rstrip(".")
    return (text if len(text) <= 600 else f"{text[:600]} …") or type(error).__name__


def lox_problems(raw: Mapping[str, Any], config: MergeConfiguration) -> list[str]:
    """Everything in the configuration that our methods cannot do or that would have no effect, one line each."""
    problems = _unknown_keys(raw)
    wanted = roles_of(config)
    if config.base_model is None:
        return [*problems, f"base_model is missing: name the pre-trained model there, and the {' and the '.join(wanted)} model under models."]
    for where, sources, complete in _inputs(config):
        models = [source.model for source in sources]
        others = [model for model in models if model != config.base_model]
        if len(others) != len(wanted):
            named = ", ".join(str(model) for model in others) or "none"
            count = {1: "one model", 2: "two models"}[len(wanted)]
            ones = " and the ".join(f"{role} one" for role in wanted)
            problems.append(f"{where} needs exactly {count} beside base_model, the {ones}; it has {len(others)} ({named}).")
        elif len(wanted) > 1 and sorted(str(_role(source)) for source in sources if source.model != config.base_model) != sorted(wanted):
            problems.append(
                f"{where}: which model is which? Give `parameters: {{role: aligned}}` to the safety-tuned model and "
                "`parameters: {role: finetuned}` to the one that was fine-tuned from it."
            )
        if not complete and len(models) - len(others) != 1:
            problems.append(f"{where} must list base_model ({config.base_model}) once, with the same layer_range as the aligned model.")
        problems += [
            f"{where}: parameters of {source.model} have no effect, it is the base_model; move them to the aligned model or to the top."
            for source in sources
            if source.model == config.base_model and source.parameters
        ]
    problems += _slice_problems(config)
    for setting in settings(config):
        problems += _setting_problems(setting, config.merge_method)
    return problems


def settings(config: MergeConfiguration) -> Iterator[Setting]:
    """Every parameter of the configuration, wherever mergekit would look for it."""
    places: list[tuple[str, Any]] = [("parameters", config.parameters)]
    for name, module in (config.modules or {}).items():
        places.append((f"modules.{name}.parameters", module.parameters))
    for where, part in _output_slices(config):
        places.append((f"{where}.parameters", part.parameters))
    for where, sources, _ in _inputs(config):
        places += [(f"{where}: {source.model}", source.parameters) for source in sources]
    for where, parameters in places:
        for name, value in (parameters or {}).items():
            yield Setting(where, name, value)


def roles_of(config: MergeConfiguration) -> tuple[str, ...]:
    """The models that a method takes beside base_model, in the order of training."""
    return ("aligned",) if config.merge_method == METHOD else ROLES


def references(config: MergeConfiguration) -> dict[str, Any]:
    """mergekit's references to the models beside base_model, by role (after lox_problems found nothing)."""
    sources = next(sources for _, sources, _ in _inputs(config))
    others = [source for source in sources if source.model != config.base_model]
    if config.merge_method == METHOD:
        return {"aligned": others[0].model}
    found = {str(_role(source)): source.model for source in others}
    return {role: found[role] for role in ROLES}


def _role(source: Any) -> Any:
    return (source.parameters or {}).get("role")


def _output_slices(config: MergeConfiguration) -> list[tuple[str, OutputSliceDefinition]]:
    parts = [("slices", config.slices)] + [(f"modules.{name}.slices", module.slices) for name, module in (config.modules or {}).items()]
    return [(f"{where}[{i}]", part) for where, slices in parts for i, part in enumerate(slices or ())]


def _inputs(config: MergeConfiguration) -> list[tuple[str, list[Any], bool]]:
    """(place, its sources, whether mergekit adds the base model by itself) of every list of models."""
    lists = [("models", config.models)] + [(f"modules.{name}.models", module.models) for name, module in (config.modules or {}).items()]
    found = [(where, list(models), True) for where, models in lists if models]
    return found + [(where, list(part.sources), False) for where, part in _output_slices(config)]


def _slice_problems(config: MergeConfiguration) -> list[str]:
    problems = []
    following: dict[str, int] = {}
    for where, part in _output_slices(config):
        stack = where.rpartition("[")[0]
        ranges = {source.layer_range for source in part.sources}
        if len(ranges) != 1 or next(iter(ranges))[0] != following.get(stack, 0):
            problems.append(
                f"{where}: layer i is compared with layer i, so the slices must cover all layers in order, with one layer_range for all models."
            )
        following[stack] = max(stop for _, stop in ranges)
        if part.base_model not in (None, config.base_model):
            problems.append(f"{where}.base_model differs from base_model; the method takes one pre-trained model for the whole merge.")
    return problems


def _setting_problems(setting: Setting, method: str) -> list[str]:
    parameters = OWN_METHODS[method].spec.parameters
    parameter = next((parameter for parameter in parameters if parameter.name == setting.name), None)
    if parameter is None:
        known = ", ".join(parameter.name for parameter in parameters)
        return [f"{setting.where}.{setting.name} is no parameter of {method}; it has {known}."]
    problems = []
    for condition in setting.conditions():
        place = f"{setting.where}.{setting.name}" + (f" (filter {condition.filter!r})" if condition.filter else "")
        if condition.value == []:
            problems.append(f"{place} is an empty list; give a value, or several for a gradient over the layers.")
        for value in condition.value if isinstance(condition.value, list) else [condition.value]:
            try:
                parameter.validate(value)
            except RecipeError as error:
                problems.append(f"{place}: {error}")
            else:
                # Between two layers of a gradient a fraction is rounded; written by hand it is a mistake.
                if setting.name == "rank" and isinstance(value, float) and value != int(value):
                    problems.append(f"{place}: rank {value:g} is not a whole number.")
    return problems


def _unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    """Keys that mergekit would ignore without a word, such as a misspelt `parameters`."""
    problems: list[str] = []

    def check(where: str, value: Any, model: Any) -> None:
        if isinstance(value, Mapping):
            unknown = sorted(str(key) for key in value if key not in model.model_fields)
            problems.extend(f"{where}{key} is not a setting; mergekit has {', '.join(model.model_fields)} there." for key in unknown)

    def check_inputs(where: str, value: Mapping[str, Any]) -> None:
        for i, part in enumerate(value.get("models") or ()):
            check(f"{where}models[{i}].", part, InputModelDefinition)
        for i, part in enumerate(value.get("slices") or ()):
            check(f"{where}slices[{i}].", part, OutputSliceDefinition)
            for j, source in enumerate(part.get("sources") or ()):
                check(f"{where}slices[{i}].sources[{j}].", source, InputSliceDefinition)

    check("", raw, MergeConfiguration)
    check_inputs("", raw)
    for name, module in (raw.get("modules") or {}).items():
        check(f"modules.{name}.", module, OutputModuleDefinition)
        check_inputs(f"modules.{name}.", module)
    return problems
