"""Reasoning blocks are taken out of replies before they are judged: the answer is what the user gets."""

from __future__ import annotations

import re

# Names in use by open-weight models: DeepSeek-R1, Qwen3 (think), Phi and others (thinking, reasoning, thought).
_NAMES = "think|thinking|reasoning|thought"
_CLOSED = re.compile(rf"<({_NAMES})>.*?</\1>", re.DOTALL | re.IGNORECASE)
_UNCLOSED = re.compile(rf"\A\s*<({_NAMES})>.*\Z", re.DOTALL | re.IGNORECASE)
_UNOPENED = re.compile(rf"\A.*?</({_NAMES})>", re.DOTALL | re.IGNORECASE)


def without_reasoning(reply: str) -> str:
    """The answer in a reply, stripped of white space at its ends; "" where there is none yet.

    Taken out are closed blocks anywhere, the text before a closing tag without an opening one (chat templates such as
    DeepSeek-R1's open the block in the prompt), and a block that opens the reply and is never closed: the model was still
    thinking when it ran out of tokens. An opening tag later on hides nothing, so no answer can be kept from the judges by one.
    """
    text = _CLOSED.sub("", reply)
    text = _UNOPENED.sub("", text)
    return _UNCLOSED.sub("", text).strip()
