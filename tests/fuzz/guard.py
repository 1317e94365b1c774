"""Watches one case: which files it opens, how long it takes, and what it raises."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click
import matplotlib
from huggingface_hub.constants import HF_HOME

from lox_merge.errors import LoxMergeError

SECONDS = 10.0
# Python's own files, libraries' data, what the system has for everybody, and caches of libraries.
_COMMON = tuple(
    os.path.realpath(folder)
    for folder in (
        sys.prefix,
        sys.base_prefix,
        Path(__file__).parents[2],
        "/usr",
        "/lib",
        "/lib64",
        "/proc",
        "/sys",
        "/dev",
        "/etc/ssl",
        "/etc/mime.types",
        HF_HOME,
        matplotlib.get_cachedir(),
    )
)
_LIBRARY = str(Path(__file__).parents[2] / "lox_merge")


class Hang(BaseException):
    """A case took longer than SECONDS. No Exception, so that nobody catches it by the way."""


@dataclass(frozen=True)
class Finding:
    """One kind of wrong behaviour. signature: error and place, the same for all cases of a kind. example: the case that showed it first."""

    target: str
    signature: str
    details: str
    example: str


class _Opens:
    """Paths that this process opens while `watching`; an audit hook cannot be taken off again."""

    def __init__(self) -> None:
        self.watching = False
        self.paths: list[str] = []
        self.installed = False

    def install(self) -> None:
        if not self.installed:
            sys.addaudithook(self._see)
            self.installed = True

    def _see(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.watching and event in ("open", "os.listdir", "os.scandir") and arguments and isinstance(arguments[0], (str, bytes, os.PathLike)):
            self.paths.append(os.fsdecode(arguments[0]))


_OPENS = _Opens()


def watch(target: str, feed: Callable[[], None], folder: Path, example: object) -> tuple[str, Finding | None]:
    """Runs one case. Returns how it ended ('accepted', 'refused', 'found') and what is wrong with that.

    folder: everything that the case was given lies in here; opening anything else is a finding.
    """
    _OPENS.install()
    _OPENS.paths.clear()
    ended, finding = "accepted", None

    def found(signature: str, details: str) -> Finding:
        return Finding(target, signature, details, _shown(example))

    try:
        with _limited(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _OPENS.watching = True
            feed()
    except (LoxMergeError, click.ClickException) as error:
        ended = "refused"
        if not str(error).strip():
            finding = found(f"{type(error).__name__} without a message", "")
    except Hang:
        finding = found(f"hang at {_place(sys.exc_info()[1])}", traceback.format_exc())
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        finding = found(f"{type(error).__name__} at {_place(error)}", traceback.format_exc())
    finally:
        _OPENS.watching = False
    outside = [path for path in _OPENS.paths if not _inside(path, folder)]
    if outside and finding is None:
        finding = found(f"opened {Path(outside[0]).name} outside", "\n".join(outside))
    return ("found" if finding else ended), finding


def _inside(path: str, folder: Path) -> bool:
    if "\0" in path:
        return True  # the system refuses it
    real = os.path.realpath(path)
    return real.startswith((os.path.realpath(folder), *_COMMON, os.path.realpath(tempfile.gettempdir()) + "/lox-merge-verify"))


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def late(_signal: int, _frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _place(error: BaseException | None) -> str:
    """The last line of our own that an error passed."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    own = [frame for frame in frames if frame.filename.startswith(_LIBRARY)] or list(frames)[-1:]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].name})" if own else "?"


def _shown(example: object) -> str:
    text = repr(example)
    return text if len(text) < 3_000 else f"{text[:3_000]} …"
