"""A chat-completions endpoint on loopback, for tests: what vLLM, SGLang, TGI and OpenAI have in common, and faults on order."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class OpenAIRequest:
    """One request as it arrived, in order of arrival. body: the parsed JSON. headers: names in lower case. time: time.monotonic()."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    time: float

    @property
    def prompt(self) -> str:
        """The text of the last user message."""
        return next(message["content"] for message in reversed(self.body["messages"]) if message["role"] == "user")


@dataclass
class _Fault:
    times: int
    status: int
    headers: Mapping[str, str]
    raw_body: bytes | None
    delay: float
    disconnect: bool
    only: Callable[[dict[str, Any]], bool]


@dataclass
class OpenAIServer:
    """`with OpenAIServer(reply_with=...) as server:` serves POST {server.url}/chat/completions and GET {server.url}/models.

    reply_with: request body to the assistant's text; may be replaced while the server runs. finish_reason: of every reply.
    delay: seconds before every answer. requests: all that arrived, in order. most_at_once: how many were under way together.
    """

    reply_with: Callable[[dict[str, Any]], str] = lambda body: f"reply to {body['messages'][-1]['content']}"
    finish_reason: str = "stop"
    delay: float = 0.0
    key: str | None = None  # a bearer token asked of every request; None asks for none
    requests: list[OpenAIRequest] = field(default_factory=list)
    most_at_once: int = 0

    def __post_init__(self) -> None:
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._under_way = 0
        owner = self

        class Handler(_Handler):
            server_state = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        """What a client takes as base URL, with /v1."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def fail(
        self,
        times: int = 1,
        *,
        status: int = 500,
        headers: Mapping[str, str] | None = None,
        raw_body: bytes | None = None,
        delay: float = 0.0,
        disconnect: bool = False,
        only: Callable[[dict[str, Any]], bool] | None = None,
    ) -> None:
        """The next `times` requests (of those for whose body `only` holds) fail; several orders are served one after the other.

        status and headers (such as {"Retry-After": "1"}): of the answer. raw_body: its bytes, for answers that are not JSON
        (with status=200: a broken success). delay: seconds before the answer, for time-outs. disconnect: close without an answer.
        """
        with self._lock:
            self._faults.append(_Fault(times, status, dict(headers or {}), raw_body, delay, disconnect, only or (lambda _body: True)))

    def __enter__(self) -> OpenAIServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _take_fault(self, body: dict[str, Any]) -> _Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.only(body):
                    fault.times -= 1
                    return fault
        return None

    def _count(self, change: int) -> None:
        with self._lock:
            self._under_way += change
            self.most_at_once = max(self.most_at_once, self._under_way)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: OpenAIServer

    def log_message(self, *_: Any) -> None:
        """Tests read `OpenAIServer.requests` instead."""

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "toy", "object": "model", "created": 0, "owned_by": "tests"}]})

    def do_POST(self) -> None:
        state = self.server_state
        state._count(+1)
        try:
            self._post(state)
        except ConnectionError:
            self.close_connection = True  # the client gave up waiting
        finally:
            state._count(-1)

    def _post(self, state: OpenAIServer) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with state._lock:
            state.requests.append(OpenAIRequest(self.path, body, headers, time.monotonic()))
        if not self.path.endswith("/chat/completions"):
            self._send(404, _error(f"no route {self.path}"))
            return
        if state.key is not None and headers.get("authorization") != f"Bearer {state.key}":
            self._send(401, _error("Incorrect API key provided"))
            return
        fault = state._take_fault(body)
        time.sleep(state.delay if fault is None else fault.delay)
        if fault is None:
            self._send(200, _completion(body, state.reply_with(body), state.finish_reason))
        elif fault.disconnect:
            self.close_connection = True
        elif fault.raw_body is not None:
            self._write(fault.status, fault.raw_body, fault.headers)
        else:
            self._send(fault.status, _error(f"ordered failure {fault.status}"), fault.headers)

    def _send(self, status: int, value: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        self._write(status, json.dumps(value).encode(), headers or {})

    def _write(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "test", "code": None}}


def _completion(body: dict[str, Any], text: str, finish_reason: str) -> dict[str, Any]:
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": body.get("model", "toy"),
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason, "logprobs": None}],
        "usage": {"prompt_tokens": 1, "completion_tokens": len(text.split()), "total_tokens": 1 + len(text.split())},
    }
