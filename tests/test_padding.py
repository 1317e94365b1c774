"""Batches of models whose layers see padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_architectures import Architecture, small_model
from tiny_models import tokenizer

from lox_merge.errors import LoxMergeWarning
from lox_merge.safety.chat import Rendering, render
from lox_merge.safety.decoding import Decoding, clean_config
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.padding import allowed_together
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.types import Prompt

TEXTS = ("how do i", "no yes", "do you help", "you cannot help how do i help you yes no sorry", "yes", "sorry", "i help you")
UNEQUAL = prompt_set([Prompt(str(i), text) for i, text in enumerate(TEXTS)], "tests")
PLAIN = Rendering(chat_template=False)


def written(folder: Path, architecture: str) -> Path:
    torch.manual_seed(3)
    small_model(Architecture(architecture)).float().save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        # Freshly drawn weights give nearly the same scores after every prompt.
        stored = load_file(file).items()
        tensors = {name: value + 0.05 * torch.randn_like(value) if value.is_floating_point() else value for name, value in stored}
        save_file(tensors, file, metadata={"format": "pt"})
    tokenizer().save_pretrained(folder)
    return folder


def replies(folder: Path, size: int) -> list[tuple[str, int | None]]:
    source = LocalModel.load(folder, device="cpu", decoding=Decoding(max_new_tokens=8), rendering=PLAIN, batch_size=size)
    source.tokenizer.decode = lambda tokens, **_: " ".join(map(str, tokens))  # words that have no name, too
    return [(reply.text, reply.tokens) for reply in source.replies(UNEQUAL)]


@pytest.mark.parametrize(
    ("architecture", "said"), [("deepseek_v4", "only prompts of one length are asked together"), ("rwkv", "only one prompt is asked at a time")]
)
def test_replies_do_not_depend_on_the_batch_where_layers_do(architecture: str, said: str, tmp_path: Path) -> None:
    """DeepSeek V4 compresses blocks of tokens, which padding cuts elsewhere; transformers' RWKV is not made for batches."""
    folder = written(tmp_path, architecture)
    alone = replies(folder, 1)
    assert len(set(alone)) > 4
    with pytest.warns(LoxMergeWarning, match=said) as caught:
        assert replies(folder, 6) == alone
    assert len([one for one in caught if issubclass(one.category, LoxMergeWarning)]) == 1


@pytest.mark.parametrize("architecture", ["llama", "mamba", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_reason(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = LocalModel.load(written(tmp_path, architecture), device="cpu", dtype=str(dtype).removeprefix("torch."), rendering=PLAIN)
    source.model.generation_config = clean_config(source.model, source.tokenizer, Decoding())
    rows = [render(source.tokenizer, text, PLAIN) for text in TEXTS]
    assert allowed_together(source.model, rows, 0) == "any"
    assert allowed_together(source.model, rows[:1], 0) == "any"


def test_who_pads_by_itself_is_given_one_example_where_padding_matters(tmp_path: Path) -> None:
    sees = LocalModel.load(written(tmp_path / "sees", "deepseek_v4"), device="cpu", rendering=PLAIN)
    with pytest.warns(LoxMergeWarning, match="DeepseekV4ForCausalLM says something else .* lm-eval is given one example at a time") as caught:
        assert sees.padded_batch_size() == 1
        assert sees.padded_batch_size() == 1
    assert len([one for one in caught if issubclass(one.category, LoxMergeWarning)]) == 1
    plain = LocalModel.load(written(tmp_path / "plain", "llama"), device="cpu", rendering=PLAIN, batch_size=7)
    before = plain.model.generation_config
    assert plain.padded_batch_size() == 7
    assert plain.model.generation_config is before
    plain.batch_size = None
    assert plain.padded_batch_size() is None


def test_a_generate_that_cannot_be_asked_for_scores_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path, "llama")
    alone = replies(folder, 1)
    source = LocalModel.load(folder, device="cpu", decoding=Decoding(max_new_tokens=8), rendering=PLAIN, batch_size=3)
    generate, sizes = source.model.generate, []

    def its_own(input_ids: Any, attention_mask: Any, logits_processor: Any = None) -> Any:
        sizes.append(tuple(input_ids.shape))
        return generate(input_ids=input_ids, attention_mask=attention_mask, logits_processor=logits_processor)

    monkeypatch.setattr(source.model, "generate", its_own)
    monkeypatch.setattr(source.tokenizer, "decode", lambda tokens, **_: " ".join(map(str, tokens)))
    with pytest.warns(LoxMergeWarning, match="could not be tried .TypeError.* so only prompts of one length"):
        assert [(reply.text, reply.tokens) for reply in source.replies(UNEQUAL)] == alone
    assert sizes == [(1, 11), (3, 3), (1, 2), (2, 1)]


def test_a_model_is_looked_at_once_and_memory_may_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = LocalModel.load(written(tmp_path, "llama"), device="cpu", rendering=PLAIN, batch_size=3, decoding=Decoding(max_new_tokens=2))
    calls: list[int] = []
    generate = source.model.generate

    def counted(**options: Any) -> Any:
        calls.append(len(options["input_ids"]))
        if memory and len(options["input_ids"]) > 1:
            raise torch.OutOfMemoryError
        return generate(**options)

    monkeypatch.setattr(source.model, "generate", counted)
    memory = True
    first = source.replies(UNEQUAL)
    assert calls[:4] == [1, 1, 1, 2] and len(first) == calls[4:].count(1), "no batch of two fits"
    calls.clear()
    memory, source.batch_size = False, 3
    assert source.replies(UNEQUAL) == first and calls == [1, 1, 1, 2, 2, 2, 3, 3, 1]
    calls.clear()
    assert source.replies(UNEQUAL) == first and calls == [3, 3, 1]
