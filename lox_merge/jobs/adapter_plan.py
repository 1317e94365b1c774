"""Which pairs of LoRA factors an edit becomes: module names as the loaded model has them, and what PEFT has no place for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.adapter import AdaptedCheckpoint
from lox_merge.checkpoint.adapter_names import INNER, PREFIX
from lox_merge.checkpoint.modules import ModelMap, Place, map_model
from lox_merge.errors import PlanError, RequestError
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.plan import Plan
from lox_merge.jobs.quantised import usual_form_error
from lox_merge.jobs.select import TensorPlan

DEFAULT_DTYPE = "float32"
_TIED = (
    "token embedding and output head are one tensor: PEFT adapts only one of them while the adapter is loaded, or both (ensure_weight_tying) "
    "and then adds the update twice when it is merged"
)
_NO_LAYER = "it belongs to no layer or parameter that PEFT adapts"
_BARE_KERNEL = "PEFT takes a parameter of more than two dimensions for a stack of matrices, and this one is one matrix"
_NESTED = (
    "PEFT merges nothing inside a module whose own parameters it adapts, and wraps no parameter there; of what is inside and those parameters, "
    "what has fewer entries stays as it is"
)
_EXPERT_LAYERS = {"gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj"}
_CONVERTED = "transformers makes its parameter of several tensors in a way that has no LoRA form here"


@dataclass(frozen=True)
class Source:
    """One matrix of the aligned checkpoint inside a parameter: rows and columns of the parameter's matrix (of one expert)."""

    tensor: TensorPlan
    view: MatrixView
    expert: int
    rows: slice
    columns: slice

    @property
    def key(self) -> tuple[str, str]:
        return self.tensor.name, self.view.label


@dataclass(frozen=True)
class Pair:
    """A parameter that gets factors A and B. shape: (rows, columns) of its matrix, as stored, or of each of `experts` (0: not a stack).

    kernel: the trailing sides of a convolution. depth: how many wrappers PEFT puts around this one.
    """

    place: Place
    shape: tuple[int, int]
    experts: int
    sources: tuple[Source, ...]
    kernel: tuple[int, ...] = ()
    depth: int = 0

    @property
    def target(self) -> str:
        """What adapter_config.json calls it: a module, or a parameter that is targeted by itself."""
        return self.place.parameter if self.place.kind == "parameter" else self.place.module

    @property
    def transposed(self) -> bool:
        """Whether the stored matrix is (B·A)ᵀ."""
        return self.place.transposed or self.place.kind == "embedding"

    @property
    def names(self) -> tuple[str, str]:
        """Of A and of B in the adapter file, as PEFT writes them."""
        start = PREFIX + self.place.module + INNER * self.depth
        if self.place.kind == "embedding":
            return f"{start}.lora_embedding_A", f"{start}.lora_embedding_B"
        return f"{start}.lora_A.weight", f"{start}.lora_B.weight"

    @property
    def entries(self) -> int:
        """Of the parameter."""
        return self.shape[0] * self.shape[1] * max(1, self.experts)

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of A and of B at this rank (of each expert)."""
        rows, columns = self.shape
        outside, inside = (columns, rows) if self.transposed else (rows, columns)
        stacked = rank * max(1, self.experts)
        if self.kernel:
            inside_channels = inside
            for side in self.kernel:
                inside_channels //= side
            return (stacked, inside_channels, *self.kernel), (outside, stacked, *(1 for _ in self.kernel))
        return (stacked, inside), (outside, stacked)

    def rank(self, ranks: Mapping[tuple[str, str], int]) -> int:
        """The rank that the pair needs for these ranks of its matrices: joined parts of one expert add, experts share the largest."""
        by_expert: dict[int, int] = {}
        for source in self.sources:
            by_expert[source.expert] = by_expert.get(source.expert, 0) + ranks.get(source.key, 0)
        return max(by_expert.values(), default=0)


@dataclass
class AdapterPlan:
    """plan: the hardening whose update is shipped. left_out: reason by tensor. Nothing has been written."""

    plan: Plan
    pairs: list[Pair]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return self.plan.recipe.dtype or DEFAULT_DTYPE

    @property
    def largest_bytes(self) -> int | None:
        """Bytes of all factors, at most: deltas may have fewer directions than are asked for. None where spectra decide the ranks."""
        known = {source.key: _rank_from_shape(source) for pair in self.pairs for source in pair.sources}
        ranks = {key: rank for key, rank in known.items() if rank is not None}
        return self.bytes(ranks) if len(ranks) == len(known) else None

    def bytes(self, ranks: Mapping[tuple[str, str], int]) -> int:
        count = 0
        for pair in self.pairs:
            rank = pair.rank(ranks) * max(1, pair.experts)
            count += rank * sum(pair.shape)
        return count * dtypes.bits(dtypes.OUTPUT_CODES[self.dtype]) // 8

    def config(self, ranks: Mapping[tuple[str, str], int]) -> dict[str, Any]:
        """adapter_config.json by peft's own LoraConfig: every scale is 1, so that the factors alone are the update."""
        return lora_config(self.plan.aligned.config, _named(self.plan.aligned.source.identity()), [(pair, pair.rank(ranks)) for pair in self.pairs])


def plan_adapter(plan: Plan, *, asked: bool = True) -> AdapterPlan:
    """Raises RequestError where a recipe or a model has no adapter form, PlanError where PEFT would not load what was planned.

    asked: whether this form was asked for; else it is the usual one of a quantised model, and messages name the other ones.
    """
    _check_has_form(plan, asked)
    model = _map(plan, asked)
    pairs, left_out = _pairs(plan, model)
    made = AdapterPlan(plan, pairs, left_out)
    if not pairs:
        raise PlanError([f"no edited tensor has an adapter form: {name}: {reason}." for name, reason in list(left_out.items())[:4]])
    from lox_merge.jobs.adapter_check import check_loads

    ranks = {source.key: 1 for pair in pairs for source in pair.sources}
    try:
        check_loads(made, ranks)
    except PlanError:
        renamed = replace(made, pairs=[_by_parameter(pair) if _looks_like_expert(pair, pairs) else pair for pair in pairs])
        if renamed.pairs == made.pairs:
            raise
        check_loads(renamed, ranks)
        return renamed
    return made


def _check_has_form(plan: Plan, asked: bool) -> None:
    recipe, aligned = plan.recipe, plan.aligned
    if isinstance(aligned, AdaptedCheckpoint):
        if not asked:
            raise RequestError(
                f"ALIGNED ({aligned.title}) is itself an adapter, over quantised weights: neither can an adapter of the edit stand on it, nor is "
                "there a quantised form to write it in. Pass --dtype bfloat16, which writes a plain model, or merge ALIGNED first."
            )
        raise RequestError(
            f"ALIGNED ({aligned.title}) is itself an adapter; an adapter cannot stand on one. Harden to a whole model (without --as-adapter), "
            "or merge ALIGNED first."
        )
    if recipe.rounding != "nearest":
        problem = f"--rounding {recipe.rounding} is about weights that are written anew; an adapter keeps the edit beside them."
        raise RequestError(f"{problem} Leave it out.") if asked else usual_form_error(aligned, problem, "Leave it out")
    if any(tensor.rank is not None and tensor.rank.kind == "full" for tensor in plan.edited):
        problem = "rank full is no low-rank update: an adapter of it would be larger than the model."
        if asked:
            raise RequestError(f"{problem} Give a rank, or leave out --as-adapter.")
        raise usual_form_error(aligned, problem, "Give a rank")
    try:
        import peft  # noqa: F401
    except ImportError:
        if asked:
            raise RequestError("--as-adapter needs the package peft: pip install 'lox-merge[adapter]'.") from None
        raise usual_form_error(aligned, "That needs the package peft.", "Install it (pip install 'lox-merge[adapter]')") from None


def _map(plan: Plan, asked: bool) -> ModelMap:
    """The names of the model's modules."""
    aligned = plan.aligned
    if "config.json" not in aligned.source.names():
        problem = f"{aligned.title} has no config.json, so the names of its modules are not known."
        if asked:
            raise RequestError(f"{problem} Restore it, or leave out --as-adapter.")
        raise usual_form_error(aligned, problem, "Restore it")
    model = map_model(aligned)
    if model is None:
        problem = f"{aligned.title} is of an architecture that transformers does not build by itself, so the names of its modules are not known."
        raise RequestError(f"{problem} Leave out --as-adapter.") if asked else usual_form_error(aligned, problem)
    return model


def _looks_like_expert(pair: Pair, pairs: list[Pair]) -> bool:
    """A linear layer beside stacked experts, called as experts were before they were stacked.

    For some of these models PEFT takes such a name in target_modules for the experts' own (peft.utils.transformers_weight_conversion).
    """
    beside_experts = any(other.experts for other in pairs)
    return beside_experts and pair.place.kind == "linear" and pair.place.module.rpartition(".")[2] in _EXPERT_LAYERS


def _by_parameter(pair: Pair) -> Pair:
    """The same layer through its weight as a parameter: same factors, same names in the file."""
    return replace(pair, place=replace(pair.place, kind="parameter"))


def _pairs(plan: Plan, model: ModelMap) -> tuple[list[Pair], dict[str, str]]:
    """In the order of the checkpoint, wrappers of one module from the inside out."""
    left_out: dict[str, str] = {}
    found: dict[str, Pair] = {}
    for tensor in plan.edited:
        place = model.places.get(tensor.name)
        reason = _CONVERTED if place is None else _no_form(tensor, place, model)
        if place is None or reason:
            left_out[tensor.name] = reason
            continue
        new = _pair(tensor, place, model, plan)
        old = found.get(place.parameter)
        found[place.parameter] = new if old is None else replace(old, sources=old.sources + new.sources)
    left_out |= _take_nested(found)
    wrapped: dict[str, list[str]] = {}
    for parameter, pair in found.items():
        if pair.place.kind == "parameter":
            wrapped.setdefault(pair.place.module, []).append(parameter)
    for module, parameters in wrapped.items():
        parameters.sort(key=lambda name: model.order[module].index(found[name].place.leaf))
        for position, parameter in enumerate(parameters):
            found[parameter] = replace(found[parameter], depth=len(parameters) - 1 - position)
    return list(found.values()), left_out


def _no_form(tensor: TensorPlan, place: Place, model: ModelMap) -> str:
    """Why PEFT has no place for a tensor whose parameter is known; '' where it has."""
    if place.parameter in model.tied.values():
        return _TIED
    if place.kind == "other" or (place.kind == "parameter" and place.leaf not in model.order[place.module]):  # a buffer
        return _NO_LAYER
    flattened = len(tensor.info.shape) > 2 and any(view.expert is None for view in tensor.views)
    return _BARE_KERNEL if place.kind == "parameter" and flattened else ""


def _take_nested(found: dict[str, Pair]) -> dict[str, str]:
    """Takes pairs away until none lies inside a module whose own parameters are targeted. Returns the reason by tensor."""
    left_out: dict[str, str] = {}
    outers = list(dict.fromkeys(pair.place.module for pair in found.values() if pair.place.kind == "parameter"))
    for outer in sorted(outers, key=len, reverse=True):  # from the inside out
        own = [name for name, pair in found.items() if pair.place.module == outer and pair.place.kind == "parameter"]
        inside = [name for name, pair in found.items() if pair.place.module.startswith(f"{outer}.")]
        if own and inside:
            gone = own if sum(found[name].entries for name in own) <= sum(found[name].entries for name in inside) else inside
            for name in gone:
                left_out |= {source.tensor.name: _NESTED for source in found.pop(name).sources}
    return left_out


def _pair(tensor: TensorPlan, place: Place, model: ModelMap, plan: Plan) -> Pair:
    shape = tensor.info.shape
    if place.expert is not None:
        together = model.stored[place.parameter].values()
        rows = shape[0] * (place.part[1] if place.part else 1)
        start = shape[0] * place.part[0] if place.part else 0
        source = Source(tensor, tensor.views[0], place.expert, slice(start, start + shape[0]), slice(0, shape[1]))
        return Pair(place, (rows, shape[1]), 1 + max(each.expert or 0 for each in together), (source,))
    if place.kind == "parameter" and (len(shape) == 3 or len(tensor.views) > 1):
        everything = slice(0, shape[-2]), slice(0, shape[-1])
        sources = []
        for view in tensor.views:
            part = slice(*view.part) if view.part is not None else None
            rows_of, columns_of = (part or everything[0], everything[1]) if view.axis != 1 else (everything[0], part or everything[1])
            sources.append(Source(tensor, view, view.expert or 0, rows_of, columns_of))
        return Pair(place, (shape[-2], shape[-1]), shape[0] if len(shape) == 3 else 0, tuple(sources))
    view = tensor.views[0]
    source = Source(tensor, view, 0, slice(0, view.shape[0]), slice(0, view.shape[1]))
    return Pair(place, view.shape, 0, (source,), kernel=shape[2:] if place.kind == "convolution" else ())


def _rank_from_shape(source: Source) -> int | None:
    assert source.tensor.rank is not None
    return source.tensor.rank.from_shape(min(source.view.shape))


def _named(identity: Mapping[str, Any]) -> tuple[str, str | None]:
    """How the adapter names the model below it: a Hub id with its commit, or a folder's own name, never a path."""
    return str(identity["name"]), identity.get("commit")


def lora_config(model_config: Mapping[str, Any], base: tuple[str, str | None], ranks: Iterable[tuple[Pair, int]]) -> dict[str, Any]:
    """Plain values, in the form in which peft saves them. Modules of rank 0 are not targeted."""
    from peft import LoraConfig

    pairs = [(pair, rank) for pair, rank in ranks if rank]
    largest = max(rank for _, rank in pairs)
    # rank_pattern is a regular expression that PEFT matches at the end of the module's name.
    others = {re.escape(pair.target): rank for pair, rank in pairs if rank != largest}
    parameters = [pair.target for pair, _ in pairs if pair.place.kind == "parameter"]
    architectures = model_config.get("architectures") or [""]
    config = LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=dict(others),
        alpha_pattern=dict(others),
        target_modules=[pair.target for pair, _ in pairs if pair.place.kind != "parameter"],
        target_parameters=parameters or None,
        fan_in_fan_out=any(pair.place.kind == "conv1d" for pair, _ in pairs),
        task_type="CAUSAL_LM" if architectures[0].endswith("ForCausalLM") else None,
        base_model_name_or_path=base[0],
        revision=base[1],
        inference_mode=True,
    )
    values = {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in config.to_dict().items()}
    return {key: getattr(value, "value", value) for key, value in sorted(values.items())}
