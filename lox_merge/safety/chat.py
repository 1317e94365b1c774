"""A prompt as the tokens a model is given: through the tokenizer's chat template, or as plain text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lox_merge.errors import RequestError
from lox_merge.typed_fields import check_fields

_PROBE = "lighthouse"  # a word that no template writes by itself
_forms: dict[str, Literal["text", "parts"]] = {}  # by template: the same is asked for every prompt


@dataclass(frozen=True)
class Rendering:
    """system: a system message. prefill: what the assistant has already said; the model goes on from there.

    chat_template: False gives the model the bare text, for base models. True or None asks for the tokenizer's template.
    """

    system: str | None = None
    chat_template: bool | None = None
    prefill: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def identity(self, tokenizer: Any) -> dict[str, Any]:
        """What a result records; the template by its hash, since two models may come with different ones."""
        used = self.chat_template is not False
        template = tokenizer.chat_template if used else None
        return {
            "chat_template": used,
            "chat_template_sha256": None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
            "system": self.system,
            "prefill": self.prefill,
        }


def apply_template(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
    """The conversation as the chat template writes it. options: of `apply_chat_template`. Raises RequestError, and whatever the template raises.

    Templates of models that take pictures loop over the parts of a message and write nothing of a plain string: they get each text as a part.
    """
    turns: list[dict[str, Any]] = [dict(turn) for turn in messages]
    if content_form(tokenizer) == "parts":
        turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, **options))


def content_form(tokenizer: Any) -> Literal["text", "parts"]:
    """How the template wants a message's content: as a string, or as a list of parts. Raises RequestError where it shows neither."""
    key = str(tokenizer.chat_template)
    if key not in _forms:
        shown: dict[str, bool | None] = {}
        for form, content in (("text", _PROBE), ("parts", [{"type": "text", "text": _PROBE}])):
            try:
                shown[form] = _PROBE in str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
            except Exception:  # templates are programs: they raise whatever their own code runs into
                shown[form] = None
        if shown == {"text": False, "parts": False}:
            raise RequestError("the tokenizer's chat template writes nothing of what a user says. Repair it, or pass --no-chat-template.")
        # What it cannot render at all is said when it is asked to.
        _forms[key] = "parts" if shown["parts"] and not shown["text"] else "text"
    return _forms[key]


def check_rendering(tokenizer: Any, rendering: Rendering) -> None:
    """Raises RequestError for a rendering this tokenizer cannot give, before any work is done."""
    if rendering.chat_template is False:
        if rendering.system is not None:
            raise RequestError("a plain text has no place for a system message: leave out --system or --no-chat-template.")
        return
    if not tokenizer.chat_template:
        raise RequestError(
            "the tokenizer has no chat template, as is usual for base models. Pass --no-chat-template to give the model the bare prompts, "
            "or add the template of the aligned model to its folder."
        )
    content_form(tokenizer)
    if rendering.system is not None and rendered_text(tokenizer, "x", rendering) == rendered_text(
        tokenizer, "x", Rendering(prefill=rendering.prefill)
    ):
        raise RequestError("the chat template drops system messages, so --system would have no effect. Put the text into the prompts instead.")


def rendered_text(tokenizer: Any, prompt: str, rendering: Rendering) -> str:
    """The text before tokenization, with the special tokens the template writes and the prefill at its end. Raises RequestError."""
    prefill = rendering.prefill or ""
    if rendering.chat_template is False:
        return prompt + prefill
    messages = [{"role": "system", "content": rendering.system}] if rendering.system is not None else []
    messages.append({"role": "user", "content": prompt})
    if prefill:
        messages.append({"role": "assistant", "content": prefill})
    try:
        # Only the template knows what stands between the assistant's header and its words, so it renders the prefill too.
        return apply_template(tokenizer, messages, add_generation_prompt=not prefill, continue_final_message=bool(prefill))
    except RequestError:
        raise
    except Exception as error:  # templates are programs: they raise jinja2's errors and whatever their own code runs into
        options = " and ".join(name for name, value in (("--system", rendering.system), ("--prefill", rendering.prefill)) if value is not None)
        advice = f"It may not allow {options}; try without." if options else "Repair the template, or pass --no-chat-template."
        raise RequestError(f"the tokenizer's chat template cannot render the prompt {_short(prompt)}: {error}. {advice}") from error


def render(tokenizer: Any, prompt: str, rendering: Rendering) -> list[int]:
    """Token numbers of one prompt, ready for generation. Raises RequestError for text the tokenizer or template cannot take."""
    text = rendered_text(tokenizer, prompt, rendering)
    template = rendering.chat_template is not False
    try:
        # A template writes the tokenizer's special tokens itself; adding them again gives a second BOS, which changes the replies.
        tokens: list[int] = list(tokenizer(text, add_special_tokens=not template)["input_ids"])
        bare: list[int] = tokens if template else list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as error:  # the Rust tokenizers raise a bare Exception
        shown = "" if text == prompt else f" as it is rendered ({_ends(text)})"
        raise RequestError(f"the tokenizer cannot encode the prompt {_short(prompt)}{shown}: {error}.") from error
    end = tokenizer.eos_token_id
    if end is not None and len(tokens) > len(bare) and tokens[-1] == end and bare[-1:] != [end]:
        tokens = tokens[:-1]  # some tokenizers close every text; a model that reads its end token has nothing left to say
    if not tokens:
        raise RequestError(f"the prompt {_short(prompt)} has no tokens. Remove it, or use a tokenizer that knows its words.")
    return tokens


def continued(tokenizer: Any, turns: Sequence[dict[str, str]]) -> str:
    """A conversation up to the last word of its last turn, as the chat template writes it. Raises RequestError."""
    return conversation_text(tokenizer, turns, continue_final_message=True)


def conversation_text(tokenizer: Any, turns: Sequence[Mapping[str, str]], **options: Any) -> str:
    """A conversation as the chat template writes it. options: of `apply_chat_template`. Raises RequestError."""
    try:
        return apply_template(tokenizer, turns, **options)
    except RequestError:
        raise
    except Exception as error:  # templates are programs: they raise whatever their own code runs into
        raise RequestError(f"the tokenizer's chat template cannot render a conversation: {error}. Correct its messages.") from error


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Token numbers of a text that a template rendered. Raises RequestError."""
    try:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    except Exception as error:  # the Rust tokenizers raise a bare Exception
        raise RequestError(f"the tokenizer cannot encode {_short(text)}: {error}.") from error


def _ends(text: str) -> str:
    """Both ends: a template writes at the first, and a prefill is the second."""
    return repr(text if len(text) <= 120 else f"{text[:57]} ... {text[-57:]}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
