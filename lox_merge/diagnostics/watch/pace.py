"""When to measure, so that measuring takes at most a stated share of the training's time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """interval: every so many steps; None: as soon as all measurements so far and one more fit into `share` of the time that the
    training itself took until then. Times are seconds of the wall.
    """

    def __init__(self, interval: int | None, share: float) -> None:
        self.interval, self.share = interval, share
        self.measuring = 0.0
        self._last = 0.0
        self._began = time.perf_counter()
        self._ended: float | None = None

    def begin(self) -> None:
        """The training starts now."""
        self._began, self._ended, self.measuring = time.perf_counter(), None, 0.0

    def end(self) -> None:
        """The training ended."""
        self._ended = time.perf_counter()

    def due(self, step: int) -> bool:
        if self.interval is not None:
            return step % self.interval == 0
        return self.measuring + self._last <= self.share * self.training

    @property
    def training(self) -> float:
        """Seconds between `begin` and `end`, or now, that were not spent on measuring."""
        return (time.perf_counter() if self._ended is None else self._ended) - self._began - self.measuring

    @property
    def overhead(self) -> float | None:
        """Share of the training's own time that measuring added."""
        return self.measuring / self.training if self.training > 0 else None

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What runs within is a measurement."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._last = time.perf_counter() - started
            self.measuring += self._last
