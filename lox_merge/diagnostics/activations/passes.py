"""Two visits: base and aligned for the directions, then every model for the projections. States are added up as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lox_merge.diagnostics.activations.direction import Direction, Projected, Sums, folds_of
from lox_merge.diagnostics.activations.overlaps import SetStates, overlaps
from lox_merge.diagnostics.activations.reading import Reading
from lox_merge.diagnostics.activations.residuals import example_vector
from lox_merge.diagnostics.activations.results import SetOverlap
from lox_merge.safety.hidden_states import hidden_states
from lox_merge.safety.loading import LoadedModel
from lox_merge.safety.log_probabilities import ROWS
from lox_merge.safety.model_labels import ALIGNED, BASE
from lox_merge.safety.model_set import ModelSet
from lox_merge.safety.progress import CountProgress, ProgressFactory


@dataclass
class Found:
    """directions and residuals (texts, width) of each domain; projections by domain and model; overlaps of prompt sets; dtypes of the models."""

    directions: list[Direction] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)
    projections: list[dict[str, Projected]] = field(default_factory=list)
    overlaps: list[SetOverlap] = field(default_factory=list)
    dtypes: dict[str, str] = field(default_factory=dict)


class Passes:
    """One run over all models. layers: whose states are looked at. depth: the last layer, whose states make the residuals."""

    def __init__(
        self,
        reading: Reading,
        names: Sequence[str],
        layers: Sequence[int],
        depth: int,
        width: int,
        *,
        etas: Sequence[float],
        vector: str,
        seed: int,
        batch_size: int | None,
    ) -> None:
        self._reading, self._names, self._layers, self._depth, self._width = reading, names, list(layers), depth, width
        self._etas, self._vector, self._seed, self._batch_size = etas, vector, seed, batch_size or ROWS
        self._folds = [folds_of(len(texts), seed) for texts in reading.domains]

    def run(self, models: ModelSet, progress: ProgressFactory) -> Found:
        """Raises NumericalError for states that are not finite."""
        found = Found()
        responses, prompts = sum(map(len, self._reading.domains)), sum(map(len, self._reading.prompts))
        with progress((2 + len(models.labels)) * responses + len(models.labels) * prompts, "reading") as bar:
            if responses:
                sums = {label: self._first_visit(models.get(label), bar) for label in (BASE, ALIGNED)}
                for domain, (base, aligned) in enumerate(zip(sums.pop(BASE), sums.pop(ALIGNED), strict=True)):
                    lengths = [len(positions) for positions in self._reading.positions(domain)]
                    found.directions.append(Direction(base[0], aligned[0], lengths, self._folds[domain]))
                    found.residuals.append(aligned[1] - base[1])
                    found.projections.append({})
            # aligned first: where models do not fit together it is the one that is in memory.
            for label in sorted(models.labels, key=lambda label: label != ALIGNED):
                loaded = models.get(label)
                found.dtypes[label] = str(loaded.model.dtype).removeprefix("torch.")
                for domain, direction in enumerate(found.directions):
                    found.projections[domain][label] = self._projected(loaded, domain, direction, bar)
                found.overlaps += self._overlaps(label, loaded, bar)
                del loaded
        order = {label: place for place, label in enumerate(models.labels)}
        found.dtypes = {label: found.dtypes[label] for label in order}
        found.overlaps.sort(key=lambda overlap: order[overlap.model])
        return found

    def _first_visit(self, loaded: LoadedModel, bar: CountProgress) -> list[tuple[Sums, Tensor]]:
        """Of each domain: sums by fold, and one vector of the last layer a text: an SVD needs the rows, a sum will not do."""
        visited = []
        for domain, folds in enumerate(self._folds):
            positions = self._reading.positions(domain)
            sums = Sums(max(folds) + 1, len(self._layers), max(map(len, positions)), self._width)
            rows = torch.empty(len(positions), self._width)
            layers = [*self._layers, self._depth]
            for number, states in hidden_states(loaded.model, self._reading.rows(domain), positions, layers, batch_size=self._batch_size):
                sums.add(folds[number], states[:-1])
                rows[number] = example_vector(states[-1], self._vector)
                bar.advance(1)
            visited.append((sums, rows))
        return visited

    def _projected(self, loaded: LoadedModel, domain: int, direction: Direction, bar: CountProgress) -> Projected:
        rows, positions = self._reading.rows(domain), self._reading.positions(domain)
        projected = Projected(direction, len(rows))
        for number, states in hidden_states(loaded.model, rows, positions, self._layers, batch_size=self._batch_size):
            projected.add(number, states)
            bar.advance(1)
        return projected

    def _overlaps(self, label: str, loaded: LoadedModel, bar: CountProgress) -> list[SetOverlap]:
        sets = []
        for rows in self._reading.prompts:
            states = SetStates(len(rows), self._layers, self._width, self._seed)
            for number, values in hidden_states(loaded.model, rows, [[len(row) - 1] for row in rows], self._layers, batch_size=self._batch_size):
                states.add(number, values[:, 0])
                bar.advance(1)
            sets.append(states)
        return overlaps(label, self._names, sets, self._layers, self._etas) if sets else []
