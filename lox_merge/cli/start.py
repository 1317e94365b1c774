"""How a command starts: torch takes most of the time of a short one."""

from __future__ import annotations

import gc
import sys

from lox_merge.cli.signals import between_imports


def import_torch() -> None:
    """Imports torch while Python does not look for cyclic garbage, which takes a fifth of the time otherwise.

    What exists then lives as long as the program does: later collections need not look at it. Raises KeyboardInterrupt where it was asked for
    meanwhile.
    """
    if "torch" in sys.modules:
        return
    collecting = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        if collecting:
            gc.enable()
    gc.freeze()
    between_imports()
