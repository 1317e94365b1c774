"""The dtype of a merge: mergekit promotes all models to a common one and keeps it; the output is to have the mirrored model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from mergekit.common import dtype_from_name
from mergekit.config import MergeConfiguration

from lox_merge.checkpoint.dtypes import EDITABLE, OUTPUT_DTYPES, torch_dtype
from lox_merge.jobs.plan import Plan

if TYPE_CHECKING:
    from lox_merge.mergekit.plan import PlannedTensor


def settle_dtype(config: MergeConfiguration, files: Plan, tensors: Sequence[PlannedTensor]) -> tuple[MergeConfiguration, bool, list[str]]:
    """The configuration with out_dtype set where the models differ in dtype; whether mergekit rounds the edits itself;
    and what cannot be done, one line each."""
    problems = []
    pairs = [
        (tensor, torch_dtype(other.info(source).dtype), torch_dtype(files.mirrored.info(source).dtype))
        for tensor in tensors
        for source in tensor.sources
        for other in files.others
        if source in other and files.mirrored.info(source).dtype in EDITABLE and other.info(source).dtype in EDITABLE
    ]
    promoted = any(torch.promote_types(base, aligned) != aligned for _, base, aligned in pairs)
    if promoted and not (config.dtype or config.out_dtype):
        kinds = sorted({str(aligned).removeprefix("torch.") for _, _, aligned in pairs})
        if len(kinds) > 1:
            problems.append(
                f"{files.others[0].role} and {files.mirrored.role} have other dtypes, and {files.mirrored.role} itself has "
                f"{' and '.join(kinds)}, which mergekit cannot keep apart. "
                f"Set out_dtype to one of {', '.join(OUTPUT_DTYPES)}, or use lox-merge harden."
            )
        else:
            config = config.model_copy(update={"out_dtype": kinds[0]})
    written, loaded = dtype_from_name(config.out_dtype), dtype_from_name(config.dtype)
    rounded = False
    for tensor, base, aligned in pairs:
        kernel = loaded or torch.promote_types(base, aligned)
        rounded |= tensor.edited and written not in (None, kernel)
        if tensor.edited and tensor.settings["rounding"] != "nearest" and written not in (None, kernel):
            problems.append(
                f"rounding {tensor.settings['rounding']!r} has no effect where mergekit computes in {kernel} and rounds to {written} itself. "
                "Leave dtype and out_dtype out, with both models in one dtype, or use lox-merge harden."
            )
            break
        if tensor.edited and tensor.settings["rank"] == "noise-floor" and kernel != aligned:
            problems.append(
                f"rank 'noise-floor' is judged by the dtype that aligned is stored in ({aligned}), but mergekit computes in {kernel}. "
                "Leave dtype out, with both models in one dtype, or use lox-merge harden."
            )
            break
    return config, rounded, problems
