"""What an inspection reads: the checkpoints, the tensors that are compared, and everything that can be said against it from headers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.adapter import is_adapter, open_model
from lox_merge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lox_merge.checkpoint.quantised.view import as_quantised, quantisation_problems
from lox_merge.checkpoint.safetensors_format import TensorInfo
from lox_merge.diagnostics.places import layer_of, module_kinds
from lox_merge.diagnostics.settings import InspectSettings
from lox_merge.errors import PlanError, SourceError
from lox_merge.jobs.factors import Factors
from lox_merge.jobs.harden import open_checkpoints
from lox_merge.jobs.layout import MatrixView, is_stack, is_transposed
from lox_merge.jobs.lox_edit import LoxEdit
from lox_merge.jobs.plan import pair_problems
from lox_merge.jobs.quantised import form_warnings
from lox_merge.jobs.select import counterpart, is_embedding, is_legacy_buffer, is_vocabulary, select_tensors
from lox_merge.maths.spectral import LARGEST_GRAM_SIDE
from lox_merge.wording import first_few

_MOST_NAMED = 8


@dataclass(frozen=True)
class Compared:
    """One tensor of aligned and its counterparts. views: its matrices; none for a vector.

    layer: ('model.layers', 3), None outside of layers. kind: 'q_proj', 'experts.gate_up_proj', 'embed_tokens', …
    """

    name: str
    info: TensorInfo
    base_name: str
    names: tuple[str, ...]
    views: tuple[MatrixView, ...] = ()
    transposed: bool = False
    linear: bool = False
    vocabulary: bool = False
    layer: tuple[str, int] | None = None
    kind: str = ""


@dataclass
class Sources:
    """Opened models and what will be compared. finetuned: (label, weights), in the order in which they were given."""

    base: Checkpoint
    aligned: Checkpoint
    finetuned: list[tuple[str, Checkpoint]]
    tensors: list[Compared]
    left_out: dict[str, str]
    warnings: list[str] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors that are read."""
        return sum(self.bytes_of(tensor) for tensor in self.tensors)

    def bytes_of(self, tensor: Compared) -> int:
        return sum(model.stored_bytes(name) for model, name in self._read(tensor))

    def made_bytes(self, tensor: Compared) -> int:
        """Bytes of memory that its weights take beside mapped files."""
        return sum(model.made_bytes(name) for model, name in self._read(tensor))

    def _read(self, tensor: Compared) -> list[tuple[Checkpoint, str]]:
        others = zip((model for _, model in self.finetuned), tensor.names, strict=True)
        return [(self.base, tensor.base_name), (self.aligned, tensor.name), *others]

    def fetch(self) -> None:
        """Makes every weight file that is read available on disk."""
        models = [self.base, self.aligned, *(model for _, model in self.finetuned)]
        homes = [dict.fromkeys(model.home[name] for model, name in found) for found in zip(*map(self._read, self.tensors), strict=True)]
        for model, home in zip(models, homes, strict=True):
            # Scales may lie in a file of their own; an adapter's base may be a model that is fetched as such.
            files = dict.fromkeys(file for each in home for role, file in model.weight_sources(each) if role == model.role)
            model.fetch(list(files))

    def close(self) -> None:
        for model in (self.base, self.aligned, *(model for _, model in self.finetuned)):
            model.close()


def open_sources(
    base: str | Path,
    aligned: str | Path,
    finetuned: Sequence[str | Path],
    settings: InspectSettings,
    *,
    factors: Factors | None = None,
    order_is_right: bool = False,
    cache_dir: Path | None = None,
) -> Sources:
    """Opens all models, headers only, and decides what is compared. Raises PlanError with every problem found."""
    pair: dict[str, Checkpoint] = {}
    others: list[Checkpoint] = []
    problems: list[str] = []
    try:
        pair = open_checkpoints({"base": base, "aligned": aligned}, cache_dir)
    except PlanError as error:
        problems += error.problems
    for place, source in enumerate(finetuned, 1):
        role = f"finetuned {place}" if len(finetuned) > 1 else "finetuned"
        try:
            if pair:
                others.append(as_quantised(open_model(source, role, pair["aligned"], cache_dir)))
            elif not is_adapter(source, role, cache_dir):
                open_checkpoint(source, role, cache_dir).close()  # for what is wrong with it, too
        except PlanError as error:
            problems += error.problems
        except SourceError as error:
            problems.append(str(error))
    if problems:
        raise PlanError(problems)
    first, second = pair["base"], pair["aligned"]
    problems += pair_problems(first, second, order_confirmed=order_is_right)
    problems += [problem for model in others for problem in quantisation_problems(model)]
    if problems:
        raise PlanError(problems)
    sources = _compared(first, second, others, settings)
    _check_triplets(sources, settings, factors)
    return sources


def _compared(base: Checkpoint, aligned: Checkpoint, finetuned: list[Checkpoint], settings: InspectSettings) -> Sources:
    selection = select_tensors({"base": base, "aligned": aligned}, settings.recipe, LoxEdit(settings.recipe))
    problems, warnings = list(selection.problems), [text.replace("copied, not edited", "left out") for text in selection.warnings]
    warnings += form_warnings([base, aligned, *finetuned])
    left_out: dict[str, str] = {}
    chosen: list[Compared] = []
    for name in (info.name for header in aligned.headers.values() for info in header.by_offset()):
        plan = selection.tensors[name]
        is_vector = plan.action == "copy" and plan.reason == "fewer than two dimensions"
        reason = "" if plan.action == "edit" else _vector_reason(name, base, aligned, settings) if is_vector else plan.reason
        if reason:
            left_out[name] = reason
            continue
        chosen.append(
            Compared(
                name,
                plan.info,
                plan.base_name or name,
                (),
                plan.views,
                is_transposed(name, plan.info.shape, aligned.config),
                linear=_is_linear(name, plan.info, aligned),
                vocabulary=is_vocabulary(name),
            )
        )
    kinds = module_kinds([tensor.name for tensor in chosen])
    tensors = []
    missing: list[list[str]] = [[] for _ in finetuned]
    for tensor in chosen:
        names, reason = [], ""
        for place, model in enumerate(finetuned):
            other = counterpart(tensor.name, model)
            if other is None:
                missing[place].append(tensor.name)
                continue
            names.append(other)
            info = model.info(other)
            if info.shape != tensor.info.shape:
                text = f"{tensor.name}: aligned has {list(tensor.info.shape)} ({aligned.title}), {model.role} has {list(info.shape)} ({model.title})"
                if is_vocabulary(tensor.name):
                    reason = "vocabularies differ"
                    warnings.append(f"{text}. It is left out: the vocabularies differ, so their rows can't be assumed to be the same tokens.")
                else:
                    problems.append(f"tensor {text}. The two are not of one architecture: give a model that was fine-tuned from aligned.")
            elif info.dtype not in dtypes.EDITABLE:
                problems.append(f"tensor {tensor.name}: {model.role} ({model.title}) stores {info.describe()}, which holds no weights.")
        if reason:
            left_out[tensor.name] = reason
        elif len(names) == len(finetuned):
            tensors.append(replace(tensor, names=tuple(names), layer=layer_of(tensor.name), kind=kinds[tensor.name]))
    for model, absent in zip(finetuned, missing, strict=True):
        problems += _missing(absent, aligned, model)
        extra = [name for name in model.names if name not in selection.tensors and not is_vocabulary(name) and not is_legacy_buffer(model.info(name))]
        problems += _missing(extra, model, aligned)
    if not problems and not any(tensor.views for tensor in tensors):
        problems.append(f"no matrix of {aligned.title} is left to compare; check --include, --exclude and the vocabularies.")
    if problems:
        raise PlanError(problems)
    return Sources(base, aligned, list(zip(_labels(finetuned), finetuned, strict=True)), tensors, left_out, warnings)


def _vector_reason(name: str, base: Checkpoint, aligned: Checkpoint, settings: InspectSettings) -> str:
    """Why a tensor of fewer than two dimensions is not compared; '' where it is."""
    recipe, info = settings.recipe, aligned.info(name)
    if name not in base or base.info(name).shape != info.shape:
        return "not in base"
    if info.size == 0 or info.dtype not in dtypes.EDITABLE or base.info(name).dtype not in dtypes.EDITABLE:
        return "holds no weights"
    if recipe.include and not any(recipe.matches(pattern, name) for pattern in recipe.include):
        return "not included"
    if any(recipe.matches(pattern, name) for pattern in recipe.exclude):
        return "excluded"
    return "not a linear layer" if recipe.linear_only else ""


def _is_linear(name: str, info: TensorInfo, aligned: Checkpoint) -> bool:
    """A linear layer or a stack of them, output heads included: no embedding table, no convolution, no stack of biases."""
    return not is_embedding(name) and not name.endswith("bias") and (len(info.shape) == 2 or is_stack(name, info.shape, aligned.config))


def _missing(names: list[str], there: Checkpoint, lacking: Checkpoint) -> list[str]:
    if not names:
        return []
    return [
        f"{len(names)} tensor(s) of {there.role} ({there.title}) are missing in {lacking.role} ({lacking.title}): {first_few(names, _MOST_NAMED)}. "
        "Give models of one architecture, saved by the same library."
    ]


def _labels(models: list[Checkpoint]) -> list[str]:
    """Titles, numbered where two are alike."""
    labels: list[str] = []
    for model in models:
        label, number = model.title, 2
        while label in labels:
            label, number = f"{model.title} ({number})", number + 1
        labels.append(label)
    return labels


def _check_triplets(sources: Sources, settings: InspectSettings, factors: Factors | None) -> None:
    """Raises RequestError for spectra that cannot be had: too large for a dense path, or not in the factors."""
    problems = []
    for tensor in sources.tensors:
        for view in tensor.views:
            short = min(view.shape)
            if factors is None and short > LARGEST_GRAM_SIDE and settings.triplets_of(short) == short:
                problems.append(
                    f"tensor {tensor.name} ({list(view.shape)}) needs its whole spectrum, whose short side is above {LARGEST_GRAM_SIDE:,}; "
                    "leave out --full-spectrum and fractions or ranks above a fifth, or the tensor (--exclude)."
                )
            label = tensor.name + view.label
            if factors is None or label in factors.document["non_finite"]:
                continue  # what is not finite is refused, or left out, when its delta is formed
            record = factors.matrices.get((tensor.name, view.label))
            if record is None:
                problems.append(
                    f"{factors.path.name} holds no factors of {label}; decompose again with the settings of this command, "
                    "or leave it out (--exclude)."
                )
            elif not record.complete:
                factors.require(settings.rank_of(short))
    if problems:
        raise PlanError(problems[:_MOST_NAMED])
