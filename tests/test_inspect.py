"""Inspections against numpy in float64 on tiny models of several layouts."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inspect_models import fine_tuned
from tiny_models import make_pair, read_tensors

from lox_merge import Inspection, InspectSettings, inspect
from lox_merge.checkpoint.checkpoint import Checkpoint
from lox_merge.diagnostics.weights import execute_inspection, plan_inspection
from lox_merge.errors import PlanError, RequestError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.recipe import Recipe

ETAS = (0.1, 0.5, 0.9, 0.99)
Matrices = dict[tuple[str, str], np.ndarray]


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
    assert {(record["name"], record["part"]) for record in found.document["matrices"]} == set(middle)
    for record in found.document["matrices"]:
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
    records = found.document["matrices"]
    linear = [record for record in records if "embed" not in record["name"]]
    assert found.document["linear"]["matrices"] == len(linear) == len(records) - 1

    def energy(entries: list[dict[str, Any]], r: str) -> float:
        # ‖Δ_align + Δ_ft‖² = ‖Δ_align‖² + ‖Δ_ft‖² + 2⟨·,·⟩, with the product from the cosine.
        totals, kept = [], []
        for record in entries:
            a, f = record["aligned"]["norm"], record["finetuned"][1]["norm"]
            c = record["finetuned"][1]["cosines"]["update_to_alignment"]
            totals.append(a**2 if r == "align" else a**2 + f**2 + 2 * c * a * f)
            kept.append(totals[-1] * (record["aligned"]["r"] if r == "align" else record["finetuned"][1]["r"]) ** 2)
        return math.sqrt(sum(kept) / sum(totals))

    for group, entries in ((found.document["linear"], linear), (found.document["whole"], records)):
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
    cosines = found.document["whole"]["finetuned"][0]["cosines"]
    assert cosines["safety_angle"] == pytest.approx(f @ -a / np.linalg.norm(f) / np.linalg.norm(a), abs=1e-6)
    assert cosines["update_to_total"] == pytest.approx(f @ (a + f) / np.linalg.norm(f) / np.linalg.norm(a + f), abs=1e-6)
    assert found.document["whole"]["parameters"] == a.size and len(found.document["vectors"]) == 5
    layers, kinds = ({group["name"]: group for group in found.document[part]} for part in ("layers", "kinds"))
    assert layers["model.layers.1"]["matrices"] == 7 and (layers["model.layers.1"]["stack"], layers["model.layers.1"]["number"]) == (
        "model.layers",
        1,
    )
    assert kinds["q_proj"]["matrices"] == 2 and kinds["embed_tokens"]["vocabulary"] and not kinds["q_proj"]["vocabulary"]
    shown = found._repr_html_()
    assert f"<td>{found.linear.finetuned[1].ratio.mean:.3f}</td>" in shown and "Fine-tuning: aligned → ft2" in shown
    typed = asdict(found)
    document = typed.pop("document")
    assert {"command": "inspect", "format": 1} | json.loads(json.dumps(typed)) == document == found.to_json()
    assert repr(found) == f"<Inspection of base → aligned; fine-tuned: ft1, ft2; {len(records)} matrices>" and Inspection.of(found.to_json()) == found
    with pytest.raises(RequestError, match=r"whole\.aligned\.norm: Input should be a finite number"):
        Inspection.of(document | {"whole": document["whole"] | {"aligned": document["whole"]["aligned"] | {"norm": math.nan}}})
    table = found.to_pandas()
    assert len(table) == len(records) and table["ft2.ratio"].mean() == pytest.approx(np.mean([record["finetuned"][1]["ratio"] for record in records]))


def test_pairs_of_fine_tuned_models_overlap_as_numpy_says(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "gpt2", dtype="float32")
    folders = [fine_tuned(aligned, tmp_path / f"ft{seed}", seed=seed) for seed in (1, 2)]
    found = inspect(base, aligned, folders, settings=InspectSettings(etas=(0.5,)), device="cpu")
    middle, one, other = (matrices("gpt2", folder) for folder in (aligned, *folders))
    for record in found.document["matrices"]:
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
    for one, whole in zip(cut.document["matrices"], full.document["matrices"], strict=True):
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
    last = cut.document["linear"]["finetuned"][0]["mso"][2]
    assert last["matrices"] + last["undecided"] == cut.document["linear"]["matrices"] and last["undecided"] > 0


def test_fractions_above_a_fifth_take_whole_spectra_and_say_so(larger: tuple[Path, Path, Path]) -> None:
    found = inspect(*larger[:2], settings=InspectSettings(fractions=(0.5, 0.99), include=("q_proj",)), device="cpu")
    (record,) = found.document["matrices"]
    assert record["aligned"]["spectrum"]["complete"] and "float64 Gram" in " ".join(found.notes)
    kept = [entry["top"] for entry in record["aligned"]["energy_kept"]]
    assert kept == sorted(kept) and kept[0] > 0.95 and kept[1] == pytest.approx(1, abs=1e-4)


def test_a_whole_spectrum_keeps_everything(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", dtype="float32")
    found = inspect(base, aligned, fine_tuned(aligned, tmp_path / "ft"), settings=InspectSettings(rank="100%"), device="cpu")
    for record in found.document["matrices"]:
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
    for one, other in zip(reused.document["matrices"], anew.document["matrices"], strict=True):
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
    assert inspect(base, aligned, settings=InspectSettings(exclude=("lm_head",)), factors=fewer).linear.matrices == 7


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
