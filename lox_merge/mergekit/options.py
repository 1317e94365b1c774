"""mergekit's own options: what is wrong with them is said before a model is opened."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import click
import torch
from mergekit.options import MergeOptions

from lox_merge.errors import RequestError
from lox_merge.mergekit.config import one_line


class Refusing(click.ParamType):  # type: ignore[type-arg] # older versions of click have no arguments there
    """A type of mergekit's, whose ValueError for a value that it cannot read would end the command in a traceback."""

    def __init__(self, own: Any) -> None:
        self.own, self.name = own, own.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.own.convert(value, param, ctx)
        except (ValueError, TypeError) as error:
            self.fail(f"{value!r} cannot be read: {one_line(error)}. Sizes of shards are numbers of parameters, such as 5B or 500M.", param, ctx)


def refusing(parameter: click.Parameter) -> click.Parameter:
    """A parameter of mergekit's command that refuses what it cannot read; mergekit's own stays as it is."""
    if type(parameter.type).__module__.startswith("click."):
        return parameter
    changed = copy.copy(parameter)
    changed.type = Refusing(parameter.type)
    return changed


def usable_options(values: Mapping[str, Any], *, put_into_effect: bool) -> MergeOptions:
    """mergekit's options. put_into_effect: those of the process, too (threads, seed); mergekit's own command does that itself.

    Raises RequestError for a device that is not there and for numbers that cannot be used.
    """
    try:
        options = MergeOptions(**{name: value for name, value in values.items() if name in MergeOptions.model_fields})
        if put_into_effect:
            options.apply_global_options()
    except (RuntimeError, ValueError, OverflowError) as error:
        raise RequestError(f"mergekit cannot use its options: {one_line(error)}. Leave that one out, or see --mergekit-help.") from error
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # no such device, or torch was built without it
        raise RequestError(f"device {options.device} is not there ({one_line(error)}). Use --device cpu, or leave it out.") from error
    return options
