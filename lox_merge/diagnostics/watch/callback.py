"""`AlignmentWatch`: a callback that tells, while anyone's fine-tuning runs, how far it has moved against the model's alignment."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from lox_merge.diagnostics.curvature.walk import Example, check_model
from lox_merge.diagnostics.watch.changes import Changes, check_begin, check_whole
from lox_merge.diagnostics.watch.completions import chosen_examples
from lox_merge.diagnostics.watch.pace import Pace
from lox_merge.diagnostics.watch.processes import agreed
from lox_merge.diagnostics.watch.retained import RetainedAlignment
from lox_merge.diagnostics.watch.sensitive import SensitiveSubspace
from lox_merge.diagnostics.watch.settings import OVERLAP, PROJECTION, R_FT, RATIO, WatchSettings
from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.maths.weight_changes import Change
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import Conversations, load_conversations

Figures = dict[str, float | None]


class AlignmentWatch(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Measures θ_t − θ_0 against alignment during training, logs it through the trainer, warns, and stops where asked to.

    completions: safe completions (a file of conversations, `Conversations`, or rows of `input_ids` and `labels`); they give
    ‖P(θ_t − θ_0)‖, P onto the leading eigenvectors of their empirical Fisher matrix at θ_0, and the overlap score ("The Geometry of
    Alignment Collapse", 2026). base: the model that θ_0 was aligned from; it gives R_ft (LoX, arXiv 2506.15606, Eq. 2). factors: of
    `lox-merge decompose` for that pair: with base no SVD is spent, alone R_ft is known within bounds. Each part is optional.
    threshold: a number for the projection, or values by logged name. Further settings: `WatchSettings`.

    θ_0 is the model when the training begins; under PEFT, with the adapters disabled, and Δ is read from LoRA's factors.
    The training itself is not changed: weights, gradients, modes and random numbers are as without the watch. Only the first process
    measures. history: every measurement as plain values; setup: what was kept, and the seconds it took. Raises RequestError when the
    training begins: sharded or quantised weights, other adapters than LoRA, nothing to measure.
    """

    def __init__(
        self,
        *,
        completions: Conversations | str | Path | Sequence[Example] | None = None,
        base: str | Path | None = None,
        factors: str | Path | None = None,
        threshold: float | Mapping[str, float] | None = None,
        tokenizer: Any = None,
        rendering: Rendering | None = None,
        cache_dir: Path | None = None,
        **settings: Any,
    ) -> None:
        if completions is None and base is None and factors is None:
            raise RequestError("nothing to watch: give completions, base or factors.")
        limits = threshold if isinstance(threshold, Mapping) else {} if threshold is None else {PROJECTION: threshold}
        self.settings = WatchSettings(threshold=dict(limits), **settings)
        for name in limits:
            if completions is None and name not in (R_FT, RATIO):
                raise RequestError(f"a threshold for {name} needs completions.")
            if base is None and factors is None and name in (R_FT, RATIO):
                raise RequestError(f"a threshold for {name} needs base or factors.")
        self._completions = load_conversations(completions, "completions") if isinstance(completions, (str, Path)) else completions
        self._base, self._factors, self._cache_dir = base, factors, cache_dir
        self._tokenizer, self._rendering = tokenizer, rendering or Rendering()
        self.pace = Pace(self.settings.interval, self.settings.overhead)
        self.history: list[dict[str, Any]] = []
        self.setup: dict[str, Any] = {}
        self._changes: Changes | None = None
        self._sensitive: SensitiveSubspace | None = None
        self._retained: RetainedAlignment | None = None
        self._pending: dict[str, float] = {}
        self._warned: set[str] = set()
        self._r_align: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Settings, setup, history and the share of time that measuring took, as plain values."""
        return {"settings": self.settings.to_json(), "setup": self.setup, "overhead": self.pace.overhead, "history": self.history}

    def first_in(self, trainer: Any) -> AlignmentWatch:
        """Puts the watch before the trainer's other callbacks, so that integrations (TensorBoard, …) report its figures too."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **_: Any) -> None:
        check_whole(model)
        check_model(model)
        check_begin(model)
        self._clear()
        self.history, self.setup, self._r_align = [], {}, None
        crossed = False
        if state.is_world_process_zero:
            started = time.perf_counter()
            if state.global_step and not getattr(model, "peft_config", None):
                warnings.warn(
                    f"the training goes on from step {state.global_step}: AlignmentWatch measures from there, R_align too, "
                    "and what was lost before is not in its figures",
                    LoxMergeWarning,
                    stacklevel=2,
                )
            with _untouched(model):
                self._prepare(model, processing_class)
            self.setup |= {"seconds": time.perf_counter() - started, "from_step": state.global_step}
            with self.pace.timed():  # the first of its kind tells what the next one will take
                crossed = self._measure(model, state)
            self._pending = {}  # no step to log it at
        if self.settings.stop:
            # The trainer looks at it after its first batch, not before.
            crossed = agreed((False, crossed), args)[1]
            control.should_training_stop = control.should_training_stop or crossed
        self.pace.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> Any:
        measured = crossed = False
        if self._changes is not None:
            _wait_for(model)
            last = state.global_step >= state.max_steps or control.should_training_stop
            if self.pace.due(state.global_step) or last:
                with self.pace.timed():
                    crossed = self._measure(model, state)
                measured = True
                self._check_pace(last)
        measured, crossed = agreed((measured, crossed), args)
        # The trainer logs at the end of this step, and `on_log` adds the figures.
        control.should_log = control.should_log or measured
        if crossed and self.settings.stop:
            control.should_training_stop = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self._pending and logs is not None and "loss" in logs:
            logs.update(self._pending)
            # The trainer has entered its own copy already.
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(self._pending)
            self._pending = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.pace.end()
        self._clear()

    def _clear(self) -> None:
        """Lets everything go but what was measured."""
        if self._retained is not None:
            self._retained.close()
        self._changes, self._sensitive, self._retained = None, None, None
        self._pending, self._warned = {}, set()

    def _prepare(self, model: Any, processing_class: Any) -> None:
        changes = Changes(model, self.settings.wants)
        if not changes.names:
            raise RequestError("no parameter to watch: none that is trained is named by only=…" if self.settings.only else "no parameter is trained.")
        self.setup = {"parameters": len(changes.names)}
        if self._completions is not None:
            tokenizer = self._tokenizer or getattr(processing_class, "tokenizer", processing_class)
            examples = chosen_examples(self._completions, self.settings, tokenizer, self._rendering)
            options = {name: getattr(self.settings, name) for name in ("energy", "dimension", "reduction", "memory")}
            with changes.at_start():
                self._sensitive = SensitiveSubspace(model, changes.names, examples, **options)
            found = self._sensitive
            if found.left_out:
                name, reason = next(iter(found.left_out.items()))
                warnings.warn(
                    f"{len(found.left_out)} trained parameter(s) have no part in the projection, such as {name}: {reason}",
                    LoxMergeWarning,
                    stacklevel=2,
                )
            self.setup |= {
                "completions": found.examples,
                "entries": found.subspace.parameters,
                "dimension": found.subspace.dimension,
                "bytes": found.bytes,
                "left_out": found.left_out,
            }
        if self._base is not None or self._factors is not None:
            starts = dict(model.named_parameters(remove_duplicate=False))

            def start(name: str) -> torch.Tensor:
                found = changes.start(name) if name in changes.names else starts[name]
                return found.to(starts[name].device)

            self._retained = RetainedAlignment(
                model, start, base=self._base, factors=self._factors, rank=self.settings.rank, seed=self.settings.seed, cache_dir=self._cache_dir
            )
            self.setup |= {"r_ft_left_out": self._retained.left_out}
            # Of θ_0 itself: an adapter that acts already (of a checkpoint, or begun at random) has moved the first measurement away from it.
            self._r_align = self._retained.ratio(lambda name: None).mean
        self._changes = changes

    @torch.no_grad()
    def _measure(self, model: Any, state: Any) -> bool:
        """Enters a measurement into the history; whether a threshold was crossed."""
        started = time.perf_counter()
        changes = self._changes
        assert changes is not None

        def change(name: str) -> Change | None:
            return changes.now(name) if name in changes.names else None

        figures: Figures = {}
        if self._sensitive is not None:
            found = self._sensitive.measured(changes.now, model.device)
            figures |= {
                PROJECTION: found.projection,
                f"{PROJECTION}_random": found.expected_projection,
                OVERLAP: found.overlap_score,
                f"{OVERLAP}_random": found.expected_overlap_score,
            }
        bounds = None
        if self._retained is not None:
            kept = self._retained.ratio(change)
            bounds = kept.bounds
            ratio = kept.mean / self._r_align if kept.mean is not None and self._r_align else None
            figures |= {R_FT: kept.mean, RATIO: ratio}
        figures = {name: value if value is not None and value == value and abs(value) != float("inf") else None for name, value in figures.items()}
        record = {"step": state.global_step, "figures": figures, "seconds": time.perf_counter() - started}
        self.history.append(record | ({"r_ft_bounds": list(bounds)} if bounds else {}))
        self._pending = {name: value for name, value in figures.items() if value is not None}
        return self._warn(figures, state.global_step)

    def _warn(self, figures: Figures, step: int) -> bool:
        crossed = self.settings.crossed(figures)
        for name in crossed:
            if name not in self._warned:
                self._warned.add(name)
                limit = self.settings.threshold[name]
                stops = "; the training stops" if len(self.history) > 1 else "; the training stops after its first batch"
                what = stops if self.settings.stop else ""
                warnings.warn(f"{name} is {figures[name]:.4g} after step {step}, and its threshold {limit:g}{what}", LoxMergeWarning, stacklevel=2)
        return bool(crossed)

    def _check_pace(self, last: bool) -> None:
        share = self.pace.overhead
        if self.settings.interval is not None and not last and share is not None and share > self.settings.overhead and "pace" not in self._warned:
            self._warned.add("pace")
            warnings.warn(
                f"measuring every {self.settings.interval} step(s) takes {share:.0%} of the training's time, above {self.settings.overhead:.0%}. "
                "Raise interval, or leave it out to have it chosen",
                LoxMergeWarning,
                stacklevel=2,
            )


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Random numbers of torch as they were."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def _wait_for(model: Any) -> None:
    """What the training has queued on a GPU is its own time, not ours."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
