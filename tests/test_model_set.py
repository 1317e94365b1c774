"""Several models in turn: together or one at a time, adapters over what they lie on, every problem at once."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from adapters import make_adapter, merge
from tiny_models import make_pair, read_tensors

from lox_merge.errors import PlanError, RequestError
from lox_merge.safety import model_set
from lox_merge.safety.loading import in_memory, load_model
from lox_merge.safety.model_set import ModelSet


@pytest.mark.parametrize("together", [True, False])
def test_models_stay_or_go(tmp_path: Path, together: bool) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    with ModelSet({"base": base, "aligned": aligned}, device="cpu", together=together) as models:
        assert models.labels == ("base", "aligned")
        first = weakref.ref(models.get("base").model)
        models.get("aligned")
        gc.collect()
        assert (first() is not None) == together
        assert models.get("base").title == "base"
        second = weakref.ref(models.get("base").model)
    gc.collect()
    assert second() is None


def test_memory_decides_where_nobody_else_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    sources = {"base": base, "aligned": aligned}
    weights = 2 * sum(tensor.numel() * tensor.element_size() for tensor in read_tensors(aligned).values())
    with ModelSet(sources, device="cpu") as models:
        assert models.together
    monkeypatch.setattr(model_set, "free_memory", lambda _device: int(weights / 0.6) - 10)
    with ModelSet(sources, device="cpu") as models:
        assert not models.together
    monkeypatch.setattr(model_set, "free_memory", lambda _device: int(weights / 0.6) + 10)
    with ModelSet(sources, device="cpu") as models:
        assert models.together
    with ModelSet(sources, device="cpu", dtype="float32") as models:  # twice the bytes of what is stored
        assert not models.together


def test_an_adapter_lies_on_the_model_that_is_named_for_it(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", "float32")
    adapter = make_adapter(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    expected = merge(aligned, adapter)
    with ModelSet({"base": base, "aligned": aligned, "finetuned": adapter}, over={"finetuned": "aligned"}, device="cpu") as models:
        for name, value in models.get("finetuned").model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-6)


def test_every_problem_at_once(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    (aligned / "model-00002-of-00003.safetensors").write_bytes(b"cut")
    with pytest.raises(PlanError) as caught:
        ModelSet({"base": base, "aligned": aligned, "finetuned": tmp_path / "absent"}, device="cpu")
    assert len(caught.value.problems) == 2


def test_what_is_recorded_holds_no_path(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    with ModelSet({"base": base, "aligned": aligned}, device="cpu") as models:
        assert [found["title"] for found in models.identity().values()] == ["base", "aligned"]
        assert str(tmp_path) not in str(models.identity())


@pytest.mark.parametrize("together", [True, False])
def test_a_model_in_memory_stands_beside_files(tmp_path: Path, together: bool) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    made = load_model(aligned, device="cpu")
    given = in_memory(made.model, made.tokenizer, "made here")
    with ModelSet({"base": base, "made": given, "aligned": aligned}, device="cpu", together=together) as models:
        assert models.labels == ("base", "made", "aligned")
        assert models.get("made") is given
        models.get("base")
        assert models.get("made") is given
        assert models.get("aligned").title == "aligned"
        identity = models.identity()
        assert list(identity) == ["base", "made", "aligned"]
        assert identity["made"] == {"title": "made here", **given.source}
        with pytest.raises(RequestError, match="no files"):
            models.checkpoint("made")
    assert given.model.training is False
    assert sum(parameter.numel() for parameter in given.model.parameters())


def test_an_adapter_needs_files_below_it(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", "float32")
    adapter = make_adapter(aligned, tmp_path / "adapter", target_modules=["q_proj"])
    made = load_model(aligned, device="cpu")
    with pytest.raises(PlanError, match="Give aligned as a folder"):
        ModelSet({"base": base, "aligned": made, "finetuned": adapter}, over={"finetuned": "aligned"}, device="cpu")
