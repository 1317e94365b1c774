"""Which tensors a recipe edits, and what preflight has to say about each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.safetensors_format import TensorInfo
from lox_merge.jobs.layout import MatrixView, is_stack, is_vector, matrix_views
from lox_merge.jobs.settings import Settings
from lox_merge.maths.rank import RankRule
from lox_merge.wording import first_few

if TYPE_CHECKING:
    from lox_merge.jobs.edit import Edit

_EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|wpe|word_embeddings|\w*embeddings?|shared)(\.|$)")
_OUTPUT_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)(\.|$)|^output\.weight$")
# Constants that older versions of transformers saved as tensors; newer ones neither need nor write them.
_LEGACY_BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "position_ids", "attn.bias")
_MOST_NAMED = 8


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor of the checkpoint that the output mirrors.

    action: 'edit' or 'copy'; reason: why it is copied ('' for edits). counterparts: role to the name of the tensor there
    that it is compared with. views: its matrices; rank and alpha hold for each of them. stored: in an output that keeps the quantised
    form, the name of the stored tensor that this becomes ('' for one that is written as it is).
    """

    name: str
    info: TensorInfo
    action: str
    reason: str = ""
    counterparts: Mapping[str, str] = field(default_factory=dict)
    rank: RankRule | None = None
    alpha: float = 0.0
    views: tuple[MatrixView, ...] = ()
    stored: str = ""

    @property
    def written(self) -> str:
        """Its name in the output."""
        return self.stored or self.name

    @property
    def base_name(self) -> str:
        """The tensor of the base checkpoint that the delta is taken against."""
        return self.counterparts.get("base", "")

    def name_in(self, role: str) -> str:
        return self.counterparts.get(role, self.name)


@dataclass
class Selection:
    tensors: dict[str, TensorPlan] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def is_embedding(name: str) -> bool:
    """True for token and position embeddings."""
    return bool(_EMBEDDING.search(name)) and not _OUTPUT_HEAD.search(name)


def is_vocabulary(name: str) -> bool:
    """True for token embeddings and output heads, whose rows are vocabulary entries."""
    return bool(_EMBEDDING.search(name) or _OUTPUT_HEAD.search(name))


def is_legacy_buffer(info: TensorInfo) -> bool:
    """True for constants that older versions of transformers saved as tensors."""
    # attn.bias is also the name of a real bias vector: the causal mask has four dimensions.
    return info.name.endswith(_LEGACY_BUFFERS) and not (info.name.endswith("attn.bias") and len(info.shape) < 3)


def select_tensors(checkpoints: Mapping[str, Checkpoint], settings: Settings, edit: Edit) -> Selection:
    """Decides for every tensor of the last checkpoint, comparing headers only. Problems and warnings name tensor and both shapes."""
    selection = Selection()
    *others, mirrored = checkpoints.values()
    missing: dict[str, list[str]] = {other.role: [] for other in others}
    for name in mirrored.names:
        selection.tensors[name] = _plan_tensor(name, others, mirrored, settings, edit, selection, missing)
    for other in others:
        _report_missing(missing[other.role], other, mirrored, selection)
    _report_unused_patterns(settings, mirrored, selection)
    if not selection.problems and not any(plan.action == "edit" for plan in selection.tensors.values()):
        selection.problems.append("the recipe edits no tensor at all: every one is left out by --include, --exclude, --linear-only or alpha 0.")
    return selection


def _plan_tensor(
    name: str,
    others: list[Checkpoint],
    mirrored: Checkpoint,
    settings: Settings,
    edit: Edit,
    selection: Selection,
    missing: dict[str, list[str]],
) -> TensorPlan:
    info = mirrored.info(name)

    def copy(reason: str) -> TensorPlan:
        return TensorPlan(name, info, "copy", reason)

    found = {other.role: counterpart(name, other) for other in others}
    if is_legacy_buffer(info) and None in found.values():
        return copy("constant buffer")
    is_line = is_vector(info.shape)
    for other in others:
        if found[other.role] is None and (is_line or info.size == 0 or info.dtype in dtypes.EDITABLE):
            missing[other.role].append(name)
    vector = is_line and len(info.shape) > 0 and edit.edits_vectors
    if (is_line and not vector) or info.size == 0:
        for other in others:
            same = found[other.role]
            if same is not None and other.info(same).shape != info.shape and not is_vocabulary(name):
                selection.problems.append(_shapes_differ(name, other, same, mirrored))
        return copy("fewer than two dimensions" if not edit.edits_vectors else "no entries, or no dimensions")
    if info.dtype not in dtypes.EDITABLE:
        return copy(f"dtype {info.dtype} holds no weights")
    for other in reversed(others):
        same = found[other.role]
        if same is None:
            return copy(f"not in {other.role}")
        reason = _difference(name, other, same, mirrored, selection)
        if reason:
            return copy(reason)
    if settings.include and not any(settings.matches(pattern, name) for pattern in settings.include):
        return copy("not included")
    if any(settings.matches(pattern, name) for pattern in settings.exclude):
        return copy("excluded")
    if settings.linear_only and not _is_linear(name, info, mirrored):
        return copy("not a linear layer")
    if vector:
        views: tuple[MatrixView, ...] = (MatrixView((info.size, 1)),)
    else:
        views = tuple(matrix_views(name, info.shape, mirrored.config, settings.fused))  # type: ignore[arg-type]
    counterparts = {role: same for role, same in found.items() if same is not None}
    return edit.choose(TensorPlan(name, info, "edit", "", counterparts, views=views), selection.problems)


def _difference(name: str, other: Checkpoint, same: str, mirrored: Checkpoint, selection: Selection) -> str:
    """Why a tensor cannot be compared with the one of `other`, '' if it can. Adds a problem or a warning."""
    info, there = mirrored.info(name), other.info(same)
    if there.shape != info.shape:
        if not is_vocabulary(name):
            selection.problems.append(_shapes_differ(name, other, same, mirrored))
        elif other.role == "base":
            selection.warnings.append(
                f"{name} is copied, not edited: base has {list(there.shape)} and {mirrored.role} {list(info.shape)} "
                "(the vocabularies differ, so their rows can't be assumed to be the same tokens)."
            )
        else:
            selection.problems.append(
                f"tensor {name}: {other.role} has {list(there.shape)} ({other.title}), {mirrored.role} has {list(info.shape)} ({mirrored.title}): "
                f"the vocabularies differ. Give the {mirrored.role} model before its vocabulary was changed."
            )
        return "vocabularies differ"
    if there.dtype not in dtypes.EDITABLE:
        selection.problems.append(
            f"tensor {name}: {other.role} stores {there.describe()}, {mirrored.role} {info.describe()}; one of them holds no weights."
        )
        return "dtype"
    return ""


def _is_linear(name: str, info: TensorInfo, mirrored: Checkpoint) -> bool:
    return not is_vocabulary(name) and (len(info.shape) == 2 or is_stack(name, info.shape, mirrored.config))


def counterpart(name: str, other: Checkpoint) -> str | None:
    """The other checkpoint's tensor of the same name; for an untied output head over a tied model, its embedding is its head."""
    if name in other:
        return name
    if other.ties_embeddings and _OUTPUT_HEAD.search(name):
        embeddings = [known for known in other.names if re.search(r"(embed_tokens|wte|word_embeddings|embed_in)\.weight$", known)]
        if len(embeddings) == 1:
            return embeddings[0]
    return None


def _shapes_differ(name: str, other: Checkpoint, counterpart: str, mirrored: Checkpoint) -> str:
    return (
        f"tensor {name}: {other.role} has {list(other.info(counterpart).shape)} ({other.title}/{other.home[counterpart]}), "
        f"{mirrored.role} has {list(mirrored.info(name).shape)} ({mirrored.title}/{mirrored.home[name]}). The two are not of one architecture: "
        f"give the checkpoint that {mirrored.role} was trained from."
    )


def _report_missing(missing: list[str], other: Checkpoint, mirrored: Checkpoint, selection: Selection) -> None:
    extra = [name for name in other.names if name not in mirrored and not is_legacy_buffer(other.info(name))]
    if mirrored.ties_embeddings:
        extra = [name for name in extra if not _OUTPUT_HEAD.search(name)]
    for names, there, lacking in ((missing, mirrored, other), (extra, other, mirrored)):
        if names:
            example = there.info(names[0])
            selection.problems.append(
                f"{len(names)} tensor(s) of {there.role} ({there.title}) are missing in {lacking.role} ({lacking.title}): "
                f"{first_few(names, _MOST_NAMED)} "
                f"(the first is {example.describe()} in {there.title}/{there.home[names[0]]}; {lacking.role} has nothing of that name). "
                "Check that both are the same architecture and saved by the same library."
            )


def _report_unused_patterns(settings: Settings, mirrored: Checkpoint, selection: Selection) -> None:
    # One recipe may serve tied and untied models: a tied one has no output head of its own.
    known = [*mirrored.names, "lm_head.weight"] if mirrored.ties_embeddings else mirrored.names
    for option, patterns in settings.patterns().items():
        for pattern in patterns:
            if not any(settings.matches(pattern, name) for name in known):
                selection.problems.append(f"{option} {pattern!r} matches no tensor of {mirrored.title}; a name looks like {mirrored.names[0]!r}.")
