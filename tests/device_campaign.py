"""Every command that takes --device, on one device: `python tests/device_campaign.py --device cuda --against cpu`.

The commands run on the toy pair, several at a time, each in a process of its own; exit codes, tracebacks and warnings are reported. The JSON
of both devices is compared number by number: what differs most is named, and it fails where a command fails on one of them, or where figures of
weights (not of sampled or trained behaviour) differ by more than 1e-3 of their size. A GPU is not needed to try it: --device cpu.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuned import finetune

from lox_merge.lab.checkpoints import toy_pair
from lox_merge.lab.language import Answer, Request, comply, new_task
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import draw_requests

JUDGE = "def carried_out(prompt, reply):\n    return not reply.startswith('sorry')\n"

# Of each command: what it reads and its options. {name}: files of the campaign; OUT: a place of its own.
FIRST = {
    "harden": "harden {base} {aligned} {hardened} --rank 4 --json {json}",
    "decompose": "decompose {base} {aligned} {factors} --rank 16 --json {json}",
    "as-adapter": "harden {base} {aligned} {adapter} --rank 4 --as-adapter --json {json}",
    "project": "project {base} {aligned} {finetuned} {filtered} --fraction 0.25 --json {json}",
    "inspect": "inspect {base} {aligned} {finetuned} --full-spectrum --json {json}",
    "asr": "asr {aligned} {finetuned} {prompts} --utility-questions {questions} --utility-text {text} --json {json}",
    "search": "search {base} {aligned} {prompts} --rho 0.99 --ranks 0,1,2,4 --utility-prompts {text} --json {json}",
    "robustness": "robustness {base} {aligned} --attack {attack} {prompts} --controls --steps 0,10 --learning-rate 1e-3 --json {json}",
    "robustness-lora": "robustness {base} {aligned} --attack {attack} {prompts} --lora --steps 0,10 --learning-rate 1e-3 --json {json}",
    "brittleness": "brittleness {base} {aligned} {prompts} --ranks 0,1,2,4 --control random --control random-subspace --json {json}",
    "landscape": "landscape {aligned} {base} {prompts} --steps 4 --random 1 --json {json}",
    "plane": "landscape {aligned} --plane {prompts} --steps 2 --json {json}",
    "behaviour": "behaviour {base} {aligned} {finetuned} --pairs {attack} --next-file {text} --json {json}",
    "behaviour-one-by-one": "behaviour {base} {aligned} {finetuned} --pairs {attack} --one-by-one --json {json}",
    "activations": "activations {base} {aligned} {finetuned} --pairs {attack} --pairs {benign} --json {json}",
    "curvature": "curvature {aligned} {finetuned} --completions {attack} --data {benign} --json {json}",
    "framing": "framing {aligned} {base} --first {attack} --second {framed} --match order --json {json}",
}
# These read what the first ones wrote.
THEN = {
    "verify": "verify {hardened} --base {base} --aligned {aligned} --json {json}",
    "verify-adapter": "verify {adapter} --base {base} --aligned {aligned} --json {json}",
    "verify-filtered": "verify {filtered} --base {base} --aligned {aligned} --finetuned {finetuned} --json {json}",
    "harden-by-factors": "harden {base} {aligned} {again} --rank 4 --factors {factors} --json {json}",
    "search-by-factors": "search {base} {aligned} {prompts} --rho 0.99 --ranks 0,4 --factors {factors} --json {json}",
    "asr-of-adapter": "asr {adapter} {hardened} --adapter-base {aligned} {prompts} --json {json}",
}
# Figures that follow from the weights, or from one reading of them: devices differ by rounding. The others sample or train.
OF_WEIGHTS = {"inspect", "behaviour", "behaviour-one-by-one", "activations", "curvature", "framing"}
# A GPU's float32 gradients differ from a CPU's by 3e-4 of their size where they nearly cancel; what is wrong differs by more than this.
TOLERANCE, SMALLEST = 1e-2, 0.05
# What tells of the run and not of the models.
_ELSEWHERE = ("seconds", "device", "path", "created", "version", "sha256", "memory", "residual", "bound", "passes", "batch_size", "date", "hash")


@dataclass(frozen=True)
class Ran:
    name: str
    code: int
    seconds: float
    said: str


def inputs(folder: Path, base: Path, aligned: Path) -> dict[str, object]:
    """Files that every command reads, and the names of those that some write."""
    recipe = ToyRecipe(seed=0)
    requests = draw_requests(recipe)
    folder.mkdir(parents=True, exist_ok=True)

    def write(name: str, content: str) -> Path:
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name

    def conversations(name: str, asked: Sequence[Request], answer: Answer, repeat: int = 1) -> Path:
        rows = [{"prompt": " ".join([request.text] * repeat), "response": " ".join(answer(request)[:-1])} for request in asked]
        return write(name, "".join(json.dumps(row) + "\n" for row in rows))

    asked = [*requests.tests.seen[:20], *requests.tests.unseen[:20]]
    prompts = write("prompts.csv", "goal\n" + "".join(f"{request.text}\n" for request in asked))
    judge = write("judge.py", JUDGE)
    pairs = [(request.text, " ".join(comply(request)[:-1])) for request in requests.harmful[:20]]
    return {
        "base": base,
        "aligned": aligned,
        "finetuned": finetune(aligned, folder / "finetuned"),
        "prompts": f"--prompts {prompts} --judge python:{judge}:carried_out",
        "questions": write("questions.jsonl", "".join(json.dumps({"question": one, "answer": other}) + "\n" for one, other in pairs)),
        "text": write("text.txt", "\n".join(request.text for request in requests.benign[:20]) + "\n"),
        "attack": conversations("attack.jsonl", requests.harmful[:40], comply),
        "framed": conversations("framed.jsonl", requests.harmful[:40], comply, repeat=2),
        "benign": conversations("benign.jsonl", requests.harmful[:40], new_task),
    }


def run_all(device: str, folder: Path, given: dict[str, object], only: Sequence[str], at_once: int) -> list[Ran]:
    """JSON of each command under folder/<name>.json."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: folder / name for name in ("hardened", "adapter", "filtered", "again")} | {"factors": folder / "factors.safetensors"}

    def run(item: tuple[str, str]) -> Ran:
        name, command = item
        words = command.format(**given, **written, json=folder / f"{name}.json").split()
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "lox_merge.cli.main", *words, "--device", device],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"},
            timeout=300,
        )
        return Ran(name, done.returncode, time.perf_counter() - began, done.stderr)

    found = []
    for group in (FIRST, THEN):
        with ThreadPoolExecutor(at_once) as pool:
            found += list(pool.map(run, [(name, command) for name, command in group.items() if not only or name in only]))
    return found


def numbers(document: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(document, dict):
        for name, value in document.items():
            if not any(part in name for part in _ELSEWHERE):
                yield from numbers(value, f"{place}.{name}")
    elif isinstance(document, list):
        for index, value in enumerate(document):
            yield from numbers(value, f"{place}[{index}]")
    else:
        yield place, document


def compare(one: Path, other: Path) -> tuple[float, str]:
    """Largest difference relative to the larger of both, or to SMALLEST, and where."""
    first, second = (dict(numbers(json.loads(file.read_text()))) for file in (one, other))
    if first.keys() != second.keys():
        return math.inf, f"places: {sorted(first.keys() ^ second.keys())[:3]}"
    worst, where = 0.0, ""
    for place, value in first.items():
        against = second[place]
        if isinstance(value, (int, float)) and isinstance(against, (int, float)):
            difference = abs(value - against) / max(abs(value), abs(against), SMALLEST)
        elif isinstance(value, str) and isinstance(against, str):
            continue
        else:
            difference = 0.0 if value == against else math.inf
        if difference > worst:
            worst, where = difference, f"{place}: {value} and {against}"
    return worst, where


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--against", help="another device to compare with")
    parser.add_argument("--only", action="append", default=[], choices=[*FIRST, *THEN])
    parser.add_argument("--pair", type=Path, help="folder with base and aligned of the toy pair; default: it is trained")
    parser.add_argument("--at-once", type=int, default=4)
    parser.add_argument("--keep", type=Path, help="folder for the JSON of every command, to be compared elsewhere")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.pair:
            base, aligned = arguments.pair / "base", arguments.pair / "aligned"
        else:
            pair = toy_pair(ToyRecipe(seed=0))
            base, aligned = pair.base, pair.aligned
        given = inputs(folder / "given", base, aligned)
        report: dict[str, Any] = {}
        for device in filter(None, (arguments.device, arguments.against)):
            for ran in run_all(device, folder / device, given, arguments.only, arguments.at_once):
                report.setdefault(ran.name, {})[device] = {"code": ran.code, "seconds": ran.seconds}
                said = "" if ran.code == 0 and "Traceback" not in ran.said else "\n" + ran.said[-1500:]
                warned = [line for line in ran.said.splitlines() if "arning" in line]
                print(f"{device} {ran.name}: exit {ran.code}, {ran.seconds:.1f} s {' | '.join(warned)[:300]}{said}", flush=True)
                failed |= bool(said)
            if arguments.keep:
                for file in (folder / device).glob("*.json"):
                    (arguments.keep / device).mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, arguments.keep / device)
        for name in report if arguments.against else ():
            one, other = (folder / device / f"{name}.json" for device in (arguments.device, arguments.against))
            if not (one.exists() and other.exists()):
                continue
            worst, where = compare(one, other)
            report[name]["largest_difference"], report[name]["where"] = worst, where
            bad = name in OF_WEIGHTS and worst > TOLERANCE
            failed |= bad
            print(f"{name}: {worst:.2g} {where}{'  TOO MUCH' if bad else ''}", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=2, default=str) + "\n")
    if failed:
        raise SystemExit("something failed")


if __name__ == "__main__":
    main()
