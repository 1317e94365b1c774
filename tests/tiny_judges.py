"""Judge models for tests, made on the spot from the toy language: nothing is downloaded, nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from lox_merge.lab.language import BEGIN, END, PAD, TOKEN, VOCABULARY
from lox_merge.lab.tokenizer import build_tokenizer

_SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 128}
_TOKENS = {"pad_token_id": TOKEN[PAD], "bos_token_id": TOKEN[BEGIN], "eos_token_id": TOKEN[END]}
# Any messages, one after the other; the laboratory's own template knows no assistant's turn that a guard reads.
_TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


def sequence_classifier(folder: Path, labels: Sequence[str] = ("harmless", "harmful"), seed: int = 0) -> Path:
    """A random classifier whose answers differ between replies."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(VOCABULARY), **_SHAPE, **_TOKENS, initializer_range=0.5, num_labels=len(labels))
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    LlamaForSequenceClassification(config).save_pretrained(folder)
    build_tokenizer(chat=False).save_pretrained(folder)
    return folder


def writing_guard(folder: Path, word: str, *, template: str | bool = True) -> Path:
    """A causal model that writes one word and ends, whatever it reads."""
    config = LlamaConfig(vocab_size=len(VOCABULARY), **_SHAPE, **_TOKENS, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # The blocks add nothing, so the last token alone decides: anything is followed by the word, the word by the end.
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.zero_()
        embedding[:, 0] = 1
        embedding[TOKEN[word]] = torch.eye(16)[1]
        head.zero_()
        head[TOKEN[word], 0] = 1
        head[TOKEN[END], 1] = 1
    model.save_pretrained(folder)
    tokenizer = build_tokenizer(chat=False)
    if template:
        tokenizer.chat_template = _TEMPLATE if template is True else template
    tokenizer.save_pretrained(folder)
    return folder
