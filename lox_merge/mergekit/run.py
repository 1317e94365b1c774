"""A merge by one of our methods, from configuration to finished folder: plan, merge beside the target, check, complete, rename.

mergekit writes straight into the output folder, and takes config, tokenizer and chat template from `base_model`, which is
the pre-trained model here. So it writes into a folder of its own, which becomes the output only when it is a whole model.
"""

from __future__ import annotations

import logging
import math
import shutil
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

from lox_merge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lox_merge.checkpoint.files import find_source
from lox_merge.errors import LoxMergeError, LoxMergeWarning, NonFiniteDeltaError, NumericalError, OutputError
from lox_merge.jobs.harden import WANTED_GAIN
from lox_merge.jobs.output_folder import MANIFEST
from lox_merge.jobs.plan import check_disk, output_config
from lox_merge.maths.edits import Realised
from lox_merge.mergekit.card import merge_card, without_paths
from lox_merge.mergekit.config import one_line, read_configuration, references
from lox_merge.mergekit.plan import MergePlan, plan_merge, warn
from lox_merge.mergekit.plugin import realised_updates

LOG = logging.getLogger(__name__)
_CONFIGURATION = "mergekit_config.yml"
_TOKENIZER_PREFIXES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab.", "merges.txt", "chat_template", "spiece.model")


@dataclass(frozen=True)
class MergeResult:
    """A finished merge. realised_gain: Σ⟨R,T⟩/Σ‖T‖² over all edits, R what was written of the intended T; None where the
    rounding to the output dtype is mergekit's own and was not seen."""

    out: Path
    plan: MergePlan
    realised_gain: float | None

    @property
    def edited(self) -> int:
        return sum(tensor.edited for tensor in self.plan.tensors)

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        tensors = [{"name": tensor.name, "edited": tensor.edited, **tensor.settings} for tensor in self.plan.tensors]
        return {
            "command": "yaml",
            "method": self.plan.config.merge_method,
            "output": self.out.name,
            "sources": {role: checkpoint.source.identity() for role, checkpoint in self.plan.files.checkpoints.items()},
            "realised_gain": self.realised_gain,
            "warnings": self.plan.warnings,
            "tensors": tensors,
        }


def merge(config_file: Path, out: Path, options: MergeOptions, *, overwrite: bool = False, order_is_right: bool = False) -> MergeResult:
    """Carries out a configuration whose method is one of ours. Raises RequestError or PlanError before anything is written,
    LoxMergeError afterwards; in both cases there is no folder `out` that was not there before."""
    raw, config = read_configuration(config_file)
    out = out.resolve()
    check_target(out, overwrite=overwrite)
    plan = plan_merge(raw, config, out, options, order_is_right=order_is_right)
    check_disk(plan.files)
    warn(plan)
    partial = out.with_name(f"{out.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        with realised_updates() as realised:
            _run(plan, partial, options)
        _check_tensors(plan, partial)
        _complete(plan, raw, partial, out.name, options)
        _put_in_place(partial, out)
    except OSError as error:
        raise LoxMergeError(f"the output {out.name} could not be written: {error.strerror or error}. Nothing was kept.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return MergeResult(out, plan, None if plan.rounded_by_mergekit else _gain(realised))


def _gain(realised: list[tuple[str, Realised]]) -> float | None:
    """Share of the whole model's edit that was written; warns where much of it was not."""
    known = [(name, update, update.gain) for name, update in realised if update.gain is not None]
    intended = math.fsum(update.intended_norm**2 for _, update, _ in known)
    if not intended:
        return None
    gain = math.fsum(kept * update.intended_norm**2 for _, update, kept in known) / intended
    if gain < WANTED_GAIN:
        worst = min(known, key=lambda entry: entry[2])
        warnings.warn(
            f"rounding to the output dtype kept only {gain:.2f} of the edit (gain, 1 is all; the worst is {worst[0]} with {worst[2]:.2f}). "
            "Remedies: `rounding: feedback` among the parameters, or `out_dtype: float32`.",
            LoxMergeWarning,
            stacklevel=3,
        )
    return gain


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raises OutputError when `out` is in the way: a file, or a folder with content that may not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise OutputError(f"the output {out} is a file. Choose another name.")
    if not overwrite:
        raise OutputError(f"the output {out} exists and is not empty. Choose another folder, or pass --overwrite to replace it.")
    if not any((out / name).is_file() for name in (_CONFIGURATION, MANIFEST)):
        raise OutputError(
            f"--overwrite replaces only folders that mergekit or lox-merge wrote, and {out} has no {_CONFIGURATION}. Remove it yourself."
        )


def _run(plan: MergePlan, partial: Path, options: MergeOptions) -> None:
    # Card and tokenizer would be the pre-trained model's, and the card names this machine's folders.
    own = options.model_copy(update={"write_model_card": False, "copy_tokenizer": False})
    try:
        run_merge(plan.config.model_copy(deep=True), str(partial), options=own)
    except NonFiniteDeltaError as error:
        names = "; ".join(f"{name}: {count:,} of them" for name, count in error.counts.items())
        raise NumericalError(
            f"NaN or Inf in a delta ({names}). One of the checkpoints is damaged or overflowed; nothing was kept. Repair it, "
            "or leave the tensor as in aligned with alpha: [{filter: its-name, value: 0}, {value: 1.25}]."
        ) from error
    except (LoxMergeError, OSError):
        raise
    except Exception as error:
        LOG.info("mergekit failed", exc_info=error)
        raise LoxMergeError(f"mergekit failed: {one_line(error)}. Nothing was kept; add -v for the traceback.") from error


def _check_tensors(plan: MergePlan, partial: Path) -> None:
    """The written headers against the plan: every tensor of the aligned model is there, in its shape."""
    with warnings.catch_warnings():
        # --no-safe-serialization was the user's wish; that such weights are read again is no news.
        warnings.simplefilter("ignore", LoxMergeWarning)
        written = open_checkpoint(partial, "output")
    problems = []
    for tensor in plan.tensors:
        infos = [plan.mirrored.info(source) for source in tensor.sources]
        if infos and tensor.name not in written:
            problems.append(f"{tensor.name} is missing")
        elif len(infos) == 1 and written.info(tensor.name).shape != infos[0].shape:
            problems.append(f"{tensor.name} is {list(written.info(tensor.name).shape)} instead of {list(infos[0].shape)}")
        elif infos and written.info(tensor.name).size != sum(info.size for info in infos):
            problems.append(f"{tensor.name} does not hold all of {', '.join(tensor.sources)}")
    written.close()
    if problems:
        raise LoxMergeError(
            f"mergekit's output is not the whole model: {'; '.join(problems[:8])}{' …' if len(problems) > 8 else ''}. "
            "Nothing was kept. Use lox-merge harden, which keeps every tensor."
        )


def _complete(plan: MergePlan, raw: Mapping[str, Any], partial: Path, name: str, options: MergeOptions) -> None:
    """Replaces everything beside the weights by the aligned model's files, and adds the card."""
    for path in partial.iterdir():
        if path.suffix not in (".safetensors", ".bin") and not path.name.endswith(".index.json"):
            path.unlink()
    changed = output_config(plan.files)
    for file, path in _side_files(plan, options).items():
        if options.copy_tokenizer or not file.startswith(_TOKENIZER_PREFIXES):
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            if file == "config.json" and changed is not None:
                (partial / file).write_bytes(changed)
            else:
                shutil.copyfile(path, partial / file)
    if options.write_model_card:
        configuration = yaml.safe_dump(without_paths(raw), sort_keys=False, allow_unicode=True)
        (partial / _CONFIGURATION).write_text(configuration, encoding="utf-8")
        (partial / "README.md").write_text(merge_card(plan, configuration, name), encoding="utf-8")


def _side_files(plan: MergePlan, options: MergeOptions) -> dict[str, Path]:
    """Name to file. A merged adapter's folder has weights and config only: tokenizer and code come from the model under
    it, and what training added to the tokenizer from the adapter itself."""
    found: dict[str, Path] = {}
    reference, cache = list(references(plan.config).values())[-1], Path(options.transformers_cache) if options.transformers_cache else None
    if reference.lora is not None:
        _add(found, open_checkpoint(str(reference.model), plan.mirrored.role, cache))
    _add(found, plan.mirrored)
    if reference.lora is not None:
        adapter = find_source(str(reference.lora), "adapter", cache)
        found |= {file: adapter.path(file) for file in adapter.names() if file.startswith(_TOKENIZER_PREFIXES)}
    return found


def _add(found: dict[str, Path], checkpoint: Checkpoint) -> None:
    checkpoint.fetch(checkpoint.side_files())
    found |= {file: checkpoint.source.path(file) for file in checkpoint.side_files()}


def _put_in_place(partial: Path, out: Path) -> None:
    if not out.exists():
        partial.rename(out)
        return
    old = out.with_name(f"{out.name}.replaced-{uuid.uuid4().hex[:8]}")
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)
