"""The checkpoints of a landscape: opened, compared by their headers, and read once for what identifies and places them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lox_merge.checkpoint.adapter import AdaptedCheckpoint
from lox_merge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lox_merge.checkpoint.quantised.view import quantisation_problems
from lox_merge.errors import NumericalError, PlanError, RequestError
from lox_merge.jobs.manifest import output_identity
from lox_merge.jobs.quantised import form_of, form_warnings
from lox_merge.maths.landscape import euclidean_norm, plane_coordinates
from lox_merge.safety.adapted import open_any
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.landscape.directions import Direction, movable, stays_by_default
from lox_merge.safety.landscape.held import HeldModel, Weights
from lox_merge.safety.loading import LoadedModel, tensors_fingerprint
from lox_merge.wording import first_few

# Entries of a tensor whose differences are in memory at a time, in float64.
_PIECE = 2**20
_MOST_NAMED = 4


@dataclass(frozen=True)
class ModelPlace:
    """A model in the plane of the directions: least-squares coordinates, distance from the plane, and its share of ‖θ - θ₁‖."""

    label: str
    coordinates: tuple[float, ...]
    distance: float
    off_plane: float | None


class Sources:
    """θ₁ (`anchor`) and the other models by label. Opening reads headers only. Raises PlanError with everything found at once."""

    def __init__(
        self,
        anchor: str | Path | LocalModel,
        others: Mapping[str, str | Path | LoadedModel],
        *,
        cache_dir: Path | None = None,
        adapter_base: str | Path | None = None,
        base_is_right: bool = False,
    ) -> None:
        self.anchor: Weights
        base = None if adapter_base is None else open_checkpoint(adapter_base, "adapter base", cache_dir)
        opening: dict[str, Any] = {"base_is_right": base_is_right, "decode": True}
        if isinstance(anchor, LocalModel):
            self.anchor = HeldModel("model", anchor.title, anchor.model, None)
        else:
            self.anchor = open_any(anchor, "model", cache_dir, adapter_base=base, **opening)
        below = base if base is not None or isinstance(self.anchor, HeldModel) else self.anchor
        self.others: dict[str, Weights] = {}
        problems = _quantised(self.anchor)
        for label, reference in others.items():
            try:
                if isinstance(reference, LoadedModel):
                    opened: Weights = HeldModel(label, reference.title, reference.model, reference.source)
                else:
                    opened = open_any(reference, label, cache_dir, adapter_base=below, **opening)
            except PlanError as error:
                problems += error.problems
                continue
            self.others[label] = opened
            problems += _quantised(opened) + _differences(self.anchor, opened)
        if problems:
            self.close()
            raise PlanError(problems)
        self.names = [name for name in self.anchor.names if movable(self.anchor, name)]
        self.names_set = frozenset(self.names)

    def close(self) -> None:
        for checkpoint in (self.anchor, *self.others.values()):
            checkpoint.close()

    def fetch(self) -> None:
        """Gets the weights of Hub models onto this machine."""
        for checkpoint in self.others.values():
            if isinstance(checkpoint, Checkpoint):
                checkpoint.fetch(list(checkpoint.headers))

    def weights(self, label: str) -> Weights:
        """Those of a model, of θ₁ where the label is empty."""
        return self.others[label] if label else self.anchor

    def is_made(self, label: str, name: str) -> bool:
        """Whether a tensor is computed when it is asked for, not mapped from its file."""
        weights = self.weights(label)
        adapted = isinstance(weights, AdaptedCheckpoint) and name in weights.changes
        return adapted or (isinstance(weights, Checkpoint) and weights.made_bytes(name) > 0)

    def warnings(self) -> list[str]:
        """What must be known of quantised models among those that are subtracted."""
        return form_warnings(one for one in (self.anchor, *self.others.values()) if isinstance(one, Checkpoint)) if self.others else []

    def identity(self) -> dict[str, dict[str, Any]]:
        """Of the other models: where from, and a fingerprint of their tensors (one pass over the files). No path of this machine."""
        return {
            label: {
                **_identity(checkpoint),
                "weights": tensors_fingerprint((name, checkpoint.tensor(name)) for name in sorted(self.names)),
            }
            for label, checkpoint in self.others.items()
        }

    def randomly_moved(self, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
        """Tensors that random directions move. include: regular expressions that replace the default choice. Raises RequestError for none."""
        chosen = [name for name in self.names if _any(include, name) or (not include and not stays_by_default(self.anchor, name))]
        chosen = [name for name in chosen if not _any(exclude, name)]
        if not chosen:
            raise RequestError(f"no tensor of {self.anchor.title} is left to move. Widen --include, or take away an --exclude.")
        return chosen

    def scale_norms(self, names: Sequence[str], label: str | None) -> dict[str, float]:
        """‖θ₁‖ of each tensor, or ‖θ_label - θ₁‖. Raises NumericalError for NaN or infinity."""
        norms = {}
        for name in names:
            stored = self.anchor.tensor(name)
            norm = euclidean_norm(stored) if label is None else euclidean_norm(self.others[label].tensor(name).to(stored.device), stored)
            if norm != norm or norm == float("inf"):
                where = self.anchor.title if label is None else f"{self.others[label].title} or {self.anchor.title}"
                raise NumericalError(f"{name} of {where} holds NaN or infinity, so no point near it can be measured. Repair the checkpoint.")
            norms[name] = norm
        return norms

    def places(self, directions: Sequence[Direction], labels: Sequence[str]) -> tuple[ModelPlace, ...]:
        """Where the models `labels` lie in the span of directions between models (float64, one pass over the files)."""
        used = list(dict.fromkeys([*(label for one in directions for label in one.models), *labels]))
        weights = torch.tensor([[one.models.get(label, 0.0) for label in used] for one in directions], dtype=torch.float64)
        gram = torch.zeros(len(used), len(used), dtype=torch.float64)
        for name in self.names:
            flat = [one.tensor(name).reshape(-1).cpu() for one in (self.anchor, *(self.others[label] for label in used))]
            for start in range(0, flat[0].numel(), _PIECE):
                stacked = torch.stack([tensor[start : start + _PIECE].double() for tensor in flat])
                differences = stacked[1:] - stacked[0]
                gram += differences @ differences.T
        if not bool(torch.isfinite(gram).all()):
            raise NumericalError("the models differ by NaN or infinity, so they have no place in a plane. Repair the checkpoints.")
        found = []
        for label in labels:
            row = used.index(label)
            place = plane_coordinates(weights @ gram @ weights.T, weights @ gram[:, row], float(gram[row, row]))
            found.append(ModelPlace(label, *place))
        return tuple(found)


def _quantised(weights: Weights) -> list[str]:
    return quantisation_problems(weights) if isinstance(weights, Checkpoint) else []


def _identity(weights: Weights) -> dict[str, Any]:
    if isinstance(weights, HeldModel):
        return weights.identity()
    return weights.source.identity() | output_identity(weights) | form_of(weights)


def _differences(anchor: Weights, other: Weights) -> list[str]:
    """Everything that keeps weights from being subtracted, a line a kind."""
    ours, theirs = ({name for name in one.names if movable(one, name)} for one in (anchor, other))
    problems = []
    for names, there, lacking in ((ours - theirs, anchor, other), (theirs - ours, other, anchor)):
        if names:
            problems.append(
                f"{lacking.role}: {lacking.title} has no {first_few(sorted(names), _MOST_NAMED)}, which {there.title} has. "
                "A point between models needs the same tensors in both."
            )
    shapes = [name for name in sorted(ours & theirs) if anchor.info(name).shape != other.info(name).shape]
    if shapes:
        first = shapes[0]
        problems.append(
            f"{other.role}: {first_few(shapes, _MOST_NAMED)} of {other.title} has another shape: {list(other.info(first).shape)}, in {anchor.title} "
            f"{list(anchor.info(first).shape)}. Give models of one architecture and vocabulary."
        )
    return problems


def _any(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def check_patterns(patterns: Sequence[str], option: str) -> None:
    """Raises RequestError for what is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RequestError(f"{option} {pattern!r} is not a regular expression: {error}.") from None


def stored_values(checkpoint: Weights, name: str) -> Tensor:
    """A checkpoint's tensor, contiguous; mapped from the file where it is."""
    return checkpoint.tensor(name).contiguous()
