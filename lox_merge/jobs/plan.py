"""Preflight: everything that can go wrong is looked for in headers, before a byte is written."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.checkpoint import PICKLE, SINGLE, SINGLE_INDEX, Checkpoint
from lox_merge.checkpoint.files import LocalFolder
from lox_merge.checkpoint.safetensors_format import Header, build_header
from lox_merge.errors import OutputError, PlanError
from lox_merge.jobs.recipe import Recipe
from lox_merge.jobs.select import TensorPlan, quantisation_problems, select_tensors
from lox_merge.jobs.triplets import TakenNow, TripletSource

WORK_FOLDER = ".lox_merge"
MANIFEST = "lox_merge.json"
# Room for index, manifest and file system overhead beside what is counted exactly.
_DISK_MARGIN = 16 * 2**20


@dataclass(frozen=True)
class ShardPlan:
    """One file to write: `header` is byte for byte aligned's where dtypes are kept; tensors in the order of their data."""

    file: str
    source_file: str
    header: Header
    tensors: tuple[TensorPlan, ...]

    def sources(self, base: Checkpoint) -> list[tuple[str, str]]:
        """(role, file) of every source file this shard needs, in the order of use."""
        needed = [("aligned", self.source_file)]
        needed += [("base", base.home[tensor.base_name]) for tensor in self.tensors if tensor.action == "edit"]
        return list(dict.fromkeys(needed))


@dataclass
class Plan:
    """What a run will do. Nothing in it has been written. triplets: where those of each delta come from."""

    base: Checkpoint
    aligned: Checkpoint
    out: Path
    recipe: Recipe
    shards: list[ShardPlan]
    side_files: list[str]
    triplets: TripletSource
    warnings: list[str] = field(default_factory=list)

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
        return self.aligned.bytes + sum(self.base.info(tensor.base_name).bytes for tensor in self.edited)

    @property
    def bytes_written(self) -> int:
        return sum(shard.header.file_size for shard in self.shards)

    @property
    def largest_matrix_bytes(self) -> int:
        """float32 bytes of the largest matrix that is decomposed."""
        return max((4 * view.shape[0] * view.shape[1] for tensor in self.edited for view in tensor.views), default=0)

    @property
    def largest_tensor_bytes(self) -> int:
        """float32 bytes of the largest tensor of the checkpoint."""
        return max((4 * tensor.info.size for tensor in self.tensors), default=0)

    def index(self) -> dict[str, Any] | None:
        """The index to write, None for a single file. aligned's own where files and dtypes are kept."""
        if len(self.shards) == 1 and self.shards[0].file == SINGLE:
            return None
        metadata = dict((self.aligned.index or {}).get("metadata") or {})
        metadata["total_size"] = sum(info.bytes for shard in self.shards for info in shard.header.tensors.values())
        names = sorted((name, shard.file) for shard in self.shards for name in shard.header.tensors)
        return {"metadata": metadata, "weight_map": dict(names)}

    @property
    def keeps_index(self) -> bool:
        return self.recipe.dtype is None and not self.aligned.pickled and self.aligned.index is not None

    def with_recipe(self, recipe: Recipe) -> Plan:
        """The same selection of tensors with the ranks and alphas of another recipe; what selects tensors has to be equal."""

        def changed(tensor: TensorPlan) -> TensorPlan:
            if tensor.action != "edit":
                return tensor
            return replace(tensor, rank=recipe.rank_for(tensor.name), alpha=recipe.alpha_for(tensor.name))

        shards = [replace(shard, tensors=tuple(map(changed, shard.tensors))) for shard in self.shards]
        return replace(self, recipe=recipe, shards=shards)

    def fetch(self) -> None:
        """Makes every file that the run reads available on disk."""
        needed = [pair for shard in self.shards for pair in shard.sources(self.base)]
        self.base.fetch(list(dict.fromkeys(file for role, file in needed if role == "base")))
        index = [SINGLE_INDEX] if self.keeps_index else []
        self.aligned.fetch([*dict.fromkeys(file for role, file in needed if role == "aligned"), *self.side_files, *index])


def make_plan(base: Checkpoint, aligned: Checkpoint, out: Path, recipe: Recipe, *, order_confirmed: bool = False) -> Plan:
    """Checks the whole job from headers. Raises PlanError with every problem found, or OutputError."""
    problems = _same_source(base, aligned)
    problems += quantisation_problems(base) + quantisation_problems(aligned)
    warnings: list[str] = []
    if not order_confirmed:
        problems += _swapped(base, aligned)
    if not problems:
        selection = select_tensors(base, aligned, recipe)
        problems, warnings = selection.problems, selection.warnings
    problems += _output_problems(out, base, aligned)
    if problems:
        raise PlanError(problems)
    shards = [_plan_shard(file, header, selection.tensors, aligned, recipe) for file, header in aligned.headers.items()]
    return Plan(base, aligned, out, recipe, shards, aligned.side_files(), TakenNow(recipe), warnings)


def check_disk(plan: Plan, already_written: int = 0) -> None:
    """Raises OutputError when the file system of the output lacks room for what is still to be written."""
    side = sum(plan.aligned.source.names()[name] for name in plan.side_files)
    check_room(plan.out, plan.bytes_written + side - already_written)


def check_room(out: Path, count: int) -> None:
    """Raises OutputError when the file system of `out` lacks room for `count` bytes and a little more."""
    needed = count + _DISK_MARGIN
    free = shutil.disk_usage(_existing_parent(out)).free
    if free < needed:
        raise OutputError(
            f"the disk of {out} has {free / 1e9:,.2f} GB free and {needed / 1e9:,.2f} GB are needed. Free some room or choose another disk."
        )


def _same_source(base: Checkpoint, aligned: Checkpoint) -> list[str]:
    one, other = base.source, aligned.source
    same_folder = isinstance(one, LocalFolder) and isinstance(other, LocalFolder) and one.root == other.root
    same_commit = one.identity().get("commit") is not None and one.identity().get("commit") == other.identity().get("commit")
    if same_folder or same_commit:
        return [
            f"base and aligned are the same checkpoint ({aligned.title}): there is no alignment to extrapolate. "
            "Give the model that it was trained from as base."
        ]
    return []


def _swapped(base: Checkpoint, aligned: Checkpoint) -> list[str]:
    """A chat template in the first and none in the second, though it has a tokenizer: most likely the wrong order."""
    if base.has_chat_template and aligned.has_tokenizer and not aligned.has_chat_template:
        return [
            f"base ({base.title}) has a chat template and aligned ({aligned.title}) has none: they look swapped, and hardening the wrong way round "
            "would remove safety. Give the pre-trained model first; if the order is right, add --order-is-right."
        ]
    return []


def _existing_parent(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def _output_problems(out: Path, base: Checkpoint, aligned: Checkpoint) -> list[str]:
    problems = []
    target = out.resolve()
    for checkpoint in (base, aligned):
        if isinstance(checkpoint.source, LocalFolder):
            root = checkpoint.source.root
            if target == root or target.is_relative_to(root):
                problems.append(f"the output {out} lies inside {checkpoint.role} ({checkpoint.title}); choose a folder outside it.")
            elif root.is_relative_to(target):
                problems.append(f"{checkpoint.role} ({checkpoint.title}) lies inside the output {out}; choose another output folder.")
    parent = _existing_parent(out)
    if not parent.is_dir():
        problems.append(f"the output {out} can't be made: {parent} is a file, not a folder. Choose another output folder.")
    elif not os.access(parent, os.W_OK | os.X_OK):
        problems.append(f"the output {out} can't be made: no permission to write in {parent}. Choose another folder or change its permissions.")
    return problems


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raises OutputError when `out` holds anything that is not an output of this program."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise OutputError(f"the output {out} is a file. Choose another name.")
    if not (out / MANIFEST).is_file() and not (out / WORK_FOLDER).is_dir():
        hint = "--overwrite replaces only folders that lox-merge wrote. " if overwrite else ""
        raise OutputError(f"the output {out} exists and was not written by lox-merge. {hint}Choose another folder, or empty it yourself.")


def _out_code(tensor: TensorPlan, recipe: Recipe) -> str:
    """dtype code that a tensor is written in: every floating tensor follows --dtype, so that the model is of one dtype."""
    if recipe.dtype and tensor.info.dtype in dtypes.EDITABLE:
        return dtypes.OUTPUT_CODES[recipe.dtype]
    return tensor.info.dtype


def _plan_shard(file: str, header: Header, tensors: dict[str, TensorPlan], aligned: Checkpoint, recipe: Recipe) -> ShardPlan:
    if any(_out_code(tensors[name], recipe) != info.dtype for name, info in header.tensors.items()):
        entries = [(name, _out_code(tensors[name], recipe), info.shape) for name, info in header.tensors.items()]
        header = build_header(entries, header.metadata)
    ordered = tuple(tensors[info.name] for info in header.by_offset())
    return ShardPlan(_out_file(file) if aligned.pickled else file, file, header, ordered)


def _out_file(file: str) -> str:
    """safetensors name of a pickled shard, as transformers names it."""
    return SINGLE if file == PICKLE else PurePosixPath(file).name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def output_config(plan: Plan) -> bytes | None:
    """config.json for another dtype; None where aligned's own bytes are kept."""
    if plan.recipe.dtype is None or "config.json" not in plan.side_files:
        return None

    def changed(part: dict[str, Any]) -> dict[str, Any]:
        values = {key: changed(value) if isinstance(value, dict) else value for key, value in part.items()}
        return {key: plan.recipe.dtype if key in ("dtype", "torch_dtype") and isinstance(value, str) else value for key, value in values.items()}

    config = changed(plan.aligned.config)
    if not {"dtype", "torch_dtype"} & config.keys():
        config["dtype"] = plan.recipe.dtype
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
