"""The four commands that go on after an interruption, and what of their output has to be the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetuned import finetune
from tiny_models import WORDS, make_pair


@dataclass(frozen=True)
class Sources:
    """A tiny pair of several shards, its fine-tuned model, and prompts."""

    base: Path
    aligned: Path
    finetuned: Path
    prompts: Path
    judge: Path

    @property
    def folders(self) -> tuple[Path, Path, Path]:
        return self.base, self.aligned, self.finetuned


@dataclass(frozen=True)
class Job:
    """arguments: of the command that writes into a folder. Everything under that folder is its output, the working state aside."""

    name: str
    arguments: Callable[[Sources, Path], list[object]]

    def command(self, sources: Sources, out: Path) -> list[str]:
        return [*map(str, [self.name, *self.arguments(sources, out)])]


def make_sources(folder: Path, *, hidden: int = 96, layers: int = 3) -> Sources:
    base, aligned = make_pair(folder, "llama", base_shards=2, aligned_shards=6, hidden=hidden, layers=layers, vocabulary=len(WORDS))
    finetuned = finetune(aligned, folder / "finetuned")
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{first} {second}\n" for first in ("how", "do", "you", "help") for second in ("i", "no", "yes", "sorry")))
    judge = folder / "judge.py"
    judge.write_text("def succeeds(prompt, reply):\n    return sum(map(ord, prompt + reply)) % 3 == 0\n")
    return Sources(base, aligned, finetuned, prompts, judge)


def _harden(sources: Sources, out: Path) -> list[object]:
    return [sources.base, sources.aligned, out / "model"]


def _project(sources: Sources, out: Path) -> list[object]:
    return [*sources.folders, out / "model", "--fraction", "0.1"]


def _decompose(sources: Sources, out: Path) -> list[object]:
    return [sources.base, sources.aligned, out / "factors.safetensors", "--rank", "8"]


def _search(sources: Sources, out: Path) -> list[object]:
    asked = ["--prompts", sources.prompts, "--judge", f"python:{sources.judge}:succeeds", "--max-new-tokens", "4", "--no-cache"]
    pace = ["--batch-size", "2", "--device", "cpu", "--rho", "0.9"]
    return [sources.base, sources.aligned, *asked, *pace, "--ranks", "0,1,2", "--replies", out / "replies", "--json", out / "search.json"]


JOBS = {
    name: Job(name, arguments) for name, arguments in (("harden", _harden), ("project", _project), ("decompose", _decompose), ("search", _search))
}


def contents(out: Path) -> dict[str, str]:
    """sha256 by name of everything in `out`; of a result's JSON without the times in it."""
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file() and not path.name.endswith(".lock"):
            data = path.read_bytes()
            if path.suffix == ".json" and path.parent == out:
                data = json.dumps(_timeless(json.loads(data)), sort_keys=True).encode()
            found[str(path.relative_to(out))] = hashlib.sha256(data).hexdigest()
    return found


def _timeless(value: object) -> object:
    if isinstance(value, dict):
        return {key: _timeless(inner) for key, inner in value.items() if "seconds" not in key}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value
