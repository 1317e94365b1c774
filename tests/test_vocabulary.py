"""Which models may be compared token by token."""

from __future__ import annotations

import copy

import pytest
from tiny_models import WORDS, tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lox_merge.errors import RequestError
from lox_merge.safety.vocabulary import common_vocabulary, same_tokens


def renamed(number: int, text: str) -> PreTrainedTokenizerFast:
    words = {word if i != number else text: i for i, word in enumerate(WORDS)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), unk_token="<unk>")


def test_one_tokenizer_and_one_size() -> None:
    one = tokenizer()
    assert common_vocabulary({"base": (96, one), "aligned": (96, copy.deepcopy(one))}) == 96


def test_sizes_that_differ_are_refused_and_the_shared_part_offered() -> None:
    one, longer = tokenizer(), tokenizer()
    longer.add_tokens(["<pad>"])
    models_ = {"base": (96, one), "aligned": (97, longer)}
    with pytest.raises(RequestError, match=r"base 96, aligned 97.*KL between them is undefined.*--shared-vocabulary"):
        common_vocabulary(models_)
    assert common_vocabulary(models_, shared=True) == 96


@pytest.mark.parametrize("shared", [False, True])
def test_other_names_for_a_number_are_refused_also_when_shared(shared: bool) -> None:
    with pytest.raises(RequestError, match=rf"different vocabularies \(token {WORDS.index('i')} is 'i' and 'we'\)"):
        common_vocabulary({"base": (96, tokenizer()), "aligned": (97, renamed(WORDS.index("i"), "we"))}, shared=shared)


def test_names_beyond_the_shared_part_do_not_matter() -> None:
    other = renamed(len(WORDS) - 1, "never")
    assert same_tokens(tokenizer(), other, len(WORDS) - 1) == []
    assert same_tokens(tokenizer(), other, len(WORDS)) == ["token 14 is 'cannot' and 'never'"]
