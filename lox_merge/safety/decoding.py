"""How the next token is chosen: greedily, or by sampling that does not depend on the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from lox_merge.errors import RequestError
from lox_merge.typed_fields import check_fields


@dataclass(frozen=True)
class Decoding:
    """max_new_tokens: 60 as the LoX authors. temperature: 0 is greedy. top_p: in (0, 1]; 1 keeps every token. seed: of sampling."""

    max_new_tokens: int = 60
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens is {self.max_new_tokens}; a reply needs 1 or more.")
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature is {self.temperature}; give 0 for greedy decoding, or a positive number.")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; give a number above 0 and at most 1.")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def identity(self) -> dict[str, Any]:
        """What a result records; settings without effect on greedy replies are left out."""
        return {"max_new_tokens": self.max_new_tokens, "temperature": 0.0} if self.greedy else asdict(self)


# A number that no tensor of token numbers can hold.
_LARGEST = 2**63


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a reply: of the generation config, else of the model's config, else of the tokenizer. May be empty."""
    config = getattr(model, "generation_config", None)
    for value in (getattr(config, "eos_token_id", None), getattr(model.config, "eos_token_id", None), tokenizer.eos_token_id):
        if value is not None:
            return [_token(token) for token in value] if isinstance(value, (list, tuple)) else [_token(value)]
    return []


def _token(value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = _LARGEST
    if not -_LARGEST < number < _LARGEST:
        raise RequestError(
            f"the model's end or padding token is {value!r}, which is no number of a token. Mend its config.json and generation_config.json."
        )
    return number


def padding_token(model: Any, tokenizer: Any) -> int:
    """A token to fill batches with. Padding is masked, so any will do where neither tokenizer nor model names one that the model has (some
    say -1, or a number behind the vocabulary).
    """
    there = range(model.get_input_embeddings().num_embeddings)
    for value in (tokenizer.pad_token_id, getattr(getattr(model, "generation_config", None), "pad_token_id", None), *end_tokens(model, tokenizer)):
        if value is not None and (token := _token(value)) in there:
            return token
    return 0


def clean_config(model: Any, tokenizer: Any, decoding: Decoding) -> GenerationConfig:
    """Plain greedy search of at most max_new_tokens: nothing of the model's own settings but its end tokens.

    Sampling too runs as greedy search, over scores that `SeededSampling` has reduced to the token it drew.
    """
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=end_tokens(model, tokenizer) or None,
        pad_token_id=padding_token(model, tokenizer),
        use_cache=True,
    )


class SeededSampling(LogitsProcessor):  # type: ignore[misc]
    """Draws every token by inverting the cumulative distribution at a number that only seed, prompt and position decide.

    So a sampled reply, like a greedy one, does not depend on which prompts share its batch.
    """

    def __init__(self, decoding: Decoding, identities: Sequence[str]) -> None:
        self._decoding = decoding
        self._uniform = torch.stack([_uniform(decoding, identity) for identity in identities])  # (prompts, new tokens)
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores (prompts, vocabulary): 0 for the token drawn, -inf for the others."""
        drawn = self._draw(scores, self._uniform[:, self._step].to(scores.device))
        self._step += 1
        return torch.full_like(scores, float("-inf")).scatter_(1, drawn, 0.0)

    def _draw(self, scores: Tensor, uniform: Tensor) -> Tensor:
        # float64: over 100,000 tokens, float32 sums are off by more than a rare token's probability.
        falling, order = (scores.double() / self._decoding.temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
        cumulative = falling.cumsum(-1)
        # The fewest leading tokens that reach top_p (Holtzman et al. 2020): all that start below it.
        kept = (cumulative - falling < self._decoding.top_p).sum(-1, keepdim=True)
        mass = cumulative.gather(1, kept - 1)
        place = torch.searchsorted(cumulative, uniform[:, None] * mass, right=True)
        # Rounding may put the last number drawn on the mass itself, one place too far.
        drawn: Tensor = order.gather(1, torch.minimum(place, kept - 1))
        return drawn


def _uniform(decoding: Decoding, identity: str) -> Tensor:
    seed = hashlib.sha256(f"{decoding.seed} {identity}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
    return torch.rand(decoding.max_new_tokens, generator=generator, dtype=torch.float64)
