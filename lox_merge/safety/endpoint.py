"""Replies of a model served elsewhere: any OpenAI-compatible chat endpoint (vLLM, SGLang, TGI, or OpenAI itself)."""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from lox_merge.errors import LoxMergeError, RequestError
from lox_merge.safety.chat import Rendering
from lox_merge.safety.decoding import Decoding
from lox_merge.safety.progress import ProgressFactory, no_progress
from lox_merge.safety.reply_store import ReplyStore
from lox_merge.safety.requests import answers
from lox_merge.safety.types import Prompt, PromptSet, Reply, without_halves

KEY_VARIABLE = "OPENAI_API_KEY"
# An answer that is not what the protocol says, with status 200: worth asking again, but not as often as a busy server.
_BROKEN_ANSWERS = 3


class EndpointModel:
    """A ReplySource over `url`/chat/completions.

    key_variable: environment variable that holds the key. no_key: the endpoint needs none, so a missing variable is no error.
    concurrency: requests under way at once. timeout: seconds for one answer. retries: further attempts after 408, 409, 429
    (after the delay the server asks for), 5xx, time-outs and broken connections, with growing pauses.
    store: a JSONL file of replies to go on from. Raises RequestError: package missing, key missing, or a rendering that only
    the server could do.
    """

    def __init__(
        self,
        url: str,
        model: str,
        decoding: Decoding | None = None,
        rendering: Rendering | None = None,
        *,
        key_variable: str = KEY_VARIABLE,
        no_key: bool = False,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 6,
        progress: ProgressFactory | None = None,
        store: Path | None = None,
    ) -> None:
        self.decoding, self.rendering = decoding or Decoding(), rendering or Rendering()
        if self.rendering.prefill is not None or self.rendering.chat_template is False:
            raise RequestError("an endpoint renders the chat itself: --prefill and --no-chat-template need the model in a folder or on the Hub.")
        if concurrency < 1 or retries < 0 or not 0 < timeout < math.inf:
            raise RequestError(f"concurrency {concurrency}, retries {retries}, timeout {timeout}: give at least 1, at least 0, and above 0 seconds.")
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise RequestError(f"the endpoint {_public(url)} is not a URL such as http://localhost:8000/v1.")
        self._title, self._url, self._concurrency = model, url, concurrency
        self._progress = progress or no_progress
        self.store = store
        self._client = _client(url, endpoint_key(key_variable, no_key), timeout, retries)

    @property
    def title(self) -> str:
        return self._title

    def identity(self) -> dict[str, Any]:
        """Model name, endpoint (without user, password and query), decoding and system message. What is served there is not checked."""
        return {
            "kind": "endpoint",
            "endpoint": _public(self._url),
            "model": self._title,
            "decoding": self.decoding.identity(),
            "rendering": {"system": self.rendering.system},
        }

    def replies(self, prompts: PromptSet) -> list[Reply]:
        """One reply per prompt, in order. Raises LoxMergeError naming the prompt that failed for good; earlier ones are kept in a store."""
        store = ReplyStore(self.store, self.identity(), prompts) if self.store is not None else None
        with store or nullcontext():
            return self._replies(prompts, store)

    def _replies(self, prompts: PromptSet, store: ReplyStore | None) -> list[Reply]:
        found = store.finished if store else {}
        waiting = [prompt for prompt in prompts.prompts if prompt.identity not in found]
        with self._progress(len(prompts), f"{self.title}: replies") as progress:
            progress.advance(len(found))
            for place, reply in answers(self._ask, waiting, self._concurrency):
                name = waiting[place].identity
                found[name] = reply
                if store:
                    store.keep([(name, reply)])
                progress.advance(1)
        return [found[prompt.identity] for prompt in prompts.prompts]

    def _ask(self, prompt: Prompt) -> Reply:
        import openai

        messages = [{"role": "system", "content": self.rendering.system}] if self.rendering.system is not None else []
        messages.append({"role": "user", "content": prompt.text})
        sampling = {"temperature": 0.0} if self.decoding.greedy else {"temperature": self.decoding.temperature, "top_p": self.decoding.top_p}
        broken: object = None
        for _ in range(_BROKEN_ANSWERS):
            try:
                answer = self._client.chat.completions.create(
                    model=self._title, messages=messages, max_tokens=self.decoding.max_new_tokens, seed=self.decoding.seed, **sampling
                )
                return _reply(prompt, answer)
            except openai.OpenAIError as error:
                raise LoxMergeError(
                    f"the endpoint gave no reply to the prompt {prompt.identity} of model {self._title}: {error} ({type(error).__name__}). "
                    "Check that it serves this model; replies so far are kept where a store was named."
                ) from error
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
                broken = error  # not JSON, or JSON of another shape: the client does not check it
        raise LoxMergeError(
            f"the endpoint's answer to the prompt {prompt.identity} of model {self._title} is not a chat completion ({broken}). "
            "Check that the URL is that of an OpenAI-compatible API, usually ending in /v1."
        )


def endpoint_key(variable: str, no_key: bool) -> str:
    """The key of an environment variable; 'none' where it is unset and that was allowed. Raises RequestError naming the variable."""
    key = os.environ.get(variable)
    if key:
        return key
    if no_key:
        return "none"
    raise RequestError(f"the environment variable {variable} holds no key for the endpoint. Set it, name another variable, or pass --no-key.")


def _client(url: str, key: str, timeout: float, retries: int) -> Any:
    try:
        # Imported here: an extra, and half a second that local models should not wait for.
        import openai
    except ImportError as error:
        raise RequestError("an endpoint needs the package openai: pip install 'lox-merge[openai]'.") from error
    return openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=retries)


def _reply(prompt: Prompt, answer: Any) -> Reply:
    choice = answer.choices[0]
    # Content is absent where the model only reasoned or the server refused; a refusal of its own is the reply then.
    text = choice.message.content or getattr(choice.message, "refusal", None) or ""
    if not isinstance(text, str):
        raise TypeError(f"content is {type(text).__name__}, not text")
    tokens = answer.usage.completion_tokens if answer.usage is not None else None
    if not (tokens is None or type(tokens) is int):
        raise TypeError(f"completion_tokens is {tokens!r}, not a number")
    return Reply(prompt.text, without_halves(text), finished=choice.finish_reason == "stop", tokens=tokens)


def _public(url: str) -> str:
    """Scheme, host, port and path: a user name, password or query may be secret."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return urlunsplit((parts.scheme, (parts.hostname or "") + port, parts.path, "", ""))
