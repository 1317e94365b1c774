"""Whether PEFT loads an adapter as planned: its own loading, on a model without weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lox_merge.checkpoint.modules import empty_model
from lox_merge.errors import PlanError

if TYPE_CHECKING:
    from lox_merge.jobs.adapter_plan import AdapterPlan


def check_loads(made: AdapterPlan, ranks: Mapping[tuple[str, str], int]) -> None:
    """Raises PlanError with the names that PEFT would miss, or not know what to do with; no weights are made."""
    from peft import LoraConfig, get_peft_model
    from peft.utils import set_peft_model_state_dict

    model = empty_model(made.plan.aligned.config)
    shapes = {name: shape for pair in made.pairs for name, shape in zip(pair.names, pair.shapes(pair.rank(ranks)), strict=True)}
    try:
        with warnings.catch_warnings():
            # On what it does to both kinds of GPT-2 layers; what counts is compared below.
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, LoraConfig(**made.config(ranks)), low_cpu_mem_usage=True)
            state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            result = set_peft_model_state_dict(adapted, state, low_cpu_mem_usage=True)
    except Exception as error:  # of many kinds, in the middle of somebody else's program
        raise PlanError([f"PEFT cannot load an adapter of these modules: {str(error).splitlines()[0]} {_NEXT}"]) from error
    missing = [name for name in result.missing_keys if ".lora_" in name]
    problems = [f"PEFT would not find {name} in the adapter. {_NEXT}" for name in missing[:4]]
    problems += [f"PEFT would have no place for {name} of the adapter. {_NEXT}" for name in result.unexpected_keys[:4]]
    if problems:
        raise PlanError(problems)


_NEXT = "Leave that module out with --exclude, or write a whole model (without --as-adapter)."
