"""One progress bar for all files of a download, which is also the place where its threads can be stopped."""

from __future__ import annotations

import threading
from typing import Any

# A configuration file needs no bar.
_WORTH_A_BAR = 1_000_000


class Stopped(Exception):
    """Another file failed, or the user stopped the job."""


class DownloadProgress:
    """Bytes that have arrived, of `total`. Shown on a terminal only, and not with HF_HUB_DISABLE_PROGRESS_BARS=1."""

    def __init__(self, title: str, total: int) -> None:
        from huggingface_hub.utils import tqdm

        self._stopped = threading.Event()
        self._lock = threading.Lock()
        # disable=None: tqdm's word for "unless this is a terminal".
        disable = None if total >= _WORTH_A_BAR else True
        self._bar = tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=disable)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        self._stopped.set()

    def check(self) -> None:
        """Raises Stopped after `stop`."""
        if self._stopped.is_set():
            raise Stopped

    def close(self) -> None:
        self._bar.close()

    def advance(self, count: float) -> None:
        with self._lock:
            self._bar.update(count)

    def bar_of_one_file(self) -> Any:
        """The class to give huggingface_hub as `tqdm_class`: what it makes of it feeds this bar. One for each file."""
        progress = self
        arrived = 0.0

        class FileBar:
            """As much of tqdm as the library uses. It calls `update` for every piece; that is where a thread can be stopped."""

            def __init__(self, *arguments: Any, **settings: Any) -> None:
                nonlocal arrived
                # A second attempt starts the file again.
                progress.advance(-arrived)
                arrived = 0.0

            def __enter__(self) -> Any:
                return self

            def __exit__(self, *details: Any) -> None:
                pass

            def update(self, count: float | None = 1) -> None:
                nonlocal arrived
                progress.check()
                progress.advance(count or 0)
                arrived += count or 0

            def update_transfer(self, count: float | None = 1) -> None:
                """Bytes on the network, which Xet counts apart from those of the file."""

            def set_postfix_str(self, *arguments: Any, **settings: Any) -> None:
                pass

            def set_transfer_postfix_str(self, *arguments: Any, **settings: Any) -> None:
                pass

            def close(self) -> None:
                pass

        return FileBar


def silent_bar() -> Any:
    """A `tqdm_class` that shows nothing."""
    from huggingface_hub.utils import tqdm

    class SilentBar(tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **{**settings, "disable": True})  # type: ignore[no-untyped-call]

    return SilentBar
