"""What takes seconds to import, once, in a process that forks: what it forks is at work at once."""

from __future__ import annotations

import gc
import importlib
import pkgutil
import sys
from collections.abc import Sequence

_WITH_HUB = (
    "huggingface_hub",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.generation",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "peft",
)
_COMMON = (
    "click",
    "concurrent.futures",
    "filelock",
    "httpx",
    "jinja2",
    "numpy",
    "psutil",
    "pydantic",
    "rich.console",
    "rich.progress",
    "rich.table",
    "safetensors.torch",
    "scipy.optimize",
    "scipy.stats",
    "tqdm",
    "yaml",
    "lox_merge.cli.main",
)


def import_all() -> None:
    """All but what needs other packages, which most commands do without."""
    _import(_COMMON)
    _import(_WITH_HUB)
    _import_below("lox_merge", leave_out=("mergekit", "inspect", "watch", "thin_kernels"))
    from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList  # noqa: F401

    _settle()


def import_without_hub() -> None:
    """What reads no variable that says where the Hub is."""
    _import(_COMMON)
    for folder in ("checkpoint", "jobs", "maths", "publish"):
        _import_below(f"lox_merge.{folder}", leave_out=("thin_kernels",))
    _import(("lox_merge.cli.harden", "lox_merge.cli.adapter", "lox_merge.cli.verify"))
    assert "huggingface_hub" not in sys.modules
    _settle()


def _import(names: Sequence[str]) -> None:
    import torch

    torch.set_num_threads(1)  # no thread has been started when the process forks
    for name in names:
        importlib.import_module(name)


def _import_below(name: str, leave_out: Sequence[str] = ()) -> None:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        if not any(part in module.name for part in leave_out):
            importlib.import_module(module.name)


def _settle() -> None:
    """A fork that looks for cycles among all of this would write to, and so copy, every page of it."""
    gc.collect()
    gc.freeze()
