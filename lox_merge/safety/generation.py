"""Replies of a model in memory: batched, the same for every batch size, resumable."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList

from lox_merge.errors import LoxMergeError, LoxMergeWarning, RequestError
from lox_merge.safety.adapted import load_any
from lox_merge.safety.batches import first_batch_size, is_out_of_memory, left_padded, release_memory
from lox_merge.safety.chat import Rendering, check_rendering, render
from lox_merge.safety.decoding import Decoding, SeededSampling, clean_config, end_tokens
from lox_merge.safety.loading import LoadedModel, weights_fingerprint
from lox_merge.safety.padding import Together, allowed_together
from lox_merge.safety.progress import ProgressFactory, no_progress
from lox_merge.safety.reply_store import ReplyStore
from lox_merge.safety.types import Prompt, PromptSet, Reply

# Tokens, drawn at random, on which padding is tried where no prompts are at hand.
_TRIED_TOKENS = 24


class LocalModel:
    """A ReplySource over a transformers model and its tokenizer.

    The model's weights may change between calls: nothing of them is kept, and the tokenizer stays the same. batch_size: None finds
    one; it is halved when memory runs out. store: a JSONL file of replies to go on from. source: what `identity` records of where the
    model came from.
    Raises RequestError for a rendering this tokenizer cannot give.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        decoding: Decoding | None = None,
        rendering: Rendering | None = None,
        *,
        batch_size: int | None = None,
        progress: ProgressFactory | None = None,
        title: str = "model",
        source: dict[str, Any] | None = None,
        store: Path | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise RequestError(f"a batch size of {batch_size} asks nothing; give 1 or more, or leave it out.")
        self.model, self.tokenizer = model, tokenizer
        self.decoding, self.rendering = decoding or Decoding(), rendering or Rendering()
        self.batch_size = batch_size
        self.store = store
        self._progress = progress or no_progress
        self._title, self._source = title, source
        self._said = self._said_of_padding = False
        self._rendered: dict[tuple[str, Rendering], list[list[int]]] = {}
        check_rendering(tokenizer, self.rendering)

    @classmethod
    def load(
        cls,
        reference: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        device_map: str | None = None,
        cache_dir: Path | None = None,
        trust_remote_code: bool = False,
        adapter_base: str | Path | None = None,
        base_is_right: bool = False,
        decode: bool = False,
        tokenizer: Any = None,
        **settings: Any,
    ) -> LocalModel:
        """Loads a folder or Hub id as `load_any` does: adapter_base is what a PEFT adapter lies over, decode is for quantised models.
        settings: those of the class.

        tokenizer: another than the model's own.
        """
        where: dict[str, Any] = {"device": device, "dtype": dtype, "device_map": device_map, "cache_dir": cache_dir}
        over: dict[str, Any] = {"adapter_base": adapter_base, "base_is_right": base_is_right, "decode": decode}
        loaded = load_any(reference, trust_remote_code=trust_remote_code, **over, **where)
        return cls.of(loaded, tokenizer=tokenizer, **settings)

    @classmethod
    def of(cls, loaded: LoadedModel, *, tokenizer: Any = None, **settings: Any) -> LocalModel:
        """A model loaded before."""
        chosen = loaded.tokenizer if tokenizer is None else tokenizer
        return cls(loaded.model, chosen, **{"title": loaded.title, "source": loaded.source, **settings})

    @property
    def title(self) -> str:
        return self._title

    def identity(self) -> dict[str, Any]:
        """Source, a fingerprint of the weights as they are now (one pass over them), dtype, decoding and rendering."""
        return {
            "kind": "local",
            "source": self._source,
            "weights": weights_fingerprint(self.model),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "decoding": self.decoding.identity(),
            "rendering": self.rendering.identity(self.tokenizer),
        }

    @contextmanager
    def storing(self, store: Path | None) -> Iterator[None]:
        """Another file of replies, or none, for the time of a `with` statement: one file holds the replies to one set."""
        before, self.store = self.store, store
        try:
            yield
        finally:
            self.store = before

    def replies(self, prompts: PromptSet) -> list[Reply]:
        """One reply per prompt, in order.

        Raises RequestError for a prompt that cannot be rendered or leaves no room in the model's context, LoxMergeError when
        memory ends at a batch of one.
        """
        store = ReplyStore(self.store, self.identity(), prompts) if self.store is not None else None
        with store or nullcontext():
            return self._replies(prompts, store)

    def _replies(self, prompts: PromptSet, store: ReplyStore | None) -> list[Reply]:
        finished = store.finished if store else {}
        rows = self._tokens(prompts)
        self._check_room(prompts.prompts, rows)
        # Longest first: memory that will not do fails at once, and a batch holds rows of like length. The sort is stable.
        waiting = sorted((i for i, prompt in enumerate(prompts.prompts) if prompt.identity not in finished), key=lambda i: -len(rows[i]))
        found = {i: finished[prompt.identity] for i, prompt in enumerate(prompts.prompts) if prompt.identity in finished}
        if not waiting:
            return [found[i] for i in range(len(rows))]
        if self.batch_size is None:
            self.batch_size = first_batch_size(self.model, len(rows[waiting[0]]) + self.decoding.max_new_tokens)
        with (
            self._progress(len(rows), f"{self.title}: replies") as progress,
            _plain(self.model, clean_config(self.model, self.tokenizer, self.decoding)),
        ):
            progress.advance(len(found))
            together = self._together([rows[i] for i in waiting])
            while waiting:
                batch = waiting[: 1 if together == "one" else self.batch_size]
                if together == "alike":  # `waiting` is sorted by length
                    batch = [i for i in batch if len(rows[i]) == len(rows[batch[0]])]
                replies = self._try_batch([prompts.prompts[i] for i in batch], [rows[i] for i in batch])
                if replies is None:
                    continue
                if store:
                    store.keep([(prompts.prompts[i].identity, reply) for i, reply in zip(batch, replies, strict=True)])
                found.update(zip(batch, replies, strict=True))
                del waiting[: len(batch)]
                progress.advance(len(batch))
        return [found[i] for i in range(len(rows))]

    def _together(self, rows: list[list[int]]) -> Together:
        """Which of the prompts may be asked in one batch; other than any is said once."""
        if self.batch_size == 1:
            return "any"
        found, reason = self._allowed(rows)
        if found is None:  # without padding nothing goes wrong, whatever the model
            return "alike"
        if found != "any" and not self._said:
            self._said = True
            asked = "prompts of one length are asked together" if found == "alike" else "one prompt is asked at a time"
            warnings.warn(f"{self.title}: {reason}, so only {asked}. That takes longer.", LoxMergeWarning, stacklevel=2)
        return found

    def _allowed(self, rows: list[list[int]]) -> tuple[Together | None, str]:
        """As `allowed_together` of the model as it is set now, and what is said of it where that is not any."""
        name = type(self.model).__name__
        try:
            found = allowed_together(self.model, rows, self.model.generation_config.pad_token_id)
        except (AttributeError, TypeError, ValueError) as error:  # a `generate` of the model's own, say
            return "alike", f"whether {name} says the same in a batch as by itself could not be tried ({type(error).__name__}: {error})"
        if found is None:
            return None, f"memory was too short to try whether {name} says the same in a batch as by itself"
        return found, f"{name} says something else in a batch with other prompts than by itself"

    def padded_batch_size(self) -> int | None:
        """The batch size for whoever pads prompts in a way of its own: 1, which is said once, where padding changes what this model says."""
        if self.batch_size == 1:
            return 1
        special = set(self.tokenizer.all_special_ids)
        ordinary = [token for token in range(min(len(self.tokenizer), self.model.config.get_text_config().vocab_size)) if token not in special]
        chosen = torch.randint(len(ordinary), (_TRIED_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
        row = [ordinary[index] for index in chosen]
        with _plain(self.model, clean_config(self.model, self.tokenizer, self.decoding)):
            found, reason = self._allowed([row, row[: _TRIED_TOKENS // 2]])
        if found == "any":
            return self.batch_size
        if not self._said_of_padding:
            self._said_of_padding = True
            warnings.warn(f"{self.title}: {reason}, so lm-eval is given one example at a time. That takes longer.", LoxMergeWarning, stacklevel=2)
        return 1

    def _tokens(self, prompts: PromptSet) -> list[list[int]]:
        """Token numbers of each prompt; kept, because a search or an attack asks one set again and again, of a model that changes."""
        key = prompts.sha256, self.rendering
        if key not in self._rendered:
            self._rendered[key] = [render(self.tokenizer, prompt.text, self.rendering) for prompt in prompts.prompts]
        return self._rendered[key]

    def _try_batch(self, prompts: list[Prompt], rows: list[list[int]]) -> list[Reply] | None:
        """The replies to one batch; None when it did not fit and the batch size was halved."""
        try:
            return self._batch(prompts, rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(rows) == 1:
                raise LoxMergeError(
                    f"memory ran out on a single prompt ({prompts[0].identity}, {len(rows[0])} tokens). Use a smaller dtype, "
                    "device_map='auto' over more devices, or an endpoint that serves the model."
                ) from error
        # Out of the except block: the exception holds the failed batch's tensors through its traceback.
        release_memory()
        self.batch_size = max(1, len(rows) // 2)
        return None

    @torch.no_grad()
    def _batch(self, prompts: list[Prompt], rows: list[list[int]]) -> list[Reply]:
        config = self.model.generation_config  # the clean one, put there by `replies`
        tokens, mask = left_padded(rows, config.pad_token_id, self.model.device)
        processors = LogitsProcessorList()
        if not self.decoding.greedy:
            processors.append(SeededSampling(self.decoding, [prompt.identity for prompt in prompts]))
        output = self.model.generate(input_ids=tokens, attention_mask=mask, logits_processor=processors)
        new = output[:, tokens.shape[1] :].tolist()
        ends = set(end_tokens(self.model, self.tokenizer))
        return [self._reply(prompt, row, ends) for prompt, row in zip(prompts, new, strict=True)]

    def _reply(self, prompt: Prompt, new: list[int], ends: set[int]) -> Reply:
        """What follows the end token is padding. The end token counts among the reply's tokens: the model chose it."""
        stop = next((place for place, token in enumerate(new) if token in ends), None)
        kept = new if stop is None else new[:stop]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        return Reply(prompt.text, text, finished=stop is not None, tokens=len(kept) + (stop is not None))

    def _check_room(self, prompts: tuple[Prompt, ...], rows: list[list[int]]) -> None:
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if room is None:
            return
        long = [prompt.identity for prompt, row in zip(prompts, rows, strict=True) if len(row) + self.decoding.max_new_tokens > room]
        if long:
            raise RequestError(
                f"{len(long)} prompt(s) ({', '.join(long[:5])}) of up to {max(map(len, rows))} tokens and {self.decoding.max_new_tokens} new ones "
                f"are more than the {room} tokens this model can see. Ask for fewer new tokens, or leave these prompts out."
            )


@contextmanager
def _plain(model: Any, config: Any) -> Iterator[None]:
    """The model in evaluation mode with a generation config of ours; both as before afterwards.

    A config given to `generate` would be filled up from the model's own: its repetition penalty and the like would leak in.
    """
    before, training = model.generation_config, model.training
    model.generation_config = config
    model.eval()
    try:
        yield
    finally:
        model.generation_config = before
        model.train(training)
