"""Hooks that turn one backward pass over several completions into gradients per completion, layer by layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap

from lox_merge.diagnostics.curvature.experts import expert_contributions
from lox_merge.diagnostics.curvature.sites import Site, embedding_scale
from lox_merge.maths.gradients import Contribution, Lookup, Outer, Whole

# Given a parameter's name and what one call of its module adds to the gradients of some examples.
Emit = Callable[[str, Contribution], None]


@dataclass
class Batch:
    """The completions of one backward pass. owners: their numbers, ascending. mask: (b, t) bool, the tokens that are not padding."""

    owners: Tensor
    mask: Tensor
    _shared: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _owners: dict[int, Tensor] = field(default_factory=dict)
    _elsewhere: dict[torch.device, Batch] = field(default_factory=dict)

    @functools.cached_property
    def full(self) -> bool:
        """Whether no completion is padded."""
        return bool(self.mask.all())

    def on(self, device: torch.device) -> Batch:
        """The same for layers on this device: a model may be spread over several."""
        if device == self.mask.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = Batch(self.owners.to(device), self.mask.to(device))
        return self._elsewhere[device]

    def by_example(self, values: Tensor) -> Tensor | None:
        """(b, …) of a tensor that keeps examples apart, or has them joined with their tokens; None for any other."""
        if values.ndim and values.shape[0] == len(self.owners):
            return values
        if values.ndim and values.shape[0] == self.mask.numel():
            return values.reshape(*self.mask.shape, *values.shape[1:])
        return None

    def forget(self) -> None:
        """Lets inputs go: hooks in the graph hold the batch, and inputs of later layers the graph, a circle that nobody would free."""
        self._shared.clear()
        for other in self._elsewhere.values():
            other.forget()

    def inputs(self, values: Tensor) -> Tensor | None:
        """`rows`, as one tensor for one input, however many layers read it."""
        if id(values) not in self._shared:
            found = self.rows(values)
            if found is None:
                return None
            self._shared[id(values)] = (values, found)
        return self._shared[id(values)][1]

    def rows(self, values: Tensor) -> Tensor | None:
        """(r, d): the rows of real tokens; of (b, t', …) with fewer tokens the last t'. None where completions cannot be told apart."""
        parted = self.by_example(values)
        if parted is None or parted.ndim < 3 or parted.shape[1] > self.mask.shape[1]:
            return None
        if self.full:  # nothing to copy
            return parted.detach().flatten(2).flatten(0, 1)
        return parted.flatten(2)[self.mask[:, self.mask.shape[1] - parted.shape[1] :]].detach()

    def row_owners(self, tokens: int) -> Tensor:
        """(r,) whose row each is, of tensors with this many tokens."""
        if tokens not in self._owners:
            kept = self.mask[:, self.mask.shape[1] - tokens :]
            self._owners[tokens] = self.owners[:, None].expand(-1, tokens)[kept]
        return self._owners[tokens]

    def tokens_of(self, values: Tensor) -> int:
        parted = self.by_example(values)
        return 0 if parted is None else parted.shape[1]


class Capture:
    """Opens hooks on the sites of wanted parameters. `emit` is called during the backward pass of a `with capture.batch(…)`."""

    def __init__(self, model: Any, sites: Sequence[Site], wanted: Container[str], emit: Emit) -> None:
        self._sites = [site for site in sites if any(name in wanted for name in site.parameters.values())]
        self._model, self._wanted, self._emit = model, wanted, emit
        self._batch: Batch | None = None
        self._late: list[Callable[[], None]] = []
        self.not_separable: set[str] = set()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [site.module.register_forward_hook(self._hook(site), with_kwargs=True) for site in self._sites]
        root = self._model.get_input_embeddings()
        if not any(site.module is root for site in self._sites):
            handles.append(root.register_forward_hook(lambda module, inputs, output: _rooted(output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(self, batch: Batch) -> Iterator[None]:
        """Everything that a forward and a backward pass within it leave belongs to these completions."""
        self._batch = batch
        try:
            yield
            for late in self._late:
                late()
        finally:
            self._batch = None
            self._late.clear()
            batch.forget()

    def _hook(self, site: Site) -> Callable[..., Any]:
        def hook(module: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
            batch = self._batch
            if batch is None:
                return None
            arguments = (*inputs, *options.values())
            if isinstance(output, Tensor):
                output = output if output.requires_grad else _rooted(output)
                output.register_hook(lambda gradient: self._arrived(site, batch, arguments, gradient.detach()))
                return output
            if type(output) is tuple:
                return self._several_outputs(site, batch, arguments, output)
            self.not_separable.add(site.name)
            return None

        return hook

    def _arrived(self, site: Site, batch: Batch, arguments: tuple[Any, ...], gradient: Tensor) -> None:
        with self._looking_aside(), torch.enable_grad():
            found = _contributions(site, batch.on(gradient.device), arguments, gradient)
        self._pass_on(site, found)

    @contextmanager
    def _looking_aside(self) -> Iterator[None]:
        """What is computed in here calls modules again, which is no use of them by the model."""
        batch, self._batch = self._batch, None
        try:
            yield
        finally:
            self._batch = batch

    def _several_outputs(self, site: Site, batch: Batch, arguments: tuple[Any, ...], outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A router returns scores and choices: its gradient is complete when all outputs have theirs, after the backward pass.

        One output may be made of another inside the module; copies are what only the world outside reads.
        """
        gradients: dict[int, Tensor] = {}
        copies = tuple(output.clone() if isinstance(output, Tensor) and output.requires_grad else output for output in outputs)
        for place, output in enumerate(copies):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(_keep(gradients, place))  # type: ignore[no-untyped-call]

        def late() -> None:
            if gradients:
                with self._looking_aside(), torch.enable_grad():
                    found = _one_by_one(site, batch, arguments, gradients)
                self._pass_on(site, found)

        self._late.append(late)
        return copies

    def _pass_on(self, site: Site, found: dict[str, list[Contribution]] | None) -> None:
        if found is None:
            self.not_separable.add(site.name)
            return
        for leaf, contributions in found.items():
            name = site.parameters.get(leaf)
            if name is not None and name in self._wanted:
                for contribution in contributions:
                    self._emit(name, contribution)


def _rooted(output: Tensor) -> Tensor:
    """A place for the backward pass to end: no parameter asks for a gradient. The clone may be changed in place by what follows."""
    return output.detach().requires_grad_().clone()


def _keep(gradients: dict[int, Tensor], place: int) -> Callable[[Tensor], None]:
    def keep(gradient: Tensor) -> None:
        gradients[place] = gradient.detach()

    return keep


def _contributions(site: Site, batch: Batch, arguments: tuple[Any, ...], gradient: Tensor) -> dict[str, list[Contribution]] | None:
    if site.kind == "small":
        return _at_once(site, batch, arguments, gradient)
    if site.kind == "experts":
        return expert_contributions(site.module, arguments, gradient, batch)
    rows = batch.rows(gradient)
    if rows is None:
        return None
    owners = batch.row_owners(batch.tokens_of(gradient))
    found: dict[str, list[Contribution]] = {}
    if site.kind == "embedding":
        tokens = batch.rows(arguments[0].unsqueeze(-1))
        if tokens is None:
            return None
        tokens, rows = tokens.squeeze(-1), rows * (embedding_scale(site.module) or 1.0)
        if site.module.padding_idx is not None:
            kept = tokens != site.module.padding_idx  # torch gives this row no gradient
            tokens, rows, owners = tokens[kept], rows[kept], owners[kept]
        return {"weight": [Lookup(tokens, rows, owners)]}
    inputs = batch.inputs(arguments[0])
    if inputs is None or len(inputs) != len(rows):
        return None
    found["weight"] = [Outer(inputs, rows, owners, transposed=site.kind == "conv1d")]
    if site.parameters.get("bias") is not None:
        parted = batch.by_example(gradient)
        assert parted is not None
        found["bias"] = [Whole(parted.flatten(1, -2).sum(1, dtype=_sum_dtype(parted))[:, :, None], batch.owners)]
    return found


def _at_once(site: Site, batch: Batch, arguments: tuple[Any, ...], gradient: Tensor) -> dict[str, list[Contribution]] | None:
    """A norm and the like: its own vector-Jacobian product, for all examples together. Padding has a gradient of zero."""
    inputs, gradients = batch.by_example(arguments[0].detach()), batch.by_example(gradient)
    if inputs is None or gradients is None or len(arguments) > 1:
        return None
    module = site.module
    parameters = {leaf: _sum_wide(value.detach()) for leaf, value in module.named_parameters(recurse=False)}

    def of_one(row: Tensor, sensitivity: Tensor) -> Any:
        output, back = vjp(lambda weights: functional_call(module, weights, (row,)), parameters)[:2]
        return back(sensitivity.to(output.dtype))[0]

    try:
        found = vmap(of_one)(inputs, gradients)
    except RuntimeError:  # what such a module does inside may not be known to vmap
        return _one_by_one(site, batch, arguments, {0: gradient})
    return {leaf: [Whole(_as_rows(values), batch.owners)] for leaf, values in found.items()}


def _one_by_one(site: Site, batch: Batch, arguments: tuple[Any, ...], gradients: dict[int, Tensor]) -> dict[str, list[Contribution]] | None:
    batch = batch.on(arguments[0].device)
    inputs = batch.by_example(arguments[0].detach())
    parted = {place: batch.by_example(gradient) for place, gradient in gradients.items()}
    if inputs is None or any(value is None for value in parted.values()):
        return None
    leaves = [(leaf, value.detach().clone().requires_grad_()) for leaf, value in site.module.named_parameters(recurse=False)]
    found: dict[str, list[Tensor]] = {leaf: [] for leaf, _ in leaves}
    for number in range(len(batch.owners)):
        outputs = functional_call(site.module, dict(leaves), (inputs[number],))
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        chosen = [(outputs[place], value[number]) for place, value in parted.items() if value is not None]
        values = torch.autograd.grad([output for output, _ in chosen], [leaf for _, leaf in leaves], [value for _, value in chosen])
        for (leaf, _), value in zip(leaves, values, strict=True):
            found[leaf].append(value)
    return {leaf: [Whole(_as_rows(torch.stack(values)), batch.owners)] for leaf, values in found.items()}


def _as_rows(values: Tensor) -> Tensor:
    """(b, rows, columns) of (b, …); a vector has one column."""
    return values[:, :, None] if values.ndim == 2 else values.flatten(1, -2)


def _sum_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _sum_wide(values: Tensor) -> Tensor:
    return values.to(_sum_dtype(values))
