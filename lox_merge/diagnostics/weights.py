"""What alignment did to the weights, and what fine-tuning undid: the inspection as one function."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError

from lox_merge._version import __version__
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.diagnostics.groups import all_groups
from lox_merge.diagnostics.notes import notes, reversals
from lox_merge.diagnostics.one_pass import Measured, measure_all
from lox_merge.diagnostics.records import matrix_record, vector_record
from lox_merge.diagnostics.results import Findings
from lox_merge.diagnostics.settings import InspectSettings
from lox_merge.diagnostics.sources import Sources, open_sources
from lox_merge.diagnostics.summary import as_html
from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.jobs.beforehand import resolve_device
from lox_merge.jobs.engine import Progress
from lox_merge.jobs.factors import Factors
from lox_merge.jobs.harden import Silent
from lox_merge.jobs.quantised import form_of
from lox_merge.maths.geometry import REVERTING_COSINE

if TYPE_CHECKING:
    import pandas

FORMAT = 1


@dataclass(frozen=True, repr=False)
class Inspection(Findings):
    """A finished inspection: every figure as an attribute, a table in a notebook, a frame, and the JSON.

    document: the JSON as docs/inspect.md describes it, plain values only.
    """

    document: dict[str, Any]

    @classmethod
    def of(cls, document: dict[str, Any]) -> Inspection:
        """The same of what `--json` wrote. Raises RequestError for anything else."""
        try:
            return cls(**vars(TypeAdapter(Findings).validate_python(document)), document=document)
        except ValidationError as error:
            first = error.errors()[0]
            raise RequestError(
                f"this is not what `lox-merge inspect --json` writes ({'.'.join(map(str, first['loc']))}: {first['msg']}). "
                "Run the inspection again with this version of lox-merge."
            ) from error

    def __repr__(self) -> str:
        base, aligned = self.titles
        finetuned = f"; fine-tuned: {', '.join(self.labels)}" if self.labels else ""
        return f"<Inspection of {base} → {aligned}{finetuned}; {len(self.matrices)} matrices>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return as_html(self.document)

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return self.document

    def to_pandas(self) -> pandas.DataFrame:
        """One row per matrix: columns as in its record, those of aligned and of each fine-tuned model prefixed by its name.

        Raises RequestError where pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise RequestError(f"to_pandas() needs the package pandas ({error}). Install it: pip install pandas.") from error
        rows = []
        for record in self.document["matrices"]:
            row = {name: record[name] for name in ("name", "part", "layer", "kind", "linear", "k")}
            row |= {"d_out": record["shape"][0], "d_in": record["shape"][1]}
            for label, figures in zip(["aligned", *self.labels], [record["aligned"], *record["finetuned"]], strict=True):
                row |= {f"{label}.{name}": figures[name] for name in ("norm", "relative_norm", "r", "r_expected", "noise_floor_rank")}
                row |= {f"{label}.{name}": value for name, value in figures["effective_ranks"].items()}
                row |= {f"{label}.energy_kept_{entry['fraction']:g}": entry["top"] for entry in figures["energy_kept"]}
                row |= {f"{label}.{name}": figures[name] for name in ("ratio",) if name in figures}
                row |= {f"{label}.{name}": value for name, value in figures.get("cosines", {}).items() if name != "band"}
                row |= {f"{label}.mso_{entry['eta']:g}": entry["mso"] for entry in figures.get("mso", ())}
            rows.append(row)
        return pandas.DataFrame(rows)


def plan_inspection(
    base: str | Path,
    aligned: str | Path,
    finetuned: Sequence[str | Path] = (),
    *,
    settings: InspectSettings | None = None,
    factors: Factors | None = None,
    order_is_right: bool = False,
    cache_dir: Path | None = None,
) -> Sources:
    """Preflight from headers alone. Raises RequestError with everything that is wrong."""
    chosen = settings or InspectSettings()
    if factors is not None and chosen.full_spectrum:
        raise RequestError(f"--full-spectrum computes every delta anew, and {factors.path.name} holds {factors.rank} triplets. Give one of the two.")
    sources = open_sources(base, aligned, finetuned, chosen, factors=factors, order_is_right=order_is_right, cache_dir=cache_dir)
    if factors is not None:
        factors.check(sources.base, sources.aligned)
    return sources


def inspect(
    base: str | Path,
    aligned: str | Path,
    finetuned: Sequence[str | Path] | str | Path = (),
    *,
    settings: InspectSettings | None = None,
    factors: str | Path | None = None,
    device: str = "auto",
    order_is_right: bool = False,
    cache_dir: Path | None = None,
) -> Inspection:
    """Measures Δ_align, and Δ_ft of every fine-tuned model, in one pass over their files; every ratio with what chance would give.

    base, aligned, finetuned: folders or Hub ids `org/name[@revision]`. factors: a file that `lox-merge decompose` wrote for this pair;
    then no SVD of Δ_align is taken. Raises RequestError for a wrong request, NumericalError for NaN or Inf.
    """
    others = [finetuned] if isinstance(finetuned, (str, Path)) else list(finetuned)
    known = None if factors is None else Factors.open(factors)
    try:
        sources = plan_inspection(base, aligned, others, settings=settings, factors=known, order_is_right=order_is_right, cache_dir=cache_dir)
        return execute_inspection(sources, settings or InspectSettings(), factors=known, device=device)
    finally:
        if known is not None:
            known.close()


def execute_inspection(
    sources: Sources, settings: InspectSettings, *, factors: Factors | None = None, device: str = "auto", progress: Progress | None = None
) -> Inspection:
    """Carries out a plan; see `inspect`."""
    started = time.perf_counter()
    target = resolve_device(device)
    sources.fetch()
    for text in sources.warnings:
        warnings.warn(text, LoxMergeWarning, stacklevel=3)
    try:
        measured = measure_all(sources, settings, target, progress or Silent(), factors)
    finally:
        sources.close()
    if all(matrix.measures.rank == 0 for matrix in measured.matrices):
        raise RequestError(
            f"all {len(measured.matrices)} deltas are zero: base ({sources.base.title}) and aligned ({sources.aligned.title}) hold the same "
            "weights. Give the model that aligned was trained from as base."
        )
    document = _document(sources, measured, settings, factors, target)
    return Inspection.of(document | {"seconds": time.perf_counter() - started})


def _described(model: Checkpoint) -> dict[str, Any]:
    return model.source.identity() | form_of(model)


def _document(sources: Sources, measured: Measured, settings: InspectSettings, factors: Factors | None, device: torch.device) -> dict[str, Any]:
    labels = [label for label, _ in sources.finetuned]
    groups = all_groups(measured, len(labels), settings)
    backwards = reversals(measured, len(labels))
    left_out = sources.left_out | dict.fromkeys(measured.left_out, "NaN or Inf in a delta")
    return {
        "command": "inspect",
        "format": FORMAT,
        "tool": {"name": "lox-merge", "version": __version__, "torch": torch.__version__},
        "seconds": None,
        "device": device.type,
        "settings": settings.to_json() | {"factors": None if factors is None else factors.path.name},
        "sources": {
            "base": _described(sources.base),
            "aligned": _described(sources.aligned),
            "finetuned": [{"label": label, **_described(model)} for label, model in sources.finetuned],
        },
        "labels": labels,
        "warnings": sources.warnings,
        "notes": notes(measured, labels, settings),
        "reversals": backwards,
        "reverting": [label for label, angle in zip(labels, backwards, strict=True) if angle is not None and angle >= REVERTING_COSINE],
        "reverting_cosine": REVERTING_COSINE,
        **groups,
        "matrices": [matrix_record(matrix, settings) for matrix in measured.matrices],
        "vectors": [vector_record(vector) for vector in measured.vectors],
        "left_out": [{"name": name, "reason": reason} for name, reason in left_out.items()],
    }
