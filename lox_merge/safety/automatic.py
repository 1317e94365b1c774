"""What transformers is asked for a model that is given text alone: its class, and its tokenizer with the chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import SourceError

# In this order. The last is named for encoder-decoders, and has some models that hear and are none.
_LISTS = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
)


def auto_class(config: Any) -> Any:
    """transformers' automatic class that makes the checkpoint's own model of this configuration, such as AutoModelForCausalLM, or one for
    models that take pictures or sound beside text: they are given text alone. Where the configuration names no class, the first that fits.

    Raises SourceError for an encoder-decoder, whose replies are not what follows the prompt.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    kind = str(config.model_type)
    # Before the lists: of many encoder-decoders transformers makes a causal model, the decoder alone.
    if getattr(config, "is_encoder_decoder", False):
        raise SourceError(
            f"{kind} models read with an encoder and write with a decoder. What is measured here is how a model goes on from its prompt, which "
            "these do not. Harden it, and measure it with a tool made for such models."
        )
    known = {name: getattr(modeling_auto, models, {}).get(kind, ()) for name, models in _LISTS}
    named = getattr(config, "architectures", None) or ()
    its_own = [name for name, models in known.items() if set(named) & ({models} if isinstance(models, str) else set(models))]
    own_code = [name for name in known if name in (getattr(config, "auto_map", None) or {})]
    fitting = [name for name, models in known.items() if models]
    return getattr(transformers, (its_own or own_code or fitting or ["AutoModelForCausalLM"])[0])  # the last says what it does not know


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """options: of `from_pretrained`. Raises whatever transformers raises.

    Older models that take pictures keep their chat template in a file that their processor reads, and the tokenizer does not.
    """
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(folder, **options)
    beside = folder / "chat_template.json"
    if not found.chat_template and beside.is_file():
        held = parse_json(beside.read_bytes())
        found.chat_template = held.get("chat_template") if isinstance(held, dict) else None
    return found
