"""R_ft while a model is trained: how much of its way from the base model lies in the leading directions of its alignment."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lox_merge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lox_merge.checkpoint.placement import place
from lox_merge.checkpoint.quantised.view import as_quantised, quantisation_problems
from lox_merge.diagnostics.watch.changes import own_names, plain_name
from lox_merge.errors import LoxMergeWarning, PlanError, RequestError
from lox_merge.jobs.factors import Factors
from lox_merge.jobs.quantised import form_warnings
from lox_merge.jobs.select import is_vocabulary
from lox_merge.maths.gradients import wide
from lox_merge.maths.precision import full_precision_matmul
from lox_merge.maths.spectral import truncated_svd
from lox_merge.maths.subspace import Subspace
from lox_merge.maths.weight_changes import Change, DenseChange, squared_norm
from lox_merge.wording import first_few

_UNCHANGED, _NOT_FINITE = "that alignment left as they were", "with NaN or Inf in the model or in base"
_NO_TENSOR = "without a tensor of the same name in {}"


@dataclass(frozen=True)
class Retained:
    """R_ft = ‖Proj_k D‖/‖D‖ with D = Δ_align + Δ_ft. mean: over matrices, as the LoX authors average; energy: of all energies together.

    bounds: what the mean can be where the alignment's change is known by its leading triplets alone; None where it is known
    exactly. matrices: how many enter. None where D = 0.
    """

    mean: float | None
    energy: float | None
    matrices: int
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Matrix:
    """basis: U_k, (d_out, k). square: ‖Δ_align‖². held: all triplets that are known of Δ_align. rest: ‖Δ_align − held‖ where that is
    all that is known.
    """

    name: str
    stored: str
    transposed: bool
    basis: Tensor
    head: Tensor
    square: float
    held: Subspace | None
    rest: float


class RetainedAlignment:
    """Linear layers (Conv1D too) of the model at θ_0 against a base checkpoint, or against factors of the pair alone.

    Δ_align = θ_0 − W_base. base: a folder or Hub id; its files stay mapped and are read again at every measurement. factors: of
    lox-merge decompose; with a base they spare the SVD, alone they give R_ft with bounds. Embeddings and stacked experts are left out.
    A quantised base is read as what its codes stand for, with a warning. left_out: linear layers that are not compared, with the reason;
    a warning names them (an output head over another vocabulary, what is absent or not finite), but for those that alignment did not change.
    Raises RequestError where no matrix of the model can be compared, for other shapes, and for a rank that the factors do not hold; PlanError
    for a quantised base in a form that is not read.
    """

    def __init__(
        self,
        model: Any,
        start: Callable[[str], Tensor],
        *,
        base: str | Path | None,
        factors: str | Path | None,
        rank: int,
        seed: int,
        cache_dir: Path | None,
    ) -> None:
        self._start, self._rank = start, rank
        self._base: Checkpoint | None = None
        if base is not None:
            self._base = _opened(base, cache_dir)
            self._base.fetch(list(self._base.headers))
        held = None if factors is None else Factors.open(factors)
        if held is not None:
            held.require(rank)
        stored = self._base.names if self._base is not None else [name for name, part in held.matrices if not part] if held is not None else []
        pairs = list(_linear_weights(model, stored))
        self.left_out = _absent(model, stored, pairs, "base" if self._base is not None else "factors")
        if held is not None:
            self.left_out |= {plain_name(name): _NO_TENSOR.format("factors") for name, there, _ in pairs if (there, "") not in held}
            pairs = [pair for pair in pairs if (pair[1], "") in held]
        self.left_out |= _other_vocabularies(model, pairs, self._base, held)
        self._matrices: list[_Matrix] = []
        with torch.no_grad():
            for name, there, transposed in pairs:
                if plain_name(name) in self.left_out:
                    continue
                found = self._matrix(name, there, transposed, held, seed)
                if isinstance(found, _Matrix):
                    self._matrices.append(found)
                else:
                    self.left_out[plain_name(name)] = found
        told = {name: reason for name, reason in self.left_out.items() if reason != _UNCHANGED}
        if not self._matrices and not told:
            raise RequestError("none of the model's linear layers differs from what base or factors hold: give the base that it was aligned from.")
        if not self._matrices:
            raise RequestError(f"none of the model's linear layers can be compared: without {_listed(told)}. Give the base that it was aligned from.")
        if told:
            warnings.warn(f"R_ft is without {_listed(told)}", LoxMergeWarning, stacklevel=2)

    @torch.no_grad()
    def ratio(self, changes: Callable[[str], Change | None]) -> Retained:
        """changes: Δ_ft = θ_t − θ_0 by name; None for a matrix that is not trained."""
        sums: list[tuple[float, float, float]] = []
        for matrix in self._matrices:
            with full_precision_matmul(matrix.basis.device):
                sums.append(self._energies(matrix, changes(matrix.name)))
        known = [(kept, whole, slack) for kept, whole, slack in sums if whole > 0]
        if not known:
            return Retained(None, None, 0)
        ratios = [math.sqrt(min(1.0, kept / whole)) for kept, whole, _ in known]
        bounds = None
        if any(slack for _, _, slack in known):
            low = [math.sqrt(min(1.0, kept / (whole + slack))) for kept, whole, slack in known]
            high = [math.sqrt(min(1.0, kept / max(kept, whole - slack))) if kept else 0.0 for kept, whole, slack in known]
            bounds = sum(low) / len(low), sum(high) / len(high)
        energy = math.sqrt(min(1.0, sum(kept for kept, _, _ in known) / sum(whole for _, whole, _ in known)))
        return Retained(sum(ratios) / len(ratios), energy, len(ratios), bounds)

    def close(self) -> None:
        """Lets the base checkpoint's files go."""
        if self._base is not None:
            self._base.close()

    def _matrix(self, name: str, stored: str, transposed: bool, factors: Factors | None, seed: int) -> _Matrix | str:
        """Why it cannot be compared where it cannot."""
        delta = self._alignment(name, stored, transposed)
        if delta is not None and not bool(torch.isfinite(delta).all()):
            return _NOT_FINITE
        if delta is not None and not bool(delta.any()):
            return _UNCHANGED
        held = factors.subspace(stored) if factors is not None else None
        if held is not None and transposed:
            held = Subspace(held.right, held.singular_values, held.left, held.norm, held.certificate)
        if held is not None:
            leading = held.truncate(min(self._rank, held.rank))
        else:
            assert delta is not None
            leading = truncated_svd(delta.float(), min(self._rank, *delta.shape), seed=seed)
        device = self._start(name).device
        if delta is None:
            assert held is not None
            squares = float(held.singular_values.double().square().sum())
            complete = factors is not None and factors.matrices[stored, ""].complete
            rest = 0.0 if complete else math.sqrt(max(0.0, held.norm**2 - squares))
            head = (held.right[:, : leading.rank] * leading.singular_values.float()).T.clone()
            return _Matrix(name, stored, transposed, leading.left.clone(), head, held.norm**2, held, rest)
        basis = leading.left.to(device)
        return _Matrix(name, stored, transposed, basis, basis.to(delta.dtype).T @ delta, squared_norm(delta), None, 0.0)

    def _alignment(self, name: str, stored: str, transposed: bool) -> Tensor | None:
        """Δ_align of the map, (d_out, d_in) float32 or wider, where θ_0 is; None without a base."""
        if self._base is None:
            return None
        start = self._start(name)
        delta = wide(start.detach()) - wide(self._base.tensor(stored).to(start.device))
        return delta.T if transposed else delta

    def _energies(self, matrix: _Matrix, change: Change | None) -> tuple[float, float, float]:
        """‖Proj_k D‖², ‖D‖², and how far the latter may be off."""
        if change is None:
            return squared_norm(matrix.head), matrix.square, 0.0
        delta = self._alignment(matrix.name, matrix.stored, matrix.transposed) if matrix.held is None else None
        device = (change.values if isinstance(change, DenseChange) else change.left).device
        kept = squared_norm(matrix.head.to(device) + change.projected(matrix.basis.to(device)))
        if delta is not None and isinstance(change, DenseChange):
            return kept, squared_norm(delta.to(device) + change.matrix), 0.0
        if delta is not None:
            product = change.with_matrix(delta.to(device))
            return kept, matrix.square + 2 * product + change.squared_norm(), 0.0
        held = matrix.held
        assert held is not None
        product = float(change.along(held.left.to(device), held.right.to(device)) @ held.singular_values.double().cpu())
        length = change.squared_norm()
        return kept, matrix.square + 2 * product + length, 2 * matrix.rest * math.sqrt(length)


def _opened(base: str | Path, cache_dir: Path | None) -> Checkpoint:
    found = as_quantised(open_checkpoint(base, "base", cache_dir))
    if problems := quantisation_problems(found):
        raise PlanError(problems)
    for message in form_warnings([found]):
        warnings.warn(message, LoxMergeWarning, stacklevel=2)
    return found


def _absent(model: Any, stored: list[str], pairs: list[tuple[str, str, bool]], role: str) -> dict[str, str]:
    """Linear layers that none of the pairs is of, and why. Raises RequestError where there is no pair because no name is the same."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # A weight that has a second name (an output head that is the embedding) is not missed under that one.
    had = {id(parameters[name]) for name, _, _ in pairs} | {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    absent = [plain for plain, name in own_names(model).items() if id(parameters[name]) not in had and _linear_layer(model, name) is not None]
    if absent and stored and not pairs:
        last = absent[0].split(".")[::-1]
        nearest = max(stored, key=lambda name: len(list(takewhile(lambda two: two[0] == two[1], zip(last, name.split(".")[::-1], strict=False)))))
        raise RequestError(
            f"none of the model's linear layers goes by a name of {role}: the model has {absent[0]}, and {role} {nearest}. "
            "Give the base that it was aligned from, stored under the model's names."
        )
    return dict.fromkeys(absent, _NO_TENSOR.format(role))


def _other_vocabularies(model: Any, pairs: list[tuple[str, str, bool]], base: Checkpoint | None, factors: Factors | None) -> dict[str, str]:
    """Output heads with another number of rows than in base or factors, and how many. Raises RequestError for any other difference of shapes."""
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters(remove_duplicate=False)}
    other: dict[str, str] = {}
    problems = []
    for name, stored, _ in pairs:
        found = {} if base is None else {"base": tuple(base.info(stored).shape)}
        found |= {} if factors is None else {"factors": factors.matrices[stored, ""].shape}
        for role, shape in found.items():
            if shape == shapes[name]:
                continue
            difference = f"{list(shapes[name])} in the model and {list(shape)} in {role}"
            # As in a recipe: rows of another vocabulary can't be assumed to be the same tokens.
            if is_vocabulary(plain_name(name)) and shape[1:] == shapes[name][1:]:
                other[plain_name(name)] = f"over another vocabulary, {difference}"
            else:
                problems.append(f"{plain_name(name)} is {difference}")
    if problems:
        raise RequestError(f"base or factors are of another model: {first_few(problems, 3)}. Give the base that the model was aligned from.")
    return other


def _listed(left_out: dict[str, str]) -> str:
    """'2 linear layers: 1 over another vocabulary, … (lm_head.weight); 1 …', by reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return f"{len(left_out)} linear layer(s): " + "; ".join(f"{len(names)} {reason} ({first_few(names, 3)})" for reason, names in reasons.items())


def _linear_weights(model: Any, stored: list[str]) -> Iterator[tuple[str, str, bool]]:
    """(parameter's name, stored tensor's name, whether it is (d_in, d_out)) of every linear layer's weight that is stored as it is."""
    names = {plain_name(name): name for name, _ in model.named_parameters(remove_duplicate=False)}
    for group in place(_Plain(model), stored)[0]:
        name = names.get(group.target)
        if not group.plain or name is None:
            continue
        layer = _linear_layer(model, name)
        if layer is not None:
            yield name, group.sources[0][0], not isinstance(layer, torch.nn.Linear)


def _linear_layer(model: Any, name: str) -> Any:
    """The Linear or Conv1D that a parameter is the weight of; None for any other parameter."""
    from transformers.pytorch_utils import Conv1D

    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    return layer if leaf == "weight" and isinstance(layer, (torch.nn.Linear, Conv1D)) else None


class _Plain:
    """A model whose parameters go by the names that they have without adapters around them."""

    def __init__(self, model: Any) -> None:
        self._model = model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def state_dict(self) -> dict[str, Tensor]:
        return {plain_name(name): value for name, value in self._model.state_dict().items()}
