"""Log-probabilities at chosen positions, against a forward pass of one text at a time in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_pair
from transformers import AutoModelForCausalLM

from lox_merge.errors import NumericalError
from lox_merge.safety.log_probabilities import log_probabilities

ROWS = [[1, 6, 7, 8, 9], [1, 10], [1, 6, 11, 12]]
POSITIONS = [[1, 3, 4], [1], [0, 3]]


# Gemma caps its scores, GPT-2 ties its head, Mixtral routes tokens: none may see which rows share a batch.
@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt2", "mixtral"])
def test_equal_to_one_text_at_a_time(tmp_path: Path, architecture: str) -> None:
    _, aligned = make_pair(tmp_path, architecture, "float32")
    model = AutoModelForCausalLM.from_pretrained(aligned)
    exact = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float64, experts_implementation="eager").eval()
    model.train()
    for batch_size in (1, 2, 8):
        found = dict(log_probabilities(model, ROWS, POSITIONS, batch_size=batch_size))
        assert list(dict(log_probabilities(model, ROWS, POSITIONS, batch_size=batch_size))) == [0, 2, 1]  # long ones first, always
        for i, (row, positions) in enumerate(zip(ROWS, POSITIONS, strict=True)):
            with torch.no_grad():
                expected = exact(torch.tensor([row])).logits[0, positions].log_softmax(-1)
            assert found[i].dtype == torch.float32
            torch.testing.assert_close(found[i].double(), expected, rtol=1e-4, atol=1e-4)
    assert model.training


def test_scores_are_computed_only_from_the_first_position_asked_for(tmp_path: Path) -> None:
    """Prompts are long: the output head must not run over them."""
    _, aligned = make_pair(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(aligned)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[1]))
    list(log_probabilities(model, [[1, 6, 7, 8, 9], [1, 6, 7, 8]], [[3, 4], [3]]))
    assert seen == [2]


def test_memory_that_ends_halves_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, aligned = make_pair(tmp_path, "llama", "float32")
    model = AutoModelForCausalLM.from_pretrained(aligned)
    expected = dict(log_probabilities(model, ROWS, POSITIONS))
    sizes: list[int] = []
    forward = model.forward

    def small(input_ids: torch.Tensor, **rest: object) -> object:
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return forward(input_ids=input_ids, **rest)

    monkeypatch.setattr(model, "forward", small)
    found = dict(log_probabilities(model, ROWS, POSITIONS))
    assert sizes == [3, 1, 1, 1]
    for i, values in expected.items():
        torch.testing.assert_close(found[i], values, rtol=1e-4, atol=1e-5)


def test_scores_that_are_not_numbers_are_named(tmp_path: Path) -> None:
    _, aligned = make_pair(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(aligned)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="text 0 are not numbers"):
        list(log_probabilities(model, [[1, 6]], [[0, 1]]))
