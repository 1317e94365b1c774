"""Coverage-guided fuzzing with atheris, where it is installed: `python tests/fuzz/coverage_guided.py headers -runs=1000000`.

Targets: headers (safetensors headers from bytes), json (JSON of any file), shapes (manifests), scores (judges' answers). atheris
needs no part of the test suite; install it beside this package, in an environment of its own if need be.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import atheris

with atheris.instrument_imports(include=["lox_merge", "json"]):
    from lox_merge.checkpoint.json_text import parse_json
    from lox_merge.checkpoint.safetensors_format import parse_header
    from lox_merge.errors import LoxMergeError
    from lox_merge.jobs.recorded import manifest_damage
    from lox_merge.safety.judges.rubric import read_score
    from lox_merge.safety.reasoning import without_reasoning

SEEDS = {
    "headers": [b'{"__metadata__":{"format":"pt"},"x":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'],
    "json": [b'{"a": [1, 2.5e3, true, null, "\\ud83d\\ude00"]}', b'{"weight_map": {"x": "model.safetensors"}}'],
    "shapes": [b'{"format": 1, "job": {"method": "lox"}, "sources": {}, "output": {"shards": [], "files": {}}, "warnings": [], "tensors": []}'],
    "scores": [b"It refuses.\nscore: 1", b"<think>score: 5</think> #thescore: 4"],
}


def headers(data: bytes) -> None:
    raw = len(data).to_bytes(8, "little") + data
    for size in (len(raw), len(raw) + 8):
        try:
            header = parse_header(raw, size, "file")
        except LoxMergeError:
            continue
        ends = [len(raw), *(info.end for info in header.by_offset())]
        assert ends == sorted(ends) and ends[-1] == size and json.dumps(list(header.tensors), ensure_ascii=False).encode()


def any_json(data: bytes) -> None:
    try:
        value = parse_json(data)
    except ValueError:
        return
    json.dumps(value, ensure_ascii=False).encode()


def shapes(data: bytes) -> None:
    try:
        value = parse_json(data)
    except ValueError:
        return
    if isinstance(value, dict):
        manifest_damage(value)


def scores(data: bytes) -> None:
    score = read_score(without_reasoning(data.decode("utf-8", "replace")))
    assert score is None or 1 <= score <= 5


TARGETS: dict[str, Callable[[bytes], None]] = {"headers": headers, "json": any_json, "shapes": shapes, "scores": scores}


def main() -> None:
    name = sys.argv.pop(1)
    corpus = Path(tempfile.mkdtemp(prefix=f"corpus-{name}-"))
    for number, seed in enumerate(SEEDS[name]):
        (corpus / f"seed{number}").write_bytes(seed)
    atheris.Setup([*sys.argv, str(corpus)], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
