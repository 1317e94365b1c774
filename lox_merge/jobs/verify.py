"""Is an output what its manifest says? First its files and structure, then its weights, recomputed from the sources."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lox_merge.checkpoint import dtypes
from lox_merge.checkpoint.adapter import is_adapter, open_adapter, open_factors_only
from lox_merge.checkpoint.checkpoint import Checkpoint, open_checkpoint
from lox_merge.checkpoint.files import FileSource, find_source
from lox_merge.checkpoint.quantised.view import as_quantised
from lox_merge.checkpoint.weights import tensor_bytes
from lox_merge.errors import LoxMergeError, RequestError, SourceError
from lox_merge.jobs.atomic import sha256_of
from lox_merge.jobs.edit import Edit, MatrixOutcome
from lox_merge.jobs.engine import Progress
from lox_merge.jobs.executors.sizing import crew_of_each
from lox_merge.jobs.manifest import FORMAT, header_hashes
from lox_merge.jobs.methods import recorded_edit
from lox_merge.jobs.output_folder import MANIFEST, WORK_FOLDER
from lox_merge.jobs.plan import Plan, make_plan
from lox_merge.jobs.recorded import manifest_damage
from lox_merge.jobs.select import TensorPlan
from lox_merge.jobs.store import check_holds_weights
from lox_merge.jobs.triplets import recorded_triplets
from lox_merge.jobs.verify_adapter import check_structure, recompute
from lox_merge.jobs.verify_values import code_difference, copy_difference, edit_difference
from lox_merge.jobs.work import Crew

# Figures of the manifest against recomputed ones: float32 sums in another order, and the tolerance of the SVD.
_FIGURE_TOLERANCE = 5e-3


@dataclass
class Verification:
    """What was compared. problems: one line each, empty for a sound output. sources_checked: whether weights were recomputed.

    rounded_apart: tensors whose values differ by one unit in the last place here and there, as another machine makes them.
    """

    output: str
    files: int = 0
    tensors: int = 0
    tensors_recomputed: int = 0
    rounded_apart: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    sources_checked: bool = False

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        return {"command": "verify", "ok": self.ok, **asdict(self)}


def verify(
    out: str | Path,
    *,
    base: str | Path | None = None,
    aligned: str | Path | None = None,
    finetuned: str | Path | None = None,
    sample: int | None = None,
    seed: int = 0,
    offline: bool = False,
    device: torch.device | None = None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compares an output (folder or Hub id) with its manifest and, unless `offline`, with its sources and recipe.

    base, aligned, finetuned: where the sources are; Hub sources are found by the commits in the manifest, local ones must be given.
    sample: recompute this many tensors, drawn with `seed`, instead of all. Raises RequestError or SourceError where there is
    nothing to verify or a source is not to be had; what differs is in the result's problems.
    """
    given = {"base": base, "aligned": aligned, "finetuned": finetuned}
    source = find_source(out, "output", cache_dir)
    check_holds_weights(source)
    adapter = is_adapter(source)
    output = open_factors_only("output", source) if adapter else open_checkpoint(source, "output")
    manifest = _read_manifest(output)
    result = Verification(output.title)
    _check_files(output, manifest, result)
    recipe, edit = recorded_edit(manifest)
    if adapter:
        result.tensors = len(output.names)
        result.problems += check_structure(output, manifest)
    else:
        _check_structure(output, manifest, edit, result)
    if unused := [role for role, place in given.items() if place is not None and role not in edit.roles]:
        raise RequestError(f"{output.title} was made from {' and '.join(edit.roles)}: it has no {unused[0]} checkpoint. Leave out --{unused[0]}.")
    if offline or result.problems:
        output.close()
        return result
    sources = _open_sources({role: given[role] for role in edit.roles}, manifest, cache_dir)
    _check_sources(sources, manifest, result)
    if result.ok:
        # A place that is never written: the plan wants one, and whatever has a known name there may be somebody else's.
        with tempfile.TemporaryDirectory(prefix="lox-merge-verify-") as place:
            plan = make_plan(sources, Path(place) / "out", recipe, edit, order_confirmed=True, form="adapter" if adapter else "model")
        plan.triplets = recorded_triplets(manifest["job"].get("factors"), plan.base, plan.aligned, recipe)
        if adapter:
            result.tensors_recomputed, found = recompute(output, plan, manifest, sample, seed, device or torch.device("cpu"), progress)
            result.problems += found
        else:
            _recompute(output, plan, manifest, result, sample, seed, device or torch.device("cpu"), progress)
        result.sources_checked = True
    for checkpoint in (output, *sources.values()):
        checkpoint.close()
    return result


def _read_manifest(output: Checkpoint) -> dict[str, Any]:
    manifest = output.json(MANIFEST)
    if manifest is None:
        raise RequestError(f"{output.title} has no {MANIFEST}: it is no finished output of lox-merge, and there is nothing to verify it against.")
    if manifest.get("format") != FORMAT:
        raise RequestError(
            f"{output.title}/{MANIFEST} has format {manifest.get('format')!r}; this version reads {FORMAT}. Use the version that wrote it."
        )
    missing = {"job", "sources", "output", "tensors", "summary"} - manifest.keys()
    if missing:
        raise RequestError(f"{output.title}/{MANIFEST} is incomplete: it lacks {', '.join(sorted(missing))}. Make the output again.")
    damage = manifest_damage(manifest)
    if damage:
        raise RequestError(f"{output.title}/{MANIFEST} is damaged ({damage}). Restore it, or make the output again.")
    return manifest


def _check_files(output: Checkpoint, manifest: Mapping[str, Any], result: Verification) -> None:
    """Every file of the manifest is there with its hash, and no weight file is there that it does not know."""
    source: FileSource = output.source
    expected = {entry["file"]: entry["sha256"] for entry in manifest["output"]["shards"]} | manifest["output"]["files"]
    present = source.names()
    source.fetch([file for file in expected if file in present])
    for file, digest in expected.items():
        if file not in present:
            result.problems.append(f"{file} is missing")
        elif sha256_of(source.path(file)) != digest:
            result.problems.append(f"{file} is not what was written: its sha256 differs from the manifest's")
        result.files += 1
    unknown = [file for file in present if file not in expected and file.endswith((".safetensors", ".bin", ".index.json"))]
    result.problems += [f"{file} is not in the manifest" for file in unknown]
    if any(file.startswith(WORK_FOLDER + "/") for file in present):
        result.problems.append(f"{WORK_FOLDER} is there: the output is being written, or was interrupted")


def _check_structure(output: Checkpoint, manifest: Mapping[str, Any], edit: Edit, result: Verification) -> None:
    """Tensor names, shapes and dtypes of the files are the manifest's, and its summary follows from its own entries."""
    recorded = {tensor["name"]: tensor for tensor in manifest["tensors"]}
    result.tensors = len(recorded)
    for name in output.names:
        info, record = output.info(name), recorded.get(name)
        if record is None:
            result.problems.append(f"tensor {name} is in {output.home[name]}, but not in the manifest")
        elif [record["dtype"], record["shape"]] != [info.dtype, list(info.shape)]:
            result.problems.append(f"tensor {name} is {info.describe()}, the manifest says {record['dtype']} {record['shape']}")
    result.problems += [f"tensor {name} of the manifest is in no file" for name in recorded if name not in output]
    if edit.summary(manifest["tensors"]) != manifest["summary"]:
        result.problems.append("the manifest was edited: its summary does not follow from its tensors")


def _open_sources(given: Mapping[str, str | Path | None], manifest: Mapping[str, Any], cache_dir: Path | None) -> dict[str, Checkpoint]:
    opened: dict[str, Checkpoint] = {}
    for role, where in given.items():
        place = _place(role, where, manifest)
        if manifest["sources"][role].get("form") == "adapter":
            # That the adapter fits this base was decided when the output was made; hashes say whether both are still the same.
            opened[role] = open_adapter(place, role, list(opened.values())[-1], cache_dir, base_is_right=True)
        else:
            opened[role] = as_quantised(open_checkpoint(place, role, cache_dir))
    return opened


def _place(role: str, given: str | Path | None, manifest: Mapping[str, Any]) -> str | Path:
    recorded = manifest["sources"][role]
    if given is None and recorded["kind"] != "hub":
        raise SourceError(
            f"{role}: the manifest names the local folder {recorded['name']!r}; say where it is with --{role}, or pass --offline to check "
            "hashes and structure only."
        )
    return given if given is not None else f"{recorded['name']}@{recorded['commit']}"


def _check_sources(sources: Mapping[str, Checkpoint], manifest: Mapping[str, Any], result: Verification) -> None:
    for checkpoint in sources.values():
        if header_hashes(checkpoint) != manifest["job"][checkpoint.role]["headers"]:
            result.problems.append(f"{checkpoint.role}: {checkpoint.title} is not the checkpoint that was used (its headers differ)")
            continue
        recorded = manifest["sources"][checkpoint.role]
        if checkpoint.source.identity().get("config_sha256") != recorded.get("config_sha256"):
            result.problems.append(f"{checkpoint.role}: adapter_config.json of {checkpoint.title} is not the file that was used (its sha256 differs)")
        files = recorded["files"]
        checkpoint.fetch(list(files))
        for file, entry in files.items():
            if sha256_of(checkpoint.source.path(file)) != entry["sha256"]:
                result.problems.append(f"{checkpoint.role}: {file} of {checkpoint.title} is not the file that was used (its sha256 differs)")


def _recompute(
    output: Checkpoint,
    plan: Plan,
    manifest: Mapping[str, Any],
    result: Verification,
    sample: int | None,
    seed: int,
    device: torch.device,
    progress: Progress | None,
) -> None:
    recorded = {tensor["name"]: tensor for tensor in manifest["tensors"]}
    chosen = plan.tensors
    if sample is not None and sample < len(chosen):
        chosen = random.Random(seed).sample(chosen, sample)
    # As many cores a matrix as the engine takes: the number decides the order of sums, and so the bytes.
    crew = Crew(device, crew_of_each(plan, device, 1))
    with crew.threads():
        for tensor in chosen:
            if tensor.written not in output:
                result.problems.append(f"tensor {tensor.written} of {plan.mirrored.role} is not in the output")
                continue
            _compare(plan, tensor, output, recorded[tensor.written], result, device)
            result.tensors_recomputed += 1
            if progress:
                progress.advance(output.info(tensor.written).bytes)


def _compare(plan: Plan, tensor: TensorPlan, output: Checkpoint, record: Mapping[str, Any], result: Verification, device: torch.device) -> None:
    """One tensor made again from the sources, against the output's bytes and the manifest's figures."""
    name = tensor.written
    before = plan.stored(tensor)
    if output.info(name).shape != before.shape:
        result.problems.append(
            f"tensor {name} is {output.info(name).describe()}, in {plan.mirrored.role} {dtypes.code_of(before.dtype)} {list(before.shape)}"
        )
        return
    written = output.tensor(name)
    keeps_form = bool(tensor.stored and tensor.action == "edit")
    unedited = plan.mirrored.tensor(tensor.name) if keeps_form else before

    def made_again(dtype: torch.dtype) -> tuple[Tensor, list[MatrixOutcome]]:
        out = unedited.to(dtype, copy=True).contiguous()
        if tensor.action != "edit":
            return out, []
        stored = {role: checkpoint.tensor(tensor.name_in(role)) for role, checkpoint in plan.checkpoints.items()}
        outcomes = []
        for view in tensor.views:
            sources = {role: view.select(values) for role, values in stored.items()}
            outcomes.append(plan.edit.matrix(sources, view.select(out), view, tensor, device, plan.triplets, plan.grid(tensor, view)))
        return out, outcomes

    expected, outcomes = made_again(torch.float32 if keeps_form else dtypes.torch_dtype(output.info(name).dtype))
    edited = any(outcome.changed for outcome in outcomes)
    if keeps_form:
        assert plan.requantised is not None
        expected = plan.requantised.encode(tensor.name, expected)
    if tensor_bytes(written) != tensor_bytes(expected):
        difference = _difference(plan, tensor, written, expected, unrounded=(lambda: made_again(torch.float32)[0]) if edited else None)
        if difference:
            result.problems.append(f"tensor {name} ({output.home[name]}) is not what the recipe gives: {difference}")
        else:
            result.rounded_apart.append(name)
    if edited != (record["action"] == "edited"):
        result.problems.append(f"the manifest calls tensor {name} {record['action']}, which it is not")
    elif edited and not _same_figures(record.get("matrices", []), [outcome.to_json() for outcome in outcomes]):
        result.problems.append(f"the manifest's figures of tensor {name} are not those of its matrices")


def _difference(plan: Plan, tensor: TensorPlan, written: Tensor, expected: Tensor, *, unrounded: Callable[[], Tensor] | None) -> str:
    """What differs, "" for what another order of sums explains. unrounded: see `edit_difference`; None where nothing was computed."""
    if tensor.stored and tensor.action == "edit":
        assert plan.requantised is not None
        unpacked = plan.requantised.quantised[tensor.name].unpacked
        return code_difference(unpacked(written), unpacked(expected))
    if unrounded is None:
        return copy_difference(written, expected)
    recipe = plan.recipe
    return edit_difference(written, expected, plan.stored(tensor), unrounded, tolerance=recipe.tolerance, rounding=recipe.rounding)


def _same_figures(recorded: list[Any], recomputed: list[Any]) -> bool:
    """Equal structure, and numbers equal to _FIGURE_TOLERANCE. Certificates depend on rounding and are not compared."""
    return _same([{**entry, "certificate": None} for entry in recorded], [{**entry, "certificate": None} for entry in recomputed])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_FIGURE_TOLERANCE, abs_tol=1e-12)
    return bool(one == other)


def raise_for_problems(result: Verification) -> None:
    """Raises LoxMergeError (exit code 1) that lists the problems of a verification, if there are any."""
    if result.problems:
        shown = "\n".join(f"  {i}. {problem}" for i, problem in enumerate(result.problems[:20], 1))
        more = f"\n  … and {len(result.problems) - 20} more" if len(result.problems) > 20 else ""
        raise LoxMergeError(f"{result.output} is not what its manifest says:\n{shown}{more}")
