"""Tiny Llama models: built from a seed, or loaded from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lox_merge.lab.language import BEGIN, END, PAD, TOKEN, VOCABULARY
from lox_merge.lab.recipe import ATTENTION_HEADS, ToyRecipe

# Rotary embeddings do not depend on it; it is above 5 prompt words and the 60 new tokens evaluators like to ask for.
CONTEXT_LENGTH = 128


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for torch: sums in a fixed order, so the same seed gives the same bits. Restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars of transformers: a toy model loads before one could be read. Restored afterwards."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def build_model(recipe: ToyRecipe) -> PreTrainedModel:
    """An untrained Llama over the toy vocabulary, float32, on the CPU, from the recipe's seed; the global generator is left alone."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=recipe.hidden_size,
        intermediate_size=2 * recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=ATTENTION_HEADS,
        num_key_value_heads=ATTENTION_HEADS,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=False,
        pad_token_id=TOKEN[PAD],
        bos_token_id=TOKEN[BEGIN],
        eos_token_id=TOKEN[END],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def load_model(folder: Path) -> PreTrainedModel:
    """The checkpoint in `folder` as a float32 model on the CPU, ready for measurement. Never reaches for the Hub."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval()
