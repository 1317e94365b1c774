"""Inspections against numpy in float64 on tiny models of several layouts; wrong requests; the command line; the toy pair."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RunCli
from safetensors.torch import load_file, save_file
from tiny_models import make_pair, read_tensors

from lox_merge import InspectSettings, inspect
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.cli.inspect import inspect_command
from lox_merge.diagnostics.places import layer_of, module_kinds
from lox_merge.diagnostics.weights import execute_inspection, plan_inspection
from lox_merge.errors import LoxMergeWarning, NumericalError, PlanError, RecipeError, RequestError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.harden import harden, plan_hardening
from lox_merge.jobs.orientation import is_transposed
from lox_merge.jobs.recipe import Recipe
from lox_merge.lab.attacks import benign_attack
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.lab.language import new_task
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import draw_requests
from lox_merge.maths.precision import rounding_noise_edge
from lox_merge.safety.attack import AttackSettings, fine_tune
from lox_merge.safety.attack_data import load_attack
from lox_merge.safety.dispersion import Dispersion
from lox_merge.safety.loading import load_model

Change = Callable[[str, torch.Tensor], torch.Tensor]
ETAS = (0.1, 0.5, 0.9, 0.99)
Matrices = dict[tuple[str, str], np.ndarray]


def rewritten(folder: Path, to: Path, change: Change) -> Path:
    """A copy of a checkpoint with every tensor changed; dtypes kept."""
    shutil.copytree(folder, to)
    for file in sorted(to.glob("*.safetensors")):
        save_file({name: change(name, values).to(values.dtype).contiguous() for name, values in load_file(file).items()}, file, {"format": "pt"})
    return to


def fine_tuned(aligned: Path, to: Path, seed: int = 1, size: float = 0.01) -> Path:
    generator = torch.Generator().manual_seed(seed)
    return rewritten(aligned, to, lambda _name, values: values.float() + size * torch.randn(values.shape, generator=generator))


def stored_matrices(architecture: str, name: str, values: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices of a tensor as (d_out, d_in), cut out by hand."""
    if values.ndim == 3 and "expert" in name:
        for number, expert in enumerate(values):
            if architecture == "gpt_oss" and "gate_up_proj" in name:
                yield f"[{number}].gate", expert[:, 0::2].T
                yield f"[{number}].up", expert[:, 1::2].T
            else:
                yield f"[{number}]", expert.T if architecture == "gpt_oss" else expert
        return
    flat = values.reshape(values.shape[0], -1)
    yield "", flat.T if architecture == "gpt2" and re.search(r"\.c_\w+\.weight$", name) else flat


def matrices(architecture: str, folder: Path) -> Matrices:
    return {
        (name, label): matrix.double().numpy()
        for name, values in read_tensors(folder).items()
        if values.ndim >= 2
        for label, matrix in stored_matrices(architecture, name, values)
    }


def fewest(singular: np.ndarray, share: float) -> int:
    return int(np.searchsorted(np.cumsum(singular**2) / np.sum(singular**2), share)) + 1


def expected_record(base: np.ndarray, aligned: np.ndarray, finetuned: np.ndarray, fractions: tuple[float, ...], side: str, k: int) -> dict[str, Any]:
    """Formulas of METHODS, straight from full SVDs."""
    own, update = aligned - base, finetuned - aligned
    if side == "right":
        own, update = own.T, update.T
    u, s, _ = np.linalg.svd(own, full_matrices=False)
    uf, sf, _ = np.linalg.svd(update, full_matrices=False)
    k = min(k, len(s))

    def kept(count: int, matrix: np.ndarray) -> float:
        return float(np.linalg.norm(u[:, :count] @ (u[:, :count].T @ matrix)))

    counts = [max(1, round(fraction * len(s))) for fraction in fractions]
    overlaps = []
    for eta in ETAS:
        i, j = fewest(s, eta), fewest(sf, eta)
        overlaps.append((float(np.linalg.norm(u[:, :i].T @ uf[:, :j]) ** 2) / min(i, j), max(i, j) / len(own), i, j))
    a, f = own.ravel(), update.ravel()
    return {
        "r_align": kept(k, own) / np.linalg.norm(own),
        "r_ft": kept(k, own + update) / np.linalg.norm(own + update),
        "r_expected": math.sqrt(k / len(own)),
        "kept_align": [kept(count, own) ** 2 / np.linalg.norm(own) ** 2 for count in counts],
        "kept_ft": [kept(count, update) ** 2 / np.linalg.norm(update) ** 2 for count in counts],
        "random_k_ft": [count / len(s) * kept(len(s), update) ** 2 / np.linalg.norm(update) ** 2 for count in counts],
        "counts": counts,
        "singular": s,
        "energies": [fewest(s, share) for share in (0.5, 0.9, 0.99)],
        "stable": float(np.sum(s**2) / s[0] ** 2),
        "participation": float(np.sum(s**2) ** 2 / np.sum(s**4)),
        "mso": overlaps,
        "cosines": (
            f @ (a + f) / np.linalg.norm(f) / np.linalg.norm(a + f),
            f @ a / np.linalg.norm(f) / np.linalg.norm(a),
            f @ -a / np.linalg.norm(f) / np.linalg.norm(a),
        ),
        "norms": (np.linalg.norm(own), np.linalg.norm(update), np.linalg.norm(aligned)),
    }


@pytest.mark.parametrize(("architecture", "side"), [("llama", "left"), ("llama", "right"), ("gpt2", "left"), ("gpt_oss", "left"), ("llava", "left")])
def test_every_figure_of_every_matrix_against_numpy(tmp_path: Path, architecture: str, side: str) -> None:
    base, aligned = make_pair(tmp_path, architecture, dtype="float32")
    finetuned = fine_tuned(aligned, tmp_path / "finetuned")
    fractions = (0.05, 0.4)
    settings = InspectSettings(rank=3, fractions=fractions, etas=ETAS, side=side)  # type: ignore[arg-type]
    found = inspect(base, aligned, finetuned, settings=settings, device="cpu")
    before, middle, after = (matrices(architecture, folder) for folder in (base, aligned, finetuned))
    assert {(record["name"], record["part"]) for record in found.matrices} == set(middle)
    for record in found.matrices:
        place = (record["name"], record["part"])
        wanted = expected_record(before[place], middle[place], after[place], fractions, side, 3)
        own, other = record["aligned"], record["finetuned"][0]
        assert tuple(record["shape"]) == middle[place].shape and record["k"] == min(3, *record["shape"])
        assert own["r"] == pytest.approx(wanted["r_align"], rel=1e-5) and other["r"] == pytest.approx(wanted["r_ft"], rel=1e-4)
        assert other["ratio"] == pytest.approx(wanted["r_ft"] / wanted["r_align"], rel=1e-4)
        assert own["r_expected"] == other["r_expected"] == pytest.approx(wanted["r_expected"])
        assert [entry["k"] for entry in own["energy_kept"]] == wanted["counts"]
        assert [entry["top"] for entry in own["energy_kept"]] == pytest.approx(wanted["kept_align"], rel=1e-5)
        assert [entry["top"] for entry in other["energy_kept"]] == pytest.approx(wanted["kept_ft"], rel=1e-4)
        dimension = record["shape"][0 if side == "left" else 1]
        assert [entry["random"]["expected"] for entry in other["energy_kept"]] == pytest.approx([count / dimension for count in wanted["counts"]])
        assert [entry["random_k"]["expected"] for entry in other["energy_kept"]] == pytest.approx(wanted["random_k_ft"], rel=1e-4)
        spectrum = own["spectrum"]
        assert spectrum["complete"] and spectrum["of"] == len(wanted["singular"]) and own["undecided"] is None
        np.testing.assert_allclose(spectrum["values"], wanted["singular"][: len(spectrum["values"])], rtol=1e-4)
        ranks = own["effective_ranks"]
        assert [ranks[f"energy_{share}"] for share in (50, 90, 99)] == wanted["energies"]
        assert ranks["stable"] == pytest.approx(wanted["stable"], rel=1e-4)
        assert ranks["participation"] == pytest.approx(wanted["participation"], rel=1e-4)
        assert own["noise_floor_rank"] == int((wanted["singular"] > own["noise_edge"]).sum())
        for entry, (value, expectation, i, j) in zip(other["mso"], wanted["mso"], strict=True):
            assert (entry["k_align"], entry["k_ft"]) == (i, j)
            assert entry["mso"] == pytest.approx(value, abs=2e-3) and entry["expected"] == pytest.approx(expectation)
        cosines = [other["cosines"][name] for name in ("update_to_total", "update_to_alignment", "safety_angle")]
        assert cosines == pytest.approx(wanted["cosines"], abs=1e-5)
        norm, size, weight = wanted["norms"]
        assert (own["norm"], other["norm"]) == (pytest.approx(norm, rel=1e-5), pytest.approx(size, rel=1e-5))
        assert (own["relative_norm"], other["relative_norm"]) == (pytest.approx(norm / weight, rel=1e-5), pytest.approx(size / weight, rel=1e-5))


def test_groups_are_the_means_and_the_energies_of_their_matrices(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", dtype="float32")
    folders = [fine_tuned(aligned, tmp_path / f"ft{seed}", seed=seed) for seed in (1, 2)]
    found = inspect(base, aligned, folders, settings=InspectSettings(rank=2, fractions=(0.1,), etas=ETAS), device="cpu")
    records = found.matrices
    linear = [record for record in records if "embed" not in record["name"]]
    assert found.linear["matrices"] == len(linear) == len(records) - 1

    def energy(entries: list[dict[str, Any]], r: str) -> float:
        # ‖Δ_align + Δ_ft‖² = ‖Δ_align‖² + ‖Δ_ft‖² + 2⟨·,·⟩, with the product from the cosine.
        totals, kept = [], []
        for record in entries:
            a, f = record["aligned"]["norm"], record["finetuned"][1]["norm"]
            c = record["finetuned"][1]["cosines"]["update_to_alignment"]
            totals.append(a**2 if r == "align" else a**2 + f**2 + 2 * c * a * f)
            kept.append(totals[-1] * (record["aligned"]["r"] if r == "align" else record["finetuned"][1]["r"]) ** 2)
        return math.sqrt(sum(kept) / sum(totals))

    for group, entries in ((found.linear, linear), (found.whole, records)):
        after = group["finetuned"][1]
        mean_align = np.mean([record["aligned"]["r"] for record in entries])
        mean_ft = np.mean([record["finetuned"][1]["r"] for record in entries])
        assert group["aligned"]["r"]["mean"] == pytest.approx(mean_align) and after["r"]["mean"] == pytest.approx(mean_ft)
        assert after["ratio"]["mean"] == pytest.approx(mean_ft / mean_align)
        assert group["aligned"]["r"]["energy"] == pytest.approx(energy(entries, "align"))
        assert after["r"]["energy"] == pytest.approx(energy(entries, "ft"), rel=1e-5)
        assert after["ratio"]["energy"] == pytest.approx(energy(entries, "ft") / energy(entries, "align"), rel=1e-5)
        assert group["aligned"]["r"]["expected"] == pytest.approx(np.mean([record["aligned"]["r_expected"] for record in entries]))
        kept = [record["finetuned"][1]["energy_kept"][0] for record in entries]
        weights = np.array([record["finetuned"][1]["norm"] ** 2 for record in entries])
        statistic = after["energy_kept"][0]["top"]
        assert statistic["mean"] == pytest.approx(np.mean([entry["top"] for entry in kept]))
        assert statistic["energy"] == pytest.approx(np.average([entry["top"] for entry in kept], weights=weights))
        assert statistic["expected_energy"] == pytest.approx(np.average([entry["random"]["expected"] for entry in kept], weights=weights))
        assert after["mso"][1]["mean"] == pytest.approx(np.mean([record["finetuned"][1]["mso"][1]["mso"] for record in entries]))
        assert group["pairs"][0]["mso"][2]["mean"] == pytest.approx(np.mean([record["pairs"][0]["mso"][2]["mso"] for record in entries]))
        assert group["aligned"]["effective_ranks"]["energy_90"] == {
            "mean": pytest.approx(np.mean([record["aligned"]["effective_ranks"]["energy_90"] for record in entries])),
            "matrices": len(entries),
            "undecided": 0,
        }
    # Over all parameters, vectors included.
    first, second, third = ({name: values.double() for name, values in read_tensors(folder).items()} for folder in (base, aligned, folders[0]))
    a = np.concatenate([(second[name] - first[name]).numpy().ravel() for name in first])
    f = np.concatenate([(third[name] - second[name]).numpy().ravel() for name in first])
    cosines = found.whole["finetuned"][0]["cosines"]
    assert cosines["safety_angle"] == pytest.approx(f @ -a / np.linalg.norm(f) / np.linalg.norm(a), abs=1e-6)
    assert cosines["update_to_total"] == pytest.approx(f @ (a + f) / np.linalg.norm(f) / np.linalg.norm(a + f), abs=1e-6)
    assert found.whole["parameters"] == a.size and len(found.document["vectors"]) == 5
    layers, kinds = ({group["name"]: group for group in found.document[part]} for part in ("layers", "kinds"))
    assert layers["model.layers.1"]["matrices"] == 7 and (layers["model.layers.1"]["stack"], layers["model.layers.1"]["number"]) == (
        "model.layers",
        1,
    )
    assert kinds["q_proj"]["matrices"] == 2 and kinds["embed_tokens"]["vocabulary"] and not kinds["q_proj"]["vocabulary"]
    table = found.to_pandas()
    assert len(table) == len(records) and table["ft2.ratio"].mean() == pytest.approx(np.mean([record["finetuned"][1]["ratio"] for record in records]))


def test_pairs_of_fine_tuned_models_overlap_as_numpy_says(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "gpt2", dtype="float32")
    folders = [fine_tuned(aligned, tmp_path / f"ft{seed}", seed=seed) for seed in (1, 2)]
    found = inspect(base, aligned, folders, settings=InspectSettings(etas=(0.5,)), device="cpu")
    middle, one, other = (matrices("gpt2", folder) for folder in (aligned, *folders))
    for record in found.matrices:
        place = (record["name"], record["part"])
        (u, s, _), (v, t, _) = (np.linalg.svd(after[place] - middle[place], full_matrices=False) for after in (one, other))
        i, j = fewest(s, 0.5), fewest(t, 0.5)
        assert record["pairs"][0]["mso"][0]["mso"] == pytest.approx(np.linalg.norm(u[:, :i].T @ v[:, :j]) ** 2 / min(i, j), abs=2e-3)
        assert record["transposed"] == bool(re.search(r"\.c_\w+\.weight$", record["name"]))


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Sides above 128: leading triplets only, unless asked for more."""
    folder = tmp_path_factory.mktemp("larger")
    base, aligned = make_pair(folder, "llama", hidden=160, layers=1, vocabulary=300)
    return base, aligned, fine_tuned(aligned, folder / "ft", size=0.002)


def test_a_cut_spectrum_decides_what_it_can_and_leaves_the_rest_undefined(larger: tuple[Path, Path, Path]) -> None:
    settings = InspectSettings(rank=4, fractions=(0.025, 0.05), etas=(0.01, 0.5, 0.99))
    cut = inspect(*larger, settings=settings, device="cpu")
    full = inspect(*larger, settings=InspectSettings(**{**settings.__dict__, "full_spectrum": True}), device="cpu")
    assert "only the leading 8 singular values" in " ".join(cut.notes) and "singular values" not in " ".join(full.notes)
    for one, whole in zip(cut.matrices, full.matrices, strict=True):
        if min(one["shape"]) <= 128:
            continue  # so small that all of it is computed
        own, exact = one["aligned"], whole["aligned"]
        assert own["spectrum"]["computed"] == 8 and not own["spectrum"]["complete"] and own["undecided"]
        assert exact["spectrum"]["complete"] and exact["undecided"] is None
        assert own["r"] == pytest.approx(exact["r"], rel=1e-3)
        assert [entry["top"] for entry in own["energy_kept"]] == pytest.approx([entry["top"] for entry in exact["energy_kept"]], rel=1e-3)
        assert own["effective_ranks"]["participation"] is None and exact["effective_ranks"]["participation"] > 1
        assert own["effective_ranks"]["stable"] == pytest.approx(exact["effective_ranks"]["stable"], rel=1e-3)
        assert all(entry["random_k"] is None for entry in own["energy_kept"]) and all(entry["random_k"] for entry in exact["energy_kept"])
        after, all_of_it = one["finetuned"][0], whole["finetuned"][0]
        assert after["ratio"] == pytest.approx(all_of_it["ratio"], rel=2e-3)
        assert after["mso"][2]["mso"] is None and all_of_it["mso"][2]["mso"] > 0.3
        assert after["mso"][0]["mso"] == pytest.approx(all_of_it["mso"][0]["mso"], abs=0.02)
        # A band that rests on less is wider, never narrower.
        for cut_entry, full_entry in zip(own["energy_kept"], exact["energy_kept"], strict=True):
            low, high = cut_entry["random"]["band"]
            assert low <= full_entry["random"]["band"][0] + 1e-9 and high >= full_entry["random"]["band"][1] - 1e-9
    last = cut.linear["finetuned"][0]["mso"][2]
    assert last["matrices"] + last["undecided"] == cut.linear["matrices"] and last["undecided"] > 0


def test_fractions_above_a_fifth_take_whole_spectra_and_say_so(larger: tuple[Path, Path, Path]) -> None:
    found = inspect(*larger[:2], settings=InspectSettings(fractions=(0.5, 0.99), include=("q_proj",)), device="cpu")
    (record,) = found.matrices
    assert record["aligned"]["spectrum"]["complete"] and "float64 Gram" in " ".join(found.notes)
    kept = [entry["top"] for entry in record["aligned"]["energy_kept"]]
    assert kept == sorted(kept) and kept[0] > 0.95 and kept[1] == pytest.approx(1, abs=1e-4)


def test_a_whole_spectrum_keeps_everything(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", dtype="float32")
    found = inspect(base, aligned, fine_tuned(aligned, tmp_path / "ft"), settings=InspectSettings(rank="100%"), device="cpu")
    for record in found.matrices:
        assert record["aligned"]["r"] == pytest.approx(1, abs=1e-6)
        if record["shape"][0] <= record["shape"][1]:  # then U spans the whole output space
            assert record["finetuned"][0]["r"] == pytest.approx(1, abs=1e-5)
            assert record["finetuned"][0]["ratio_random"] == {"expected": pytest.approx(1, abs=1e-5), "band": pytest.approx([1, 1], abs=1e-5)}


def test_factors_stand_in_for_the_decomposition(larger: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned, finetuned = larger
    path = decompose(base, aligned, tmp_path / "f.safetensors", recipe=Recipe(rank=12, tolerance=1e-6), device="cpu").path
    settings = InspectSettings(rank=4, fractions=(0.025, 0.15), tolerance=1e-6)
    reused, anew = (inspect(base, aligned, finetuned, settings=settings, factors=file, device="cpu") for file in (path, None))
    assert reused.document["settings"]["factors"] == "f.safetensors"
    for one, other in zip(reused.matrices, anew.matrices, strict=True):
        assert one["aligned"]["r"] == pytest.approx(other["aligned"]["r"], rel=1e-5)
        assert one["finetuned"][0]["r"] == pytest.approx(other["finetuned"][0]["r"], rel=1e-4)
        if min(one["shape"]) > 128:
            assert one["aligned"]["spectrum"]["computed"] == 12  # what the file holds; anew it would be 24
            assert one["aligned"]["energy_kept"][1]["top"] is None and other["aligned"]["energy_kept"][1]["top"] > 0.9
    with pytest.raises(RequestError, match=r"rank 13 is asked and f.safetensors holds 12"):
        inspect(base, aligned, settings=InspectSettings(rank=13), factors=path)
    with pytest.raises(RequestError, match="Give one of the two"):
        inspect(base, aligned, settings=InspectSettings(full_spectrum=True), factors=path)
    with pytest.raises(RequestError, match="another pair"):
        inspect(base, finetuned, factors=path)
    fewer = decompose(base, aligned, tmp_path / "g.safetensors", recipe=Recipe(rank=6, exclude=("lm_head",)), device="cpu").path
    with pytest.raises(PlanError, match=r"no factors of lm_head.weight"):
        inspect(base, aligned, factors=fewer)
    assert inspect(base, aligned, settings=InspectSettings(exclude=("lm_head",)), factors=fewer).linear["matrices"] == 7


def test_each_tensor_of_each_model_is_read_once(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", base_shards=2)
    folders = [fine_tuned(aligned, tmp_path / f"ft{seed}", seed=seed) for seed in (1, 2)]
    sources = plan_inspection(base, aligned, folders)
    read: list[tuple[str, str]] = []
    for model in (sources.base, sources.aligned, *(model for _, model in sources.finetuned)):
        _count_reads(model, read)
    execute_inspection(sources, InspectSettings(), device="cpu")
    assert sorted(read) == sorted((role, name) for role in ("base", "aligned", "finetuned 1", "finetuned 2") for name in read_tensors(base))


def _count_reads(model: Checkpoint, read: list[tuple[str, str]]) -> None:
    whole = model.tensor

    def counted(name: str) -> torch.Tensor:
        read.append((model.role, name))
        return whole(name)

    model.tensor = counted  # type: ignore[method-assign]


def test_a_model_that_was_not_fine_tuned(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    copy = rewritten(aligned, tmp_path / "copy", lambda _name, values: values)
    found = inspect(base, aligned, copy, device="cpu")
    assert found.notes[0].startswith("copy has the weights of aligned") and found.document["reverting"] == []
    for figures in [found.linear["finetuned"][0], *(record["finetuned"][0] for record in found.matrices)]:
        ratio = figures["ratio"]
        assert (ratio["mean"] if isinstance(ratio, dict) else ratio) == 1.0
        assert figures["cosines"]["safety_angle"] is None and figures["cosines"]["update_to_total"] is None
        top = figures["energy_kept"][0]["top"]
        assert (top["mean"] if isinstance(top, dict) else top) is None
        assert all(entry.get("mso", entry.get("mean")) is None for entry in figures["mso"])
    assert found.linear["finetuned"][0]["mso"][0]["undecided"] == 0  # undefined, which more singular values would not change


def test_a_model_that_went_back_to_base_or_most_of_the_way(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", dtype="float32")
    start = read_tensors(base)
    back = rewritten(aligned, tmp_path / "back", lambda name, values: start[name])
    most = rewritten(aligned, tmp_path / "most", lambda name, values: values - 0.9 * (values - start[name]))
    found = inspect(base, aligned, [back, most], device="cpu")
    assert found.document["reverting"] == ["back", "most"]
    assert found.notes[0].startswith("back has the weights of base") and "most points back along −Δ_align (cosine 1.000)" in found.notes[1]
    assert found.linear["finetuned"][0]["ratio"]["mean"] is None and found.matrices[0]["finetuned"][0]["r"] is None
    assert found.whole["finetuned"][0]["cosines"]["update_to_total"] is None
    # Less of the same directions: their share of the energy is as it was.
    assert found.linear["finetuned"][1]["ratio"]["mean"] == pytest.approx(1, abs=1e-3)
    assert found.whole["finetuned"][1]["cosines"]["safety_angle"] == pytest.approx(1, abs=1e-6)


def test_matrices_that_alignment_left_alone_are_undefined(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    start = read_tensors(base)
    partly = rewritten(aligned, tmp_path / "partly", lambda name, values: start[name] if "q_proj" in name else values)
    found = inspect(base, partly, fine_tuned(partly, tmp_path / "ft"), device="cpu")
    record = next(record for record in found.matrices if record["kind"] == "q_proj")
    assert record["aligned"]["r"] is None and record["finetuned"][0]["r"] is None and record["finetuned"][0]["ratio"] is None
    assert record["k"] == 0 and record["aligned"]["r_expected"] is None and record["finetuned"][0]["energy_kept"][0]["top"] is None
    assert record["finetuned"][0]["cosines"]["safety_angle"] is None
    assert found.linear["aligned"]["r"]["matrices"] == found.linear["matrices"] - 2
    assert any(note.startswith("Alignment left 2 of 16 matrices as they were") for note in found.notes)
    with pytest.raises(RequestError, match="hold the same weights"):
        inspect(base, rewritten(base, tmp_path / "same", lambda _name, values: values))


def test_a_rank_above_the_short_side_is_clipped_and_said(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", dtype="float32")
    found = inspect(base, aligned, settings=InspectSettings(rank=1000), device="cpu")
    assert {record["k"] for record in found.matrices} == {16, 32}
    assert "Rank 1000 is above the short side of 16 matrices" in " ".join(found.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": (0.0,)}, r"fraction 0 is outside \(0, 1\)"),
        ({"fractions": (0.5, 1.0)}, r"fraction 1 is outside"),
        ({"etas": (1.5,)}, r"eta 1.5 is outside"),
        ({"etas": (float("nan"),)}, r"eta nan is outside"),
        ({"rank": "energy:0.9"}, "depends on the spectrum"),
        ({"rank": 0}, "not a whole number"),
        ({"side": "top"}, "side 'top' is not known"),
        ({"draws": 1}, "at least 2"),
        ({"include": ("(",)}, "not a regular expression"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        InspectSettings(**options)


def test_models_of_another_architecture_or_vocabulary(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "one", "llama")
    _, wider = make_pair(tmp_path / "wider", "llama", hidden=48)
    _, deeper = make_pair(tmp_path / "deeper", "llama", layers=3)
    _, larger = make_pair(tmp_path / "larger", "llama", aligned_vocabulary=104)
    with pytest.raises(PlanError, match=r"q_proj.weight: aligned has \[32, 32\] \(aligned\), finetuned has \[48, 48\] .*not of one architecture"):
        inspect(base, aligned, wider)
    with pytest.raises(PlanError, match=r"9 tensor\(s\) of finetuned 2 \(aligned\) are missing in aligned"):
        inspect(base, aligned, [aligned, deeper])
    with pytest.raises(PlanError, match=r"9 tensor\(s\) of aligned \(aligned\) are missing in finetuned"):
        inspect(tmp_path / "deeper" / "base", deeper, aligned)
    with pytest.raises(PlanError, match="finetuned: there is no folder|finetuned: .*no-such"):
        inspect(base, aligned, tmp_path / "no-such")
    with pytest.warns(LoxMergeWarning, match=r"(lm_head|embed_tokens).weight: aligned has \[96, 32\].*\[104, 32\].*vocabularies differ"):
        found = inspect(base, aligned, larger, device="cpu")
    assert {"name": "model.embed_tokens.weight", "reason": "vocabularies differ"} in found.document["left_out"] and found.linear["matrices"] == 14
    with pytest.raises(PlanError, match="same checkpoint"):
        inspect(aligned, aligned)


def test_values_that_are_not_finite_are_named_or_left_out(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")

    def broken(name: str, values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        if name in ("lm_head.weight", "model.norm.weight"):
            values.view(-1)[:3] = float("inf")
        return values

    damaged = rewritten(aligned, tmp_path / "damaged", broken)
    with pytest.raises(NumericalError, match=r"2 matrices or vectors: lm_head.weight: 3 in damaged − aligned; model.norm.weight: 3 in damaged"):
        inspect(base, aligned, damaged, device="cpu")
    found = inspect(base, aligned, damaged, settings=InspectSettings(skip_non_finite=True), device="cpu")
    assert found.document["left_out"] == [{"name": name, "reason": "NaN or Inf in a delta"} for name in ("lm_head.weight", "model.norm.weight")]
    assert found.whole["matrices"] == 15


def test_stacks_of_experts_and_kinds_of_modules(tmp_path: Path) -> None:
    config = {"model_type": "gpt_oss", "hidden_size": 32, "num_local_experts": 3}
    assert is_transposed("model.layers.0.mlp.experts.gate_up_proj", (3, 32, 64), config)
    assert is_transposed("model.layers.0.mlp.experts.down_proj", (3, 32, 32), config)  # square: the model's name decides
    plain = {"model_type": "qwen3_moe", "hidden_size": 32, "num_experts": 3}
    assert not is_transposed("model.layers.0.mlp.experts.gate_up_proj", (3, 64, 32), plain)
    assert not is_transposed("model.layers.0.mlp.experts.down_proj", (3, 32, 24), plain)
    assert is_transposed("model.layers.0.mlp.experts.down_proj", (3, 24, 32), plain)  # the shape itself says so
    assert not is_transposed("transformer.h.0.attn.c_proj.weight", (32, 32), {"model_type": "gpt_bigcode"})
    assert is_transposed("transformer.h.0.attn.c_proj.weight", (32, 32), {"text_config": {"model_type": "gpt2"}})
    assert layer_of("model.layers.11.mlp.experts.3.w1.weight") == ("model.layers", 11) and layer_of("0.weight") == ("", 0)
    assert layer_of("projector.linear_1.weight") is None
    names = ["a.layers.0.attn.c_proj.weight", "a.layers.0.mlp.c_proj.weight", "a.layers.0.moe.experts.2.w1.weight", "a.wte.weight"]
    assert list(module_kinds(names).values()) == ["attn.c_proj", "mlp.c_proj", "experts.w1", "wte"]
    towers = ["vision.layers.0.q_proj.weight", "text.layers.0.q_proj.weight"]
    assert list(module_kinds(towers).values()) == ["vision.q_proj", "text.q_proj"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_noise_edge_of_every_dtype_by_frexp(dtype: torch.dtype) -> None:
    values = (torch.randn(70, 40, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    values[0, :3], values[1, :3] = 0.0, torch.finfo(dtype).tiny / 4
    numbers = values.double().numpy()
    spacing = np.exp2(np.floor(np.log2(np.maximum(np.abs(numbers), torch.finfo(dtype).tiny)))) * torch.finfo(dtype).eps
    for stored, part in ((values, spacing), (values[:, ::2], spacing[:, ::2])):
        rows, columns = (math.sqrt(side - 0.5) for side in stored.shape)
        largest = (rows + columns) ** 2 + 2.0234 * (rows + columns) * (1 / rows + 1 / columns) ** (1 / 3)
        assert rounding_noise_edge(stored) == pytest.approx(math.sqrt(np.mean(part**2) / 12 * largest), rel=1e-5)


def test_the_command_line(tmp_path: Path, run_cli: RunCli) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    finetuned = fine_tuned(aligned, tmp_path / "a-fine-tuned-model-with-a-rather-long-name")
    done = run_cli("inspect", base, aligned, finetuned, aligned, "--rank", 3, "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    document = json.loads((tmp_path / "r.json").read_text())
    ratio = document["linear"]["finetuned"][0]["ratio"]
    assert f"{ratio['mean']:.3f}   {ratio['expected']:.3f}" in re.sub(" +", "   ", done.stdout)
    assert str(tmp_path) not in json.dumps(document)
    assert document["labels"] == [finetuned.name, "aligned"]
    again = run_cli("inspect", base, aligned, finetuned, aligned, "--rank", 3, "--json", "-", "--by", "none")
    second = json.loads(again.stdout)
    assert {**second, "seconds": 0} == {**document, "seconds": 0}, "the same seed gives the same figures"
    wrong = run_cli("inspect", base, aligned, "--fractions", "0,0.5")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: fraction 0 is outside (0, 1)") and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fractions", "x"), "--fractions: 'x' is not a number"),
        (("--by", "row"), "--by 'row' is not known"),
        (("--include", "nothing"), "matches no tensor"),
        (("--exclude", "."), "edits no tensor|no matrix"),
        (("--factors", "none.safetensors"), "there is no file of factors"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: tuple[str, str], message: str) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    with pytest.raises(RequestError, match=message):
        inspect_command.main([str(base), str(aligned), *arguments], standalone_mode=False)


def attacked(pair: ToyPair, start: Path, folder: Path) -> tuple[Path, float]:
    """`start` fine-tuned on the toy's harmless task in memory, put down only here in the test's own folder; and what robustness measures."""
    recipe = ToyRecipe(seed=0)
    requests = draw_requests(recipe)
    data = folder / "benign.jsonl"
    folder.mkdir()
    rows = [{"prompt": request.text, "response": " ".join(new_task(request)[:-1])} for request in requests.benign]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rate = benign_attack(recipe).training.learning_rate
    settings = AttackSettings(steps=(60,), learning_rate=rate, batch_size=32, warmup_steps=3, adam_beta2=0.95, max_length=64)
    loaded = load_model(start, dtype="float32", device="cpu")
    ratios = []

    def observe(_step: int, trained: Any) -> None:
        trained.save_pretrained(folder / "model")
        plan = plan_hardening(pair.base, start, folder / "none", recipe=Recipe(rank=6))
        ratios.append(Dispersion(trained, plan).ratio(trained).mean)

    fine_tune(loaded.model, loaded.tokenizer, load_attack(data), settings, observe)
    return folder / "model", ratios[0]


def test_alignment_energy_is_dispersed_less_where_the_model_was_hardened(toy_pair_seed0: ToyPair, tmp_path: Path) -> None:
    """FACTS: R_ft/R_align after harmless fine-tuning, aligned .64, LoX .80; safe to order at seed 0. Robustness measures the same R_ft."""
    hardened = harden(toy_pair_seed0.base, toy_pair_seed0.aligned, tmp_path / "hardened", recipe=Recipe(rank=6, alpha=1.25)).out
    found = {}
    for name, start in (("aligned", toy_pair_seed0.aligned), ("hardened", hardened)):
        finetuned, dispersion = attacked(toy_pair_seed0, start, tmp_path / f"attack of {name}")
        result = inspect(toy_pair_seed0.base, start, finetuned, device="cpu")
        assert result.linear["finetuned"][0]["r"]["mean"] == pytest.approx(dispersion, rel=1e-4)
        found[name] = result.linear["finetuned"][0]["ratio"]
    assert found["aligned"]["mean"] < found["hardened"]["mean"] - 0.05
    # Chance would have moved both alike, and far less than fine-tuning did.
    for ratio in found.values():
        assert ratio["band"][0] > ratio["mean"] and ratio["expected"] == pytest.approx(1, abs=0.1)
