"""Inspections in which ALIGNED or FINETUNED is a PEFT adapter: the figures of the merged model."""

from __future__ import annotations

from pathlib import Path

import pytest
from adapters import TARGETS, make_adapter, merge
from tiny_models import make_pair

import lox_merge
from lox_merge.errors import PlanError


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_is_inspected_as_the_merged_model(tmp_path: Path, architecture: str) -> None:
    base, aligned = make_pair(tmp_path, architecture, "float32")
    adapter = make_adapter(aligned, tmp_path / "adapter", **TARGETS[architecture])
    merge(aligned, adapter, tmp_path / "merged")
    settings = lox_merge.InspectSettings(rank=3, full_spectrum=True)
    found = lox_merge.inspect(base, aligned, [adapter], settings=settings).to_json()
    expected = lox_merge.inspect(base, aligned, [tmp_path / "merged"], settings=settings).to_json()
    for one, other in zip(found["matrices"], expected["matrices"], strict=True):
        assert one["name"] == other["name"]
        (ours,), (theirs,) = one["finetuned"], other["finetuned"]
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-5, abs=1e-7), one["name"]
        for key in ("r", "ratio"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (one["name"], key)
    kept = [found["whole"]["finetuned"][0]["r"]["mean"], expected["whole"]["finetuned"][0]["r"]["mean"]]
    assert kept[0] == pytest.approx(kept[1], rel=1e-4) and kept[0] != found["whole"]["aligned"]["r"]["mean"]


def test_alignment_by_an_adapter_has_the_rank_of_its_factors(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "llama", "float32")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], r=4)
    document = lox_merge.inspect(base, adapter, [], settings=lox_merge.InspectSettings(rank=4, full_spectrum=True)).to_json()
    ratios = {matrix["name"]: matrix["aligned"]["r"] for matrix in document["matrices"]}
    assert {name for name, ratio in ratios.items() if ratio is not None} == {name for name in ratios if "q_proj" in name}
    assert all(ratio == pytest.approx(1.0) for name, ratio in ratios.items() if "q_proj" in name)


def test_an_adapter_over_another_model_is_refused(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", "float32")
    other, _ = make_pair(tmp_path / "other", "gpt2", "float32")
    adapter = make_adapter(other, tmp_path / "adapter", **TARGETS["gpt2"])
    with pytest.raises(PlanError, match="adapter"):
        lox_merge.inspect(base, aligned, [adapter])
