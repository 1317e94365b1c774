"""One model in memory whose weights become any point of a slice, and its own again at the end. Nothing here writes to a disk.

A point far from an aligned model may be a weakened one: it exists in memory alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lox_merge.errors import RequestError
from lox_merge.maths.landscape import euclidean_norm, gaussian_bytes, gaussian_noise, write_point
from lox_merge.safety.batches import free_memory, release_memory
from lox_merge.safety.landscape.directions import Direction, Slice
from lox_merge.safety.landscape.sources import Sources, stored_values
from lox_merge.safety.placement import Group, check_loaded, place

# What directions may take of the memory that is free; replies need the rest.
_SHARE_OF_FREE_MEMORY = 0.5
_CPU = torch.device("cpu")


class WeightMover:
    """Sets the weights of `model`, loaded from the anchor's checkpoint, to θ₁ + Σ coordinate · direction, and back.

    random: names of the tensors that random directions move. Every point is made anew from the stored tensors in float32 and
    rounded once to the model's dtype, so it does not depend on the points before it. Noise and, on a GPU, stored tensors stay
    in memory as long as they take at most a share of what is free; the rest is read or drawn again for every point, with the same
    result. Used as a context it restores the stored weights on leaving, bit for bit. Raises RequestError where the model's weights
    are not the checkpoint's, or not in memory.
    """

    def __init__(self, model: Any, sources: Sources, random: Sequence[str]) -> None:
        self.model, self._sources, self._random = model, sources, frozenset(random)
        names = set(sources.names)
        groups = [group for group in place(model, sources.anchor.names)[0] if any(name in names for name, _ in group.sources)]
        for group in groups:
            check_loaded(model, group, sources.anchor.tensor)
        self._state: dict[str, Tensor] = model.state_dict()
        self._groups = self._once(groups)
        self._homes = {name: self._state[group.target].device for group in self._groups for name, _ in group.sources}
        self._norms: dict[str | None, dict[str, float]] = {}
        self._noise: dict[tuple[int, str], Tensor] = {}
        self._noise_norms: dict[tuple[int, str], float] = {}
        self._near: dict[tuple[str, str], Tensor] = {}
        self.kept = True
        self.at: tuple[float, ...] | None = None

    def __enter__(self) -> WeightMover:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def prepare(self, where: Slice) -> None:
        """Draws and keeps what the points of a slice need, as far as memory allows (`kept`: whether all noise is)."""
        self._noise.clear()
        self._near.clear()
        self.kept = True
        for direction in where.directions:
            if direction.scaled_to not in self._norms and direction.seed is not None:
                self._norms[direction.scaled_to] = self._sources.scale_norms(self._moved_by(direction), direction.scaled_to)
        release_memory()
        room = {device: _SHARE_OF_FREE_MEMORY * free_memory(device) for device in {*self._homes.values(), _CPU}}
        self._keep_noise(where, room)
        self._keep_stored_near(where, room)

    def move(self, where: Slice, coordinates: Sequence[float]) -> None:
        """Weights become θ₁ + Σ coordinate · direction."""
        if len(coordinates) != len(where.directions):
            raise ValueError(f"{len(coordinates)} coordinates of {len(where.directions)} directions")
        self.at = tuple(coordinates)
        with torch.no_grad():
            for group in self._groups:
                if not self._is_moved(group, where):
                    continue
                if group.plain:
                    self._write(group.sources[0][0], where, coordinates, self._state[group.target])
                    continue
                target = self._state[group.target]

                def made(name: str, like: Tensor = target) -> Tensor:
                    out = torch.empty(self._sources.anchor.info(name).shape, dtype=like.dtype, device=like.device)
                    self._write(name, where, coordinates, out)
                    return out

                for name, value in group.parameters(made, self.model).items():
                    self._state[name].copy_(value)
        for device in set(self._homes.values()):
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # so that whoever measures time sees this work here, not in the replies

    def restore(self) -> None:
        """Puts the stored weights back, bit for bit, from the checkpoint's files."""
        with torch.no_grad():
            for group in self._groups:
                for name, value in group.parameters(self._sources.anchor.tensor, self.model).items():
                    self._state[name].copy_(value)
        self.at = None

    def _write(self, name: str, where: Slice, coordinates: Sequence[float], out: Tensor) -> None:
        models: dict[str, float] = {}
        noises = []
        for direction, coordinate in zip(where.directions, coordinates, strict=True):
            for label, weight in direction.models.items():
                models[label] = models.get(label, 0.0) + coordinate * weight
            if direction.seed is not None and coordinate and name in self._norms[direction.scaled_to]:
                noises.append(self._scaled(direction, name, coordinate))
        if name not in self._sources.names_set:
            models = {}
        others = [(factor, self._stored(label, name)) for label, factor in models.items() if factor]
        write_point(out, self._stored("", name), others, noises)

    def _scaled(self, direction: Direction, name: str, coordinate: float) -> tuple[float, Tensor]:
        """(s, noise) with s · noise = coordinate · d in this tensor."""
        assert direction.seed is not None
        key = direction.seed, name
        noise = self._noise.get(key)
        if noise is None:
            noise = gaussian_noise(self._sources.anchor.info(name).shape, name, direction.seed)
        if key not in self._noise_norms:
            self._noise_norms[key] = euclidean_norm(noise)
        return coordinate * self._norms[direction.scaled_to][name] / self._noise_norms[key], noise

    def _stored(self, label: str, name: str) -> Tensor:
        near = self._near.get((label, name))
        if near is not None:
            return near
        return stored_values(self._sources.weights(label), name)

    def _moved_by(self, direction: Direction) -> list[str]:
        """Tensors that a direction changes: a control moves what the difference of its models does."""
        if direction.models or direction.scaled_to is not None:
            return self._sources.names
        return [name for name in self._sources.names if name in self._random]

    def _is_moved(self, group: Group, where: Slice) -> bool:
        names = {name for direction in where.directions for name in self._moved_by(direction)}
        return any(name in names for name, _ in group.sources)

    def _once(self, groups: list[Group]) -> list[Group]:
        """Tied parameters are moved once, as the input embedding, where a checkpoint stores them under two names."""
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        weight = None if head is None else head.weight
        # Stable: all others keep their order. The head is looked at last.
        ordered = sorted(groups, key=lambda group: group.target.endswith("lm_head.weight") and weight is not None)
        found: dict[int, Group] = {}
        for group in ordered:
            tensor = self._state[group.target]
            found.setdefault(tensor.data_ptr() if tensor.numel() else id(group), group)
        return list(found.values())

    def _keep_noise(self, where: Slice, room: dict[torch.device, float]) -> None:
        chosen: dict[tuple[int, str], torch.device] = {}
        for direction in where.directions:
            for name in self._moved_by(direction) if direction.seed is not None else ():
                if name not in self._homes:
                    continue
                assert direction.seed is not None
                size = gaussian_bytes(self._sources.anchor.info(name).shape)
                # Beside the parameter, else in main memory: copied for every point, which is faster than drawn.
                device = next((place for place in (self._homes[name], _CPU) if size <= room[place]), None)
                if device is None:
                    self.kept = False
                    continue
                room[device] -= size
                chosen[direction.seed, name] = device

        def draw(key: tuple[int, str]) -> tuple[tuple[int, str], Tensor, float]:
            noise = gaussian_noise(self._sources.anchor.info(key[1]).shape, key[1], key[0])
            return key, noise.to(chosen[key]), self._noise_norms.get(key) or euclidean_norm(noise)

        # numpy draws without the interpreter's lock; each tensor has a seed of its own, so the order does not matter.
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            for key, noise, norm in pool.map(draw, chosen):
                self._noise[key], self._noise_norms[key] = noise, norm

    def _keep_stored_near(self, where: Slice, room: dict[torch.device, float]) -> None:
        """Where memory allows, stored tensors of parameters on a GPU stay on it: over the bus they would take longer than replies. On a
        processor those stay that are made (decoded, or changed by an adapter) instead of mapped from a file."""
        labels = ["", *dict.fromkeys(label for direction in where.directions for label in direction.models)]
        for label in labels:
            for name, device in self._homes.items():
                if label and name not in self._sources.names_set:
                    continue  # never added
                size = self._sources.weights(label).info(name).bytes
                if (device.type == "cuda" or self._sources.is_made(label, name)) and size <= room[device]:
                    room[device] -= size
                    self._near[label, name] = self._stored(label, name).to(device)


def check_labels(labels: Sequence[str]) -> None:
    """Raises RequestError for two models of one label."""
    for label in labels:
        if labels.count(label) > 1:
            raise RequestError(f"two models are called {label!r}, so their results could not be told apart. Name them: NAME=MODEL.")
