"""Many requests to a server at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


def answers(ask: Callable[[Asked], Answer], asked: Sequence[Asked], concurrency: int) -> Iterator[tuple[int, Answer]]:
    """What `ask` gives for each, and its place among those asked, as it comes; at most so many requests are under way.

    Once one fails nothing new is asked; what is under way is still given, then the failure is raised. Requests whose answers nobody takes
    any more (Ctrl-C) cannot be called back: their threads end with the process, which waits for none of them.
    """
    futures: list[Future[Answer]] = [Future() for _ in asked]
    waiting, ended = iter(range(len(asked))), SimpleQueue[int | None]()
    taking, over = threading.Lock(), threading.Event()

    def work() -> None:
        while True:
            with taking:
                place = None if over.is_set() else next(waiting, None)
            if place is None:
                return ended.put(None)
            try:
                futures[place].set_result(ask(asked[place]))
            except BaseException as error:  # raised where answers are taken
                over.set()
                futures[place].set_exception(error)
            ended.put(place)

    working = min(concurrency, len(asked))
    for _ in range(working):
        threading.Thread(target=work, name="request", daemon=True).start()
    failed: Future[Answer] | None = None
    try:
        while working:
            place = ended.get()
            if place is None:
                working -= 1
            elif futures[place].exception() is None:
                yield place, futures[place].result()
            else:
                failed = failed or futures[place]
    finally:
        over.set()
    if failed:
        failed.result()
