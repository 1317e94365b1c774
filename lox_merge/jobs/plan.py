"""Preflight: everything that can go wrong is looked for in headers, before a byte is written."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from lox_merge.checkpoint.adapter import AdaptedCheckpoint
from lox_merge.checkpoint.checkpoint import SINGLE, SINGLE_INDEX, Checkpoint
from lox_merge.checkpoint.collector import no_collection
from lox_merge.checkpoint.files import LocalFolder
from lox_merge.checkpoint.quantised.view import QuantisedCheckpoint, quantisation_problems, quantised_form
from lox_merge.errors import PlanError
from lox_merge.jobs.edit import Edit
from lox_merge.jobs.layout import MatrixView
from lox_merge.jobs.low_disk import DOWNLOADS, Passing
from lox_merge.jobs.noise import grid_of
from lox_merge.jobs.output_folder import WORK_FOLDER, check_room, output_problems
from lox_merge.jobs.quantised import AskedForm, Form, form_problems, form_warnings, settled_form, usual_form_warnings
from lox_merge.jobs.select import TensorPlan, select_tensors
from lox_merge.jobs.settings import Settings
from lox_merge.jobs.shards import ShardPlan, plan_shards
from lox_merge.jobs.store import Store
from lox_merge.jobs.triplets import TripletSource, usual_triplets
from lox_merge.maths.grid import Grid


@dataclass
class Plan:
    """What a run will do. Nothing in it has been written.

    checkpoints: by role, in the order of training; the output mirrors the last. triplets: where those of each delta come from.
    passing: how weight files come from the Hub where they are not to be on disk all at once. store: where shards go instead of `out`.
    form: what is to be written of it. confirmed: 'order' and 'base' where --order-is-right or --base-is-right was needed.
    """

    checkpoints: Mapping[str, Checkpoint]
    out: Path
    recipe: Settings
    edit: Edit
    shards: list[ShardPlan]
    side_files: list[str]
    triplets: TripletSource
    passing: Passing | None = None
    form: Form = "model"
    store: Store | None = None
    warnings: list[str] = field(default_factory=list)
    confirmed: list[str] = field(default_factory=list)

    @property
    def base(self) -> Checkpoint:
        return self.checkpoints["base"]

    @property
    def aligned(self) -> Checkpoint:
        return self.checkpoints["aligned"]

    @property
    def mirrored(self) -> Checkpoint:
        """The checkpoint whose files, names, dtypes and side files the output has."""
        return self.checkpoints[self.edit.roles[-1]]

    @property
    def others(self) -> list[Checkpoint]:
        """The checkpoints that are only read."""
        return [checkpoint for role, checkpoint in self.checkpoints.items() if role != self.edit.roles[-1]]

    @property
    def tensors(self) -> list[TensorPlan]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    @property
    def edited(self) -> list[TensorPlan]:
        return [tensor for tensor in self.tensors if tensor.action == "edit"]

    def copied_by_reason(self) -> Counter[str]:
        return Counter(tensor.reason for tensor in self.tensors if tensor.action == "copy")

    @property
    def bytes_read(self) -> int:
        edited = self.edited
        return self.mirrored.bytes + sum(other.stored_bytes(tensor.name_in(other.role)) for other in self.others for tensor in edited)

    @property
    def bytes_written(self) -> int:
        return sum(shard.header.file_size for shard in self.shards)

    @property
    def requantised(self) -> QuantisedCheckpoint | None:
        """The quantised checkpoint whose form the output keeps; None for an output of plain weights."""
        return self.mirrored if self.edit.requantises and isinstance(self.mirrored, QuantisedCheckpoint) else None

    def stored(self, tensor: TensorPlan) -> Tensor:
        """What is written for a tensor that is copied, in its stored dtype."""
        return self.requantised.stored.tensor(tensor.stored) if self.requantised and tensor.stored else self.mirrored.tensor(tensor.name)

    def grid(self, tensor: TensorPlan, view: MatrixView) -> Grid | None:
        """The values that one matrix of the output can hold; None where it is not quantised."""
        return grid_of(self.requantised, tensor.name, view) if tensor.stored else None

    def working_memory(self, tensor: TensorPlan, view: MatrixView) -> int:
        """Upper estimate of the bytes that one matrix takes beside mapped files and its place in the output, decoded sources among them."""
        made = sum(checkpoint.made_bytes(tensor.name_in(role)) for role, checkpoint in self.checkpoints.items())
        return self.edit.working_memory(view.shape, tensor) + made

    # Asked for at every shard, and each time it goes through all tensors.
    @cached_property
    def largest_matrix_bytes(self) -> int:
        """Upper estimate of the bytes that work on the largest matrix takes."""
        return max((self.working_memory(tensor, view) for tensor in self.edited for view in tensor.views), default=0)

    @cached_property
    def largest_edit_bytes(self) -> int:
        """The same with what its tensor takes in the output: more than any tensor takes that is edited matrix by matrix."""
        edited = [(tensor, shard.bytes_in_memory(tensor)) for shard in self.shards for tensor in shard.tensors if tensor.action == "edit"]
        return max((size + self.working_memory(tensor, view) for tensor, size in edited for view in tensor.views), default=0)

    @property
    def largest_tensor_bytes(self) -> int:
        """float32 bytes of the largest tensor of the checkpoint."""
        return max((4 * tensor.info.size for tensor in self.tensors), default=0)

    def index(self) -> dict[str, Any] | None:
        """The index to write, None for a single file. The mirrored one where files and dtypes are kept."""
        if len(self.shards) == 1 and self.shards[0].file == SINGLE:
            return None
        metadata = dict((self.mirrored.index or {}).get("metadata") or {})
        metadata["total_size"] = sum(info.bytes for shard in self.shards for info in shard.header.tensors.values())
        names = sorted((name, shard.file) for shard in self.shards for name in shard.header.tensors)
        return {"metadata": metadata, "weight_map": dict(names)}

    @property
    def keeps_index(self) -> bool:
        return self.recipe.dtype is None and not self.mirrored.pickled and self.mirrored.index is not None

    @property
    def files(self) -> list[str]:
        """Everything that a run writes into the output, but for the manifest."""
        return [*(shard.file for shard in self.shards), *self.side_files, SINGLE_INDEX]

    def fetch(self) -> None:
        """Makes every file that the run reads here available on disk, but for weight files that pass through it."""
        needed = [] if self.passing or self.store else [pair for shard in self.shards for pair in shard.sources(self.checkpoints)]
        own = [*self.side_files, *([SINGLE_INDEX] if self.keeps_index else [])]
        for role, checkpoint in self.checkpoints.items():
            files = dict.fromkeys(file for needed_role, file in needed if needed_role == role)
            checkpoint.fetch([*files, *(own if checkpoint is self.mirrored else [])])

    def let_sources_pass(self) -> None:
        """Weight files on the Hub come when their shard is written, and go. Raises RequestError where no source is on the Hub."""
        needed = [shard.sources(self.checkpoints) for shard in self.shards]
        self.passing = Passing.through(self.out / WORK_FOLDER / DOWNLOADS, self.checkpoints, needed)

    def close(self) -> None:
        for checkpoint in self.checkpoints.values():
            checkpoint.close()


@no_collection()
def make_plan(
    checkpoints: Mapping[str, Checkpoint], out: Path, recipe: Settings, edit: Edit, *, order_confirmed: bool = False, form: AskedForm = "model"
) -> Plan:
    """Checks the whole job from headers. checkpoints: by role, those of `edit.roles` in that order. form: what will be written of it.
    Raises PlanError with every problem found, or OutputError."""
    ordered = {role: checkpoints[role] for role in edit.roles}
    mirrored = ordered[edit.roles[-1]]
    problems = [problem for one, other in itertools.combinations(ordered.values(), 2) for problem in _same_source(one, other)]
    problems += [problem for checkpoint in ordered.values() for problem in quantisation_problems(checkpoint)]
    settled = settled_form(mirrored, recipe, edit, form)
    problems += [] if form == "memory" else form_problems(mirrored, recipe, edit, settled)
    warnings: list[str] = []
    if not order_confirmed:
        problems += [problem for one, other in itertools.pairwise(ordered.values()) for problem in _swapped(one, other)]
    if not problems:
        selection = select_tensors(ordered, recipe, edit)
        problems = selection.problems
        warnings = selection.warnings + form_warnings(ordered.values())
        if settled == "adapter" and form == "usual":
            warnings = usual_form_warnings(mirrored) + warnings
    problems += output_problems(out, ordered.values())
    if problems:
        raise PlanError(problems)
    warnings = [note for checkpoint in ordered.values() if isinstance(checkpoint, AdaptedCheckpoint) for note in checkpoint.notes] + warnings
    warnings += _left_behind(mirrored)
    shards = plan_shards(mirrored, selection.tensors, recipe, keep_form=edit.requantises)
    beside = mirrored.side_files()
    if twice := sorted({shard.file for shard in shards} & set(beside)):  # what is beside the weights is written last, over the edit
        raise PlanError([f"{mirrored.role}: {', '.join(twice)} of {mirrored.title} would be weights and a file beside them. Rename the latter."])
    triplets = usual_triplets(ordered["base"], ordered["aligned"], recipe)
    return Plan(ordered, out, recipe, edit, shards, beside, triplets, form=settled, warnings=warnings)


def _left_behind(mirrored: Checkpoint) -> list[str]:
    """What lies beside the weights, and may be meant to come along."""
    notes = []
    if large := mirrored.unknown_weights():
        shown = f"{', '.join(large[:4])}{' …' if len(large) > 4 else ''} of {mirrored.title} {'is' if len(large) == 1 else 'are'}"
        notes.append(f"{shown} not copied: weights that are not edited, by format and size. Copy them yourself if the model needs them.")
    if "adapter_config.json" in mirrored.source.names() and not isinstance(mirrored, AdaptedCheckpoint):
        notes.append(
            f"{mirrored.title} holds an adapter beside whole weights, which transformers applies when it loads the folder. The weights alone are "
            "edited, and the adapter is not copied."
        )
    return notes


def confirmed(checkpoints: Iterable[Checkpoint], *, order: bool) -> list[str]:
    """What had to be said for these to be taken, for the manifest: 'order' where they look swapped, 'base' where an adapter names another.

    order: --order-is-right was said. Where it was not needed it says nothing: the same sources and recipe give the same manifest.
    """
    given = list(checkpoints)
    swapped = order and any(_swapped(one, other) for one, other in itertools.pairwise(given))
    other_base = any(isinstance(checkpoint, AdaptedCheckpoint) and checkpoint.base_confirmed for checkpoint in given)
    return ["order"] * swapped + ["base"] * other_base


def pair_problems(base: Checkpoint, aligned: Checkpoint, *, order_confirmed: bool = False) -> list[str]:
    """What can be said against a pair before its tensors are compared: one model twice, quantised weights, swapped."""
    problems = _same_source(base, aligned)
    problems += quantisation_problems(base) + quantisation_problems(aligned)
    return problems if order_confirmed else problems + _swapped(base, aligned)


def check_disk(plan: Plan, already_written: int = 0) -> None:
    """Raises OutputError when the file system of the output lacks room for what is still to be written."""
    side = sum(plan.mirrored.source.names()[name] for name in plan.side_files)
    sources = plan.passing.most_bytes - plan.passing.bytes_there if plan.passing else 0
    shards = 0 if plan.store else plan.bytes_written - already_written
    check_room(plan.out, shards + side + max(0, sources))


# What it means that a checkpoint was given twice, and what to give instead.
_SAME = {
    ("base", "aligned"): "there is no alignment to extrapolate. Give the model that it was trained from as base.",
    ("aligned", "finetuned"): "there is no fine-tuning to filter. Give the model that was trained from aligned as finetuned.",
    ("base", "finetuned"): "filtering it would write a model with its alignment removed. Give the model that was trained from aligned as finetuned.",
}


def _same_source(one: Checkpoint, other: Checkpoint) -> list[str]:
    first, second = one.source, other.source
    same_folder = isinstance(first, LocalFolder) and isinstance(second, LocalFolder) and first.root == second.root
    same_commit = first.identity().get("commit") is not None and first.identity().get("commit") == second.identity().get("commit")
    if same_folder or same_commit:
        return [f"{one.role} and {other.role} are the same checkpoint ({other.title}): {_SAME[one.role, other.role]}"]
    return []


def _swapped(one: Checkpoint, other: Checkpoint) -> list[str]:
    """A chat template in the earlier model and none in the later, though it has a tokenizer: most likely the wrong order."""
    if isinstance(other, AdaptedCheckpoint):
        return []  # an adapter can only be the later one
    if one.has_chat_template and other.has_tokenizer and not other.has_chat_template:
        if one.role == "base":
            danger = "hardening the wrong way round would remove safety. Give the pre-trained model first"
        else:
            danger = "filtering the wrong way round would remove safety. Give the pre-trained, the aligned and the fine-tuned model in this order"
        return [
            f"{one.role} ({one.title}) has a chat template and {other.role} ({other.title}) has none: they look swapped, and {danger}; "
            "if the order is right, add --order-is-right."
        ]
    return []


def output_config(plan: Plan) -> bytes | None:
    """config.json for another dtype; None where the mirrored bytes are kept."""
    if plan.recipe.dtype is None or "config.json" not in plan.side_files:
        return None

    def changed(part: dict[str, Any]) -> dict[str, Any]:
        values = {key: changed(value) if isinstance(value, dict) else value for key, value in part.items()}
        return {key: plan.recipe.dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else value for key, value in values.items()}

    config = changed(plan.mirrored.config)
    if quantised_form(plan.mirrored) is not None:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part.pop("quantization_config", None)
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = plan.recipe.dtype
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
