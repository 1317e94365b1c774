"""A landscape from beginning to end: models opened and compared, one loaded, every point made in memory and measured.

Peng et al. 2024 (arXiv 2405.17374) for random directions; LoX (arXiv 2506.15606) for the plane between models. Nothing here has a
way to write weights: points may be weakened models.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lox_merge.errors import LoxMergeError, LoxMergeWarning, RequestError
from lox_merge.safety.asr import check_judges
from lox_merge.safety.cache import VerdictCache
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.landscape.directions import Axis, Slice, model_slices, random_slices
from lox_merge.safety.landscape.measure import NOT_JUDGED, ModelUtility, measure_point
from lox_merge.safety.landscape.mover import WeightMover, check_labels
from lox_merge.safety.landscape.notes import notes_of
from lox_merge.safety.landscape.results import Landscape, PointResult, SliceResult
from lox_merge.safety.landscape.sources import Sources, check_patterns
from lox_merge.safety.landscape.store import ANCHOR, Key, PointStore
from lox_merge.safety.line_store import digest
from lox_merge.safety.loading import LoadedModel
from lox_merge.safety.progress import ProgressFactory, no_progress
from lox_merge.safety.seeds import check_seed
from lox_merge.safety.types import Judge, PromptSet

# The authors': 0.5 of every tensor's norm to both sides in 20 steps. Between models: half the way beyond both.
RANDOM_RANGE, MODEL_RANGE = (-0.5, 0.5), (-0.5, 1.5)
LINE_STEPS, PLANE_STEPS = 20, 8
RANDOM_DIRECTIONS = 3


def landscape(
    model: str | Path | LocalModel,
    prompts: PromptSet,
    judges: Sequence[Judge],
    *,
    others: Mapping[str, str | Path | LoadedModel] | None = None,
    marks: Mapping[str, str | Path | LoadedModel] | None = None,
    plane: bool | None = None,
    random: int | None = None,
    extent: tuple[float, float] | None = None,
    second_extent: tuple[float, float] | None = None,
    steps: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    loading: Mapping[str, Any] | None = None,
    utility: ModelUtility | None = None,
    cache: VerdictCache | None = None,
    points: Path | None = None,
    device: str = "auto",
    cache_dir: Path | None = None,
    adapter_base: str | Path | None = None,
    base_is_right: bool = False,
    progress: ProgressFactory | None = None,
) -> Landscape:
    """ASR and utility at θ₁ + a d₁ (+ b d₂), θ₁ being `model`: a folder, a Hub id, or a model in memory with its own decoding.

    others: models by label, in order. None: `random` lines (3), or planes where `plane` is set, along Gaussian directions scaled in
    every tensor to its norm, norms and biases excluded (include, exclude: regular expressions of tensor names). One: the line to it,
    beside `random` (0) control lines with the norm of that difference in every tensor; with `plane`, its plane with a random
    direction. Two or three: the plane d₁ = θ₂ - θ₁ and d₂ = θ₃ - θ₁ or (θ₃ + θ₄)/2 - θ₁. marks: further models, only placed in it.
    extent, second_extent: lowest and highest coordinate of each axis, by default -0.5 to 0.5 for random directions and -0.5 to 1.5
    between models; steps: equal parts of it, 20 (8 for planes).
    loading: settings of LocalModel.load (dtype, decoding, rendering, batch_size, …). utility: measured at every point; its first call
    finds θ₁ (the reference of a KL divergence). points: a JSONL file from which the same request goes on. adapter_base: what PEFT
    adapters among the models lie over (None: `model`); base_is_right: although they name another model.
    The stored weights are back in memory, bit for bit, at the end; no weights are written. Raises PlanError and RequestError before
    the model is loaded wherever headers can tell, LoxMergeError where θ₁ itself cannot be measured.
    """
    named, marked = dict(others or {}), dict(marks or {})
    check_judges(judges)
    seed = check_seed(seed)
    if not len(prompts):
        raise RequestError(f"{prompts.source} holds no prompts, so there is no attack to measure. Name a file with at least one prompt.")
    check_labels([*named, *marked])
    check_patterns(include, "include")
    check_patterns(exclude, "exclude")
    if isinstance(model, LocalModel) and loading:
        raise RequestError("a model in memory has its own decoding, rendering and batch size; leave out the settings of loading.")
    slices = make_slices(tuple(named), plane=plane, random=random, extent=extent, second_extent=second_extent, steps=steps, seed=seed)
    if marked and not named:
        raise RequestError("marks are placed in the span of directions between models, and there are none. Name another model, or leave them out.")
    where: dict[str, Any] = {"device": device, "cache_dir": cache_dir, "decode": True}
    adapters: dict[str, Any] = {"adapter_base": adapter_base, "base_is_right": base_is_right}
    sources = Sources(model, named | marked, cache_dir=cache_dir, **adapters)
    try:
        for text in sources.warnings():
            warnings.warn(text, LoxMergeWarning, stacklevel=2)
        moved = sources.randomly_moved(include, exclude)
        sources.fetch()
        _check_template(sources, loading or {})
        models = sources.identity()
        found = [sources.places(one.directions, [*named, *marked]) if _between_models(one) else () for one in slices]
        source = model if isinstance(model, LocalModel) else LocalModel.load(model, **where, **adapters, **(loading or {}))
        with WeightMover(source.model, sources, moved) as mover:
            identity = source.identity()
            about = {
                "model": identity,
                "models": {label: one for label, one in models.items() if label in named},
                "prompts": prompts.sha256,
                "judges": {judge.name: judge.identity() for judge in judges},
                "utility": utility_identity(utility),
                "random": digest(moved),
            }
            store = PointStore(points, about) if points is not None else None
            with store or nullcontext():
                work = _Work(source, mover, prompts, judges, utility, cache, store)
                anchor, results, resumed = work.measure(slices, progress or no_progress)
        count = sum(len(one.places) for one in slices)
        return Landscape(
            model=identity,
            title=source.title,
            models={label: {"title": sources.others[label].title, **one} for label, one in models.items()},
            prompts={"source": prompts.source, "sha256": prompts.sha256, "n": len(prompts)},
            judges={judge.name: judge.identity() for judge in judges},
            seed=seed,
            moved={"tensors": len(moved), "stay": len(sources.anchor.names) - len(moved), "include": list(include), "exclude": list(exclude)},
            anchor=anchor,
            slices=tuple(SliceResult(one, points, place) for one, points, place in zip(slices, results, found, strict=True)),
            notes=notes_of(slices, results, len(prompts), count=count, kept=mover.kept),
            resumed=resumed,
        )
    finally:
        sources.close()


def make_slices(
    labels: Sequence[str],
    *,
    plane: bool | None = None,
    random: int | None = None,
    extent: tuple[float, float] | None = None,
    second_extent: tuple[float, float] | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> list[Slice]:
    """The lines and planes of a request. Raises RequestError for one that makes no sense."""
    if len(labels) > 3:
        raise RequestError(f"{len(labels) + 1} models span more than a plane. Give up to four, and mark the others.")
    flat = bool(plane) or len(labels) > 1
    if len(labels) > 1 and plane is False:
        raise RequestError(f"{len(labels) + 1} models span a plane, not a line. Give two models for a line.")
    if random is not None and random < (0 if labels else 1):
        raise RequestError(f"{random} random directions: give 1 or more.")
    if random is not None and labels and flat:
        raise RequestError("random controls are lines beside the line between two models; a plane has none. Leave them out, or give two models.")
    if second_extent is not None and not flat:
        raise RequestError("a second range is for planes, and this is a line. Leave it out, or ask for a plane.")
    many = steps if steps is not None else PLANE_STEPS if flat else LINE_STEPS
    first = Axis(*(extent or (MODEL_RANGE if labels else RANDOM_RANGE)), many)
    second = None
    if flat:
        second = Axis(*(second_extent or (extent if len(labels) != 1 and extent else MODEL_RANGE if len(labels) > 1 else RANDOM_RANGE)), many)
    if labels:
        return model_slices(labels, first, second, controls=random or 0, seed=seed)
    return random_slices(random if random is not None else (1 if flat else RANDOM_DIRECTIONS), first, second, seed)


def utility_identity(utility: ModelUtility | None) -> Any:
    """What decides a utility's figures, as far as it says so itself; its name for a function."""
    if utility is None:
        return None
    known = getattr(utility, "identity", None)
    return known() if callable(known) else getattr(utility, "__qualname__", type(utility).__qualname__)


def _between_models(one: Slice) -> bool:
    return all(direction.models for direction in one.directions)


def _check_template(sources: Sources, loading: Mapping[str, Any]) -> None:
    """Raises RequestError where prompts could not be rendered, before the model is loaded."""
    rendering = loading.get("rendering")
    bare = rendering is not None and rendering.chat_template is False
    if not bare and loading.get("tokenizer") is None and not sources.anchor.has_chat_template:
        raise RequestError(
            f"{sources.anchor.title} has no chat template, as is usual for base models. Name the aligned model first, or give the bare prompts "
            "(--no-chat-template)."
        )


class _Work:
    """Measures the points of all slices that a store does not hold yet; θ₁ once for all of them."""

    def __init__(
        self,
        source: LocalModel,
        mover: WeightMover,
        prompts: PromptSet,
        judges: Sequence[Judge],
        utility: ModelUtility | None,
        cache: VerdictCache | None,
        store: PointStore | None,
    ) -> None:
        self._source, self._mover, self._store = source, mover, store
        self._asked = prompts, judges
        self._utility, self._cache = utility, cache

    def measure(self, slices: Sequence[Slice], progress: ProgressFactory) -> tuple[PointResult, list[tuple[PointResult, ...]], int]:
        held = {_key(one, at): self._held(_key(one, at)) for one in slices for at in one.places if any(at)}
        known = {key: point for key, point in held.items() if point is not None}
        total = sum(len(one.places) for one in slices)
        with progress(total, f"{self._source.title}: points") as bar:
            kept = self._held(ANCHOR)
            anchor = self._measure(ANCHOR, 0.0) if kept is None else kept
            if anchor.undefined:  # also one from a file: nothing around it means anything
                raise LoxMergeError(
                    f"{self._source.title} itself cannot be measured: {anchor.undefined}. Check the model, the prompts and the judge."
                )
            if kept is not None and self._utility is not None and len(known) < len(held):
                self._utility(self._source)  # its first call has to find these weights
            results = []
            for one in slices:
                points = []
                prepared = False
                for at in one.places:
                    point = anchor if not any(at) else known.get(_key(one, at))
                    if point is None:
                        if not prepared:
                            self._mover.prepare(one)
                            prepared = True
                        started = time.perf_counter()
                        self._mover.move(one, at)
                        point = self._measure(_key(one, at), time.perf_counter() - started)
                    points.append(point)
                    bar.advance(1)
                results.append(tuple(points))
        return anchor, results, len(known) + (kept is not None)

    def _held(self, key: Key) -> PointResult | None:
        found = None if self._store is None else self._store.get(key)
        return None if found is None or found.undefined == NOT_JUDGED else found  # files of earlier versions hold such points

    def _measure(self, key: Key, seconds: float) -> PointResult:
        point, _ = measure_point(self._source, *self._asked, self._utility, cache=self._cache, change_seconds=seconds)
        # A judge that is down today may decide tomorrow; what the weights do stays as it is.
        if self._store is not None and point.undefined != NOT_JUDGED:
            self._store.keep(key, point)
        return point


def _key(one: Slice, at: tuple[float, ...]) -> Key:
    return digest([direction.to_json() for direction in one.directions])[:16], at
