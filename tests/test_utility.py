"""Perplexity, exact match and KL against independent float64 computations."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from statsmodels.stats.proportion import proportion_confint
from tiny_models import make_pair
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from lox_merge.errors import NumericalError, RequestError
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.lab.language import comply
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import draw_requests
from lox_merge.safety.chat import Rendering, render
from lox_merge.safety.divergence import kl_divergence, reference_log_probabilities
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.types import Prompt, PromptSet
from lox_merge.safety.utility import Questions, exact_match, load_questions, perplexity

Pair = tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerFast]
WORDS = ["how", "do", "i", "you", "help", "no", "yes", "sorry", "cannot"]
TEXTS = [" ".join(WORDS[(i * i + 3 * j) % 9] for j in range(length)) for i, length in enumerate((50, 1, 7, 33))]


def ask(*texts: str) -> PromptSet:
    return prompt_set([Prompt(str(i), text) for i, text in enumerate(texts)], "tests")


PROMPTS = ask(*(" ".join(WORDS[: 1 + i % 9]) for i in range(11)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Base, aligned (float32) and the aligned model's tokenizer; GPT-2, whose absolute positions show a wrong window."""
    base, aligned = make_pair(tmp_path_factory.mktemp("pair"), "gpt2", "float32", aligned_shards=1, change=0.8)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (base, aligned)]
    return models[0], models[1], AutoTokenizer.from_pretrained(aligned)


def exact_log_probabilities(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """(tokens, vocabulary) by a copy of the model in float64 and numpy's own log-softmax."""
    double = type(model)(model.config).double().eval()
    double.load_state_dict(model.state_dict())
    with torch.no_grad():
        scores = double(torch.tensor([tokens])).logits[0].numpy()
    assert scores.dtype == np.float64
    shifted = scores - scores.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def exact_losses(model: PreTrainedModel, tokens: list[int], window: int, stride: int) -> list[float]:
    """Loss of every token but the first, each in the first of the windows [0, w), [s, s + w), … that holds it with a context."""
    losses = []
    for position in range(1, len(tokens)):
        begin = next(b for b in range(0, len(tokens), stride) if position < b + window)
        losses.append(-exact_log_probabilities(model, tokens[begin : begin + window])[position - begin - 1, tokens[position]])
    return losses


@pytest.mark.parametrize(("window", "stride"), [(None, None), (16, 8), (16, 15), (16, 1), (5, 3)])
def test_perplexity_is_that_of_float64(pair: Pair, window: int | None, stride: int | None) -> None:
    _, model, words = pair
    losses = [loss for text in TEXTS for loss in exact_losses(model, words(text)["input_ids"], window or 64, stride or 32)]
    found = perplexity(model, words, TEXTS, window=window, stride=stride)
    assert found.n == len(losses) == 49 + 0 + 6 + 32 and found.texts == 4
    assert found.value == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


def test_a_longer_context_changes_perplexity_so_windows_matter(pair: Pair) -> None:
    _, model, words = pair
    values = [perplexity(model, words, TEXTS, window=window, stride=1).value for window in (2, 5, 64)]
    assert all(abs(a - b) > 1e-4 * b for a, b in itertools.pairwise(values) if a is not None and b is not None)


def test_perplexity_is_undefined_where_nothing_is_scored(pair: Pair) -> None:
    _, model, words = pair
    for texts in ([], ["how"], ["", " "]):
        found = perplexity(model, words, texts)
        assert (found.value, found.n) == (None, 0)
    for window, stride in ((1, 1), (8, 8), (8, 0), (65, 8)):
        with pytest.raises(RequestError, match="stride"):
            perplexity(model, words, TEXTS, window=window, stride=stride)


def test_broken_weights_give_an_error_and_no_number(pair: Pair) -> None:
    base, aligned, words = pair
    reference = reference_log_probabilities(aligned, words, PROMPTS)
    broken = type(base)(base.config)
    broken.load_state_dict(base.state_dict())
    with torch.no_grad():
        broken.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        perplexity(broken, words, TEXTS)
    with pytest.raises(NumericalError, match="not numbers"):
        kl_divergence(reference, broken)


@pytest.mark.parametrize("last", [None, 1, 3])
def test_kl_is_that_of_float64(pair: Pair, last: int | None) -> None:
    base, aligned, words = pair
    terms = []
    for prompt in PROMPTS.prompts:
        tokens = words.apply_chat_template([{"role": "user", "content": prompt.text}], add_generation_prompt=True)["input_ids"]
        p, q = exact_log_probabilities(aligned, tokens), exact_log_probabilities(base, tokens)
        terms += list((np.exp(p) * (p - q)).sum(-1)[-last if last else None :])
    for batch_size in (1, 4, 100):
        reference = reference_log_probabilities(aligned, words, PROMPTS, last=last, batch_size=batch_size)
        found = kl_divergence(reference, base, batch_size=batch_size)
        assert (found.n, found.prompts) == (len(terms), 11)
        assert found.value == pytest.approx(np.mean(terms), rel=1e-4)


def test_kl_is_not_symmetric_and_zero_for_the_same_model(pair: Pair) -> None:
    base, aligned, words = pair
    forth = kl_divergence(reference_log_probabilities(aligned, words, PROMPTS), base).value
    back = kl_divergence(reference_log_probabilities(base, words, PROMPTS), aligned).value
    assert forth is not None and back is not None and abs(forth - back) > 1e-3 * forth
    assert kl_divergence(reference_log_probabilities(aligned, words, PROMPTS), aligned).value == 0.0


def test_kl_edges(pair: Pair, tmp_path: Path) -> None:
    base, aligned, words = pair
    nothing = kl_divergence(reference_log_probabilities(aligned, words, ask()), base)
    assert (nothing.value, nothing.n, nothing.prompts) == (None, 0, 0)
    other = AutoModelForCausalLM.from_pretrained(make_pair(tmp_path, "gpt2", "float32", vocabulary=90)[0])
    with pytest.raises(RequestError, match="96 tokens in its vocabulary and the model 90"):
        kl_divergence(reference_log_probabilities(aligned, words, PROMPTS), other)
    with pytest.raises(RequestError, match="last 0"):
        reference_log_probabilities(aligned, words, PROMPTS, last=0)


def test_a_token_ruled_out_by_both_adds_nothing_and_by_the_model_alone_is_an_error(
    pair: Pair,
) -> None:
    base, aligned, words = pair

    def rule_out(_module: object, _arguments: object, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([90]), float("-inf"))

    plain = reference_log_probabilities(aligned, words, PROMPTS)
    handles = [aligned.lm_head.register_forward_hook(rule_out), base.lm_head.register_forward_hook(rule_out)]
    try:
        value = kl_divergence(reference_log_probabilities(aligned, words, PROMPTS), base).value
        with pytest.raises(NumericalError, match="rules out"):
            kl_divergence(plain, base)
    finally:
        for handle in handles:
            handle.remove()
    assert value == pytest.approx(kl_divergence(plain, base).value, rel=0.1)


def test_the_reference_stands_for_the_model_it_came_from_after_its_weights_changed(toy_pair_seed0: ToyPair) -> None:
    source = LocalModel.load(toy_pair_seed0.aligned, device="cpu", dtype="float32")
    prompts = ask(*(request.text for request in draw_requests(ToyRecipe(seed=0)).tests.allowed[:20]))
    reference = reference_log_probabilities(source.model, source.tokenizer, prompts)
    base = AutoModelForCausalLM.from_pretrained(toy_pair_seed0.base, dtype=torch.float32)
    wanted = kl_divergence(reference, base).value
    source.model.load_state_dict(base.state_dict())
    assert kl_divergence(reference, source.model).value == wanted
    assert wanted is not None and wanted > 0.01
    rows = [render(source.tokenizer, prompt.text, Rendering()) for prompt in prompts.prompts]
    assert [len(values) for values in reference.log_probabilities] == [len(row) for row in rows] == [5] * 20


def test_exact_match_counts_equal_replies_whatever_their_white_space(toy_pair_seed0: ToyPair) -> None:
    requests = draw_requests(ToyRecipe(seed=0)).tests.allowed[:40]
    source = LocalModel.load(toy_pair_seed0.aligned, device="cpu")
    answers = ["  ".join(comply(request)[:-1]) + "\n" for request in requests]
    answers[:10] = ["something else"] * 10
    found = exact_match(source, Questions(ask(*(request.text for request in requests)), tuple(answers)))
    right = sum(reply.text.split() == answer.split() for reply, answer in zip(source.replies(ask(*(r.text for r in requests))), answers, strict=True))
    assert 20 < right <= 30
    assert (found.correct, found.n, found.rate) == (right, 40, right / 40)
    assert found.interval == pytest.approx(proportion_confint(right, 40, method="wilson"))
    nothing = exact_match(source, Questions(ask(), ()))
    assert (nothing.rate, nothing.n, nothing.interval) == (None, 0, None)


def test_questions_are_read_from_both_columns(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text('question,answer\n"1, 2",x y\nv2,3\n')
    (tmp_path / "q.jsonl").write_text("\n".join(json.dumps(row) for row in ({"Question": "1, 2", "Answer": "x y"}, {"Question": "v2", "Answer": 3})))
    first, second = load_questions(tmp_path / "q.csv"), load_questions(tmp_path / "q.jsonl")
    assert first.answers == second.answers == ("x y", "3")
    assert first.prompts.prompts == second.prompts.prompts
    (tmp_path / "r.csv").write_text("question,reply\nv1,x\n")
    assert load_questions(tmp_path / "r.csv", answer="reply").answers == ("x",)
    with pytest.raises(RequestError, match="It has: question, reply"):
        load_questions(tmp_path / "r.csv")
    (tmp_path / "s.csv").write_text("question,answer\nv1,x\nv2,\n")
    with pytest.raises(RequestError, match=r"answer is empty in row\(s\) 2"):
        load_questions(tmp_path / "s.csv")
    (tmp_path / "t.txt").write_text("v1\n")
    with pytest.raises(RequestError, match="no rows"):
        load_questions(tmp_path / "t.txt")
