"""Which tensors a recipe edits, and what preflight has to say about each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.checkpoint.safetensors_format import TensorInfo
from lox_merge.jobs.layout import MatrixView, is_expert_stack, matrix_views
from lox_merge.jobs.recipe import Recipe
from lox_merge.maths.rank import RankRule

_EMBEDDING = re.compile(r"(^|[._])(embed\w*|wte|wpe|word_embeddings|\w*embeddings?|shared)(\.|$)")
_OUTPUT_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection)(\.|$)|^output\.weight$")
# Names under which quantisation libraries keep scales, zero points and packed integers.
_QUANTISED_NAME = re.compile(
    r"(weight|input|output|k|v|q)_scale(_inv|_2)?$|[._]scales?$|_blocks$|\.(qweight|qzeros|g_idx|weight_packed|weight_zero_point|weight_shape|SCB|absmax)$|quant_state|quant_map"
)
# Constants that older versions of transformers saved as tensors; newer ones neither need nor write them.
_LEGACY_BUFFER = re.compile(r"(rotary_emb\.inv_freq|masked_bias|position_ids|attn\.bias)$")
_MOST_NAMED = 8


@dataclass(frozen=True)
class TensorPlan:
    """What happens to one tensor of the aligned checkpoint.

    action: 'edit' or 'copy'; reason: why it is copied ('' for edits). base_name: the tensor of the base checkpoint that
    the delta is taken against. views: its matrices; rank and alpha hold for each of them.
    """

    name: str
    info: TensorInfo
    action: str
    reason: str = ""
    base_name: str = ""
    rank: RankRule | None = None
    alpha: float = 0.0
    views: tuple[MatrixView, ...] = ()


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
    return bool(_LEGACY_BUFFER.search(info.name)) and not (info.name.endswith("attn.bias") and len(info.shape) < 3)


def quantisation_problems(checkpoint: Checkpoint) -> list[str]:
    """Everything that says these weights are quantised, one line; edits on them would be meaningless."""
    signs: list[str] = []
    settings = next(
        (part["quantization_config"] for part in (checkpoint.config, checkpoint.config.get("text_config") or {}) if part.get("quantization_config")),
        None,
    )
    if settings:
        method = settings.get("quant_method") or settings.get("format") if isinstance(settings, dict) else None
        signs.append(f"quantization_config in config.json ({method or 'method not named'})")
    named = [name for name in checkpoint.home if _QUANTISED_NAME.search(name)]
    low = [
        name
        for name in checkpoint.home
        if checkpoint.info(name).dtype in dtypes.FP8 or not dtypes.known(checkpoint.info(name).dtype) or _packed(checkpoint.info(name))
    ]
    if low:
        signs.append(f"{len(low)} tensor(s) of dtype {checkpoint.info(low[0]).dtype}, such as {low[0]}")
    if named and (signs or low):
        signs.append(f"{len(named)} tensor(s) of scales or packed values, such as {named[0]}")
    elif named:
        signs.append(f"tensors named as scales or packed values, such as {named[0]}")
    if not signs:
        return []
    return [
        f"{checkpoint.role}: {checkpoint.title} is quantised, which is not supported: {'; '.join(signs)}. "
        "Give the unquantised checkpoint (bfloat16, float16 or float32), harden it, and quantise the result."
    ]


def _packed(info: TensorInfo) -> bool:
    """Integer matrices called weight: packed low-bit values. Other integers are index buffers."""
    return info.dtype in ("U8", "I8", "I32", "U32") and len(info.shape) >= 2 and info.name.endswith("weight")


def select_tensors(base: Checkpoint, aligned: Checkpoint, recipe: Recipe) -> Selection:
    """Decides for every tensor of `aligned`, comparing headers only. Problems and warnings name tensor and both shapes."""
    selection = Selection()
    missing: list[str] = []
    for name in aligned.names:
        selection.tensors[name] = _plan_tensor(name, base, aligned, recipe, selection, missing)
    _report_missing(missing, base, aligned, selection)
    _report_unused_patterns(recipe, aligned, selection)
    if not selection.problems and not any(plan.action == "edit" for plan in selection.tensors.values()):
        selection.problems.append("the recipe edits no tensor at all: every one is left out by --include, --exclude, --linear-only or alpha 0.")
    return selection


def _plan_tensor(name: str, base: Checkpoint, aligned: Checkpoint, recipe: Recipe, selection: Selection, missing: list[str]) -> TensorPlan:
    info = aligned.info(name)

    def copy(reason: str) -> TensorPlan:
        return TensorPlan(name, info, "copy", reason)

    base_name = counterpart(name, base)
    if base_name is None and is_legacy_buffer(info):
        return copy("constant buffer")
    if len(info.shape) < 2 or info.size == 0:
        if base_name is None:
            missing.append(name)
        elif base.info(base_name).shape != info.shape and not is_vocabulary(name):
            selection.problems.append(_shapes_differ(name, base, base_name, aligned))
        return copy("fewer than two dimensions")
    if info.dtype not in dtypes.EDITABLE:
        return copy(f"dtype {info.dtype} holds no weights")
    if base_name is None:
        missing.append(name)
        return copy("not in base")
    other = base.info(base_name)
    if other.shape != info.shape:
        if not is_vocabulary(name):
            selection.problems.append(_shapes_differ(name, base, base_name, aligned))
        else:
            selection.warnings.append(
                f"{name} is copied, not edited: base has {list(other.shape)} and aligned {list(info.shape)} "
                "(the vocabularies differ, so their rows can't be assumed to be the same tokens)."
            )
        return copy("vocabularies differ")
    if other.dtype not in dtypes.EDITABLE:
        selection.problems.append(f"tensor {name}: base stores {other.describe()}, aligned {info.describe()}; one of them holds no weights.")
        return copy("dtype")
    if recipe.include and not any(recipe.matches(pattern, name) for pattern in recipe.include):
        return copy("not included")
    if any(recipe.matches(pattern, name) for pattern in recipe.exclude):
        return copy("excluded")
    if recipe.linear_only and not _is_linear(name, info, aligned):
        return copy("not a linear layer")
    alpha = recipe.alpha_for(name)
    if alpha == 0:
        return copy("alpha 0")
    views = tuple(matrix_views(name, info.shape, aligned.config, recipe.fused))  # type: ignore[arg-type]
    return TensorPlan(name, info, "edit", "", base_name, recipe.rank_for(name), alpha, views)


def _is_linear(name: str, info: TensorInfo, aligned: Checkpoint) -> bool:
    return not is_vocabulary(name) and (len(info.shape) == 2 or is_expert_stack(name, info.shape, aligned.config))


def counterpart(name: str, base: Checkpoint) -> str | None:
    """The base tensor of the same name; for an untied output head over a tied base, the base's embedding is its head."""
    if name in base:
        return name
    if base.ties_embeddings and _OUTPUT_HEAD.search(name):
        embeddings = [other for other in base.names if re.search(r"(embed_tokens|wte|word_embeddings|embed_in)\.weight$", other)]
        if len(embeddings) == 1:
            return embeddings[0]
    return None


def _shapes_differ(name: str, base: Checkpoint, base_name: str, aligned: Checkpoint) -> str:
    return (
        f"tensor {name}: base has {list(base.info(base_name).shape)} ({base.title}/{base.home[base_name]}), "
        f"aligned has {list(aligned.info(name).shape)} ({aligned.title}/{aligned.home[name]}). The two are not of one architecture: "
        "give the checkpoint that aligned was trained from."
    )


def _report_missing(missing: list[str], base: Checkpoint, aligned: Checkpoint, selection: Selection) -> None:
    extra = [name for name in base.names if name not in aligned and not is_legacy_buffer(base.info(name))]
    if aligned.ties_embeddings:
        extra = [name for name in extra if not _OUTPUT_HEAD.search(name)]
    for names, there, lacking in ((missing, aligned, base), (extra, base, aligned)):
        if names:
            shown = ", ".join(names[:_MOST_NAMED]) + (f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else "")
            example = there.info(names[0])
            selection.problems.append(
                f"{len(names)} tensor(s) of {there.role} ({there.title}) are missing in {lacking.role} ({lacking.title}): {shown} "
                f"(the first is {example.describe()} in {there.title}/{there.home[names[0]]}; {lacking.role} has nothing of that name). "
                "Check that both are the same architecture and saved by the same library."
            )


def _report_unused_patterns(recipe: Recipe, aligned: Checkpoint, selection: Selection) -> None:
    for option, patterns in recipe.patterns().items():
        for pattern in patterns:
            if not any(recipe.matches(pattern, name) for name in aligned.names):
                selection.problems.append(f"{option} {pattern!r} matches no tensor of {aligned.title}; a name looks like {aligned.names[0]!r}.")
