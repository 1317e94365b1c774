"""Faults that a test orders, and the log of what was asked."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches `pattern`.

    status: answer with it. cut_after: break the connection after so many body bytes, sent or received; -1 breaks it when the
    request was fully processed, so that only the answer is lost. reset: break with RST rather than FIN.
    pause: seconds of waiting before the answer, and between the pieces (64 KiB) of a file. ignore_range: send the whole file.
    message: the Hub's own reason, with `status`. meanwhile: called before the request is looked at, as if somebody else were quicker.
    """

    pattern: re.Pattern[str]
    times: int
    status: int | None = None
    cut_after: int | None = None
    reset: bool = True
    pause: float = 0.0
    ignore_range: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    message: str = "injected fault"
    meanwhile: Callable[[], object] | None = None


@dataclass(frozen=True)
class Request:
    """One line of the log. `origin` is "hub" or "storage"; `sent` and `received` are bytes of file content and of bodies.

    status: -1 when the connection broke before the whole answer was sent.
    """

    method: str
    path: str
    origin: str
    status: int
    sent: int
    received: int
    authorization: str | None
    range: str | None
    query: Mapping[str, str]

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


class RequestLog:
    """Requests in the order in which they ended."""

    def __init__(self) -> None:
        self._requests: list[Request] = []
        self._under_way = 0
        self._changed = threading.Condition()

    def begin(self) -> None:
        with self._changed:
            self._under_way += 1

    def end(self, request: Request) -> None:
        with self._changed:
            self._requests.append(request)
            self._under_way -= 1
            self._changed.notify_all()

    def settled(self, patience: float = 5.0) -> list[Request]:
        """A copy of the log, after waiting at most `patience` seconds for requests under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._under_way == 0, patience)
            return list(self._requests)


class FaultPlan:
    """Faults in the order in which they were added; each serves its number of requests."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def take(self, line: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.times > 0 and fault.pattern.search(line):
                    fault.times -= 1
                    return fault
        return None

    def left(self) -> list[Fault]:
        """Faults that were ordered and did not happen."""
        with self._lock:
            return [fault for fault in self._faults if fault.times > 0]

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()
