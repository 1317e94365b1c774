"""A real Hugging Face tokenizer for the toy language: one token a word, split at white space."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from lox_merge.lab.language import ARROW, BEGIN, END, PAD, TOKEN

# Renders a user message "v3 a7 n12" to the prompt the model was trained on, "<bos> v3 a7 n12 =>". The language has no
# system messages; a template that dropped them silently would hide that from whoever sends one.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ bos_token + ' ' + message['content'] }}"
    f"{{% elif message['role'] == 'assistant' %}}{{{{ ' {ARROW} ' + message['content'] + ' ' + eos_token }}}}"
    "{% else %}{{ raise_exception('the toy language has only user and assistant messages') }}{% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ ' {ARROW}' }}}}{{% endif %}}"
)


def build_tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    """The tokenizer of an aligned model (chat) or of a base model (no chat template), padding on the left for generation.

    There is no token for unknown words: text outside the language raises, where a stand-in would be answered like a word.
    """
    words = Tokenizer(WordLevel(dict(TOKEN)))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
