"""Landscapes, curvature and framings of quantised checkpoints: those of the plain weights that codes and scales stand for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter
from quantised_models import decoded_copy, pair_in_forms
from transformers import AutoModelForCausalLM

import lox_merge
from lox_merge import CurvatureSettings
from lox_merge.checkpoint.quantised.view import QuantisedCheckpoint
from lox_merge.diagnostics.watch.retained import RetainedAlignment
from lox_merge.errors import LoxMergeWarning, PlanError, RequestError
from lox_merge.lab.measure import NotRefused
from lox_merge.maths.weight_changes import DenseChange
from lox_merge.safety.conversations import Conversations, conversations
from lox_merge.safety.decoding import Decoding
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.landscape.mover import WeightMover
from lox_merge.safety.landscape.run import make_slices
from lox_merge.safety.landscape.sources import Sources
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.types import Prompt

FORMS = ("int4", "int8", "fp8")
ERROR_IS_PART = pytest.warns(LoxMergeWarning, match="The error of that is part of every delta")
PROMPTS = prompt_set([Prompt(str(place), text) for place, text in enumerate(("how do i", "do you help"))], "prompts")


def data(name: str, rows: tuple[tuple[str, str], ...]) -> Conversations:
    turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": text}] for prompt, text in rows]
    return conversations(name, f"{name}.jsonl", turns)


FIRST = data("first", (("how do i", "you help no yes"), ("do you", "no sorry i cannot help you")))
SECOND = data("second", (("you cannot help", "you help no yes"), ("yes help", "no sorry i cannot help you")))


@pytest.fixture(name="models", scope="module")
def models_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantised")
    made = pair_in_forms(folder, FORMS)
    for form in FORMS:
        for role in ("base", "aligned"):
            made[f"{role}-{form}-plain"] = decoded_copy(made[f"{role}-{form}"], folder / f"{role}-{form}-plain")
    return made


def both(models: dict[str, Path], form: str) -> tuple[tuple[Path, Path], tuple[Path, Path]]:
    """(base, aligned) in the form, and as plain copies."""
    return tuple((models[f"base-{form}{end}"], models[f"aligned-{form}{end}"]) for end in ("", "-plain"))  # type: ignore[return-value]


def figures(record: Any, *, without: tuple[str, ...]) -> Any:
    """A result with what names its sources, times it, or warns of them taken out."""
    if isinstance(record, dict):
        return {key: figures(value, without=without) for key, value in record.items() if key not in without}
    return [figures(value, without=without) for value in record] if isinstance(record, list) else record


@pytest.mark.parametrize("form", FORMS)
def test_points_between_quantised_models_are_those_between_plain_copies(models: dict[str, Path], form: str) -> None:
    found = []
    for base, aligned in both(models, form):
        sources = Sources(aligned, {"base": base})
        model = LocalModel.load(aligned, device="cpu", dtype="float32", decode=True).model
        before = {name: value.clone() for name, value in model.state_dict().items()}
        where = make_slices(("base",), random=1, seed=3)
        with WeightMover(model, sources, sources.randomly_moved((), ())) as mover:
            states = []
            for one in where:
                mover.prepare(one)
                mover.move(one, (0.5,))
                states.append({name: value.clone() for name, value in model.state_dict().items()})
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the weights are back"
        found.append((states, sources.places(where[0].directions, ["base"])[0]))
        sources.close()
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
        assert not torch.equal(ours["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    assert found[0][1] == found[1][1] and found[0][1].coordinates == pytest.approx((1.0,))


def test_weights_are_decoded_once_for_all_points(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that an adapter changes. What memory has no room for is made anew for every point, with the same result."""
    (base, aligned), _ = both(models, "fp8")
    adapter = make_adapter(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    sources = Sources(aligned, {"base": base, "adapter": adapter}, base_is_right=True)
    model = LocalModel.load(aligned, device="cpu", decode=True).model
    (where,) = make_slices(("base", "adapter"), steps=2)
    decoded: list[str] = []
    decode = QuantisedCheckpoint.tensor
    monkeypatch.setattr(QuantisedCheckpoint, "tensor", lambda checkpoint, name: decoded.append(name) or decode(checkpoint, name))
    states = []
    with WeightMover(model, sources, ()) as mover:
        for share in (0.5, 0.0):
            monkeypatch.setattr("lox_merge.safety.landscape.mover._SHARE_OF_FREE_MEMORY", share)
            mover.prepare(where)
            decoded.clear()
            mover.move(where, (0.5, 0.5))
            states.append({name: value.clone() for name, value in model.state_dict().items()})
            assert any(name.endswith("q_proj.weight") for name in decoded) == (share == 0.0)
    sources.close()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_landscape_says_what_its_models_are(models: dict[str, Path]) -> None:
    results = []
    for (base, aligned), warns in zip(both(models, "int4"), (True, False), strict=True):
        settings: dict[str, Any] = {"others": {"base": base}, "steps": 2, "device": "cpu", "loading": {"decoding": Decoding(max_new_tokens=3)}}
        if warns:
            with ERROR_IS_PART:
                results.append(lox_merge.landscape(aligned, PROMPTS, [NotRefused()], **settings))
        else:
            results.append(lox_merge.landscape(aligned, PROMPTS, [NotRefused()], **settings))
    ours, theirs = results
    assert [point.attack_success for point in ours.slices[0].points] == [point.attack_success for point in theirs.slices[0].points]
    assert "4 bits" in ours.model["source"]["quantised"] and "4 bits" in ours.models["base"]["quantised"]
    assert "quantised" not in theirs.model["source"] and "quantised" not in theirs.models["base"]


@pytest.mark.parametrize("form", FORMS)
def test_curvature_and_overlap_are_those_of_plain_copies(models: dict[str, Path], form: str) -> None:
    results = []
    for base, aligned in both(models, form):
        settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "settings": CurvatureSettings(learning_rate=0.01, batches=1)}
        with pytest.warns(LoxMergeWarning) as caught:  # one batch has no interval, which is said of either
            results.append(lox_merge.curvature(aligned, FIRST, finetuned={"base": base}, data=[SECOND], **settings))
        assert any("part of every delta" in str(one.message) for one in caught) == (aligned == models[f"aligned-{form}"])
    ours, theirs = (figures(result.to_json(), without=("model", "seconds", "source", "warnings")) for result in results)
    assert ours == theirs and len(ours["finetuned"]) == 1
    record = results[0].to_json()
    assert record["model"]["source"]["quantised"] == record["finetuned"][0]["source"]["quantised"]
    assert "quantised" not in results[1].to_json()["model"]["source"]


@pytest.mark.parametrize("form", FORMS)
def test_framings_are_those_of_plain_copies(models: dict[str, Path], form: str, tmp_path: Path) -> None:
    results = []
    for end in ("", "-plain"):
        aligned = models[f"aligned-{form}{end}"]
        adapter = make_adapter(models[f"aligned-{form}-plain"], tmp_path / f"adapter{end}", target_modules=["q_proj"])
        asked = {"aligned": aligned, "adapter": adapter}
        results.append(lox_merge.framing(asked, FIRST, SECOND, device="cpu", dtype="float32", base_is_right=True).to_json())
    assert figures(results[0], without=("sources",)) == figures(results[1], without=("sources",))
    assert all("quantised" in source for source in results[0]["sources"].values())
    alone = lox_merge.framing({"aligned": models[f"aligned-{form}"]}, FIRST, SECOND, device="cpu", dtype="float32").to_json()
    assert alone["models"][0] == results[0]["models"][0]


@pytest.mark.parametrize("form", FORMS)
def test_a_watch_measures_from_what_a_quantised_base_stands_for(models: dict[str, Path], form: str) -> None:
    (quantised, _), (plain, aligned) = both(models, form)
    model = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
    torch.manual_seed(2)
    changes = {name: DenseChange(0.01 * torch.randn_like(value), transposed=False) for name, value in model.named_parameters()}
    found = []
    for base in (quantised, plain):
        settings: dict[str, Any] = {"base": base, "factors": None, "rank": 2, "seed": 0, "cache_dir": None}
        if base == quantised:
            with ERROR_IS_PART:
                watch = RetainedAlignment(model, model.get_parameter, **settings)
        else:
            watch = RetainedAlignment(model, model.get_parameter, **settings)
        found.append((watch.ratio(lambda name: None), watch.ratio(changes.get)))
        watch.close()
    assert found[0] == found[1] and found[0][0].matrices == 15  # seven layers in each of two blocks, and lm_head
    assert 0 < found[0][1].mean < found[0][0].mean < 1


def test_damage_and_unknown_forms_are_named_before_anything_is_loaded(models: dict[str, Path], tmp_path: Path) -> None:
    base, aligned = both(models, "fp8")[0]
    damaged, unknown = (Path(shutil.copytree(aligned, tmp_path / name)) for name in ("damaged", "unknown"))
    config = json.loads((aligned / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [8, 8]
    (damaged / "config.json").write_text(json.dumps(config))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (unknown / "config.json").write_text(json.dumps(config))
    for folder, words in ((damaged, "weight_scale_inv is F32"), (unknown, "is quantised, which is not supported")):
        with pytest.raises(PlanError, match=words):
            lox_merge.landscape(folder, PROMPTS, [NotRefused()], device="cpu")
        with pytest.raises(RequestError, match=words):
            lox_merge.curvature(folder, FIRST, device="cpu")
        with pytest.raises(PlanError, match=words):
            lox_merge.curvature(aligned, FIRST, finetuned={"other": folder}, device="cpu")
        with pytest.raises(PlanError, match=words):
            lox_merge.framing({"one": base, "other": folder}, FIRST, SECOND, device="cpu")
        model = AutoModelForCausalLM.from_pretrained(both(models, "fp8")[1][1])
        with pytest.raises(PlanError, match=words):
            RetainedAlignment(model, model.get_parameter, base=folder, factors=None, rank=2, seed=0, cache_dir=None)
