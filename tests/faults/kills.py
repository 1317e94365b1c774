"""SIGKILL at random moments, resumption, the same bytes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from faults.jobs import Job, Sources, contents
from faults.launch import Running

# As many in a row on one output, before it is finished.
MOST_IN_A_ROW = 4


@dataclass
class Kills:
    """moments: seconds after the fork of every kill that came before the end. outputs: how many were finished and compared."""

    job: str
    undisturbed_seconds: float
    moments: list[float] = field(default_factory=list)
    outputs: int = 0
    resumed_with_work_done: int = 0
    failures: list[str] = field(default_factory=list)


def looks_finished(out: Path) -> bool:
    """Whether a model in `out` would be taken for a whole one."""
    model = out / "model"
    return (model / "config.json").exists() and any(model.glob("model*.safetensors*")) and not (model / ".lox_merge").exists()


def kill_and_resume(job: Job, sources: Sources, folder: Path, moments: int, seed: int) -> Kills:
    whole = folder / f"{job.name}-undisturbed"
    whole.mkdir(parents=True)
    ended = Running(job.command(sources, whole), folder / "log").wait()
    assert ended.code == 0, ended.stderr
    expected, again = contents(whole), Running(job.command(sources, whole), folder / "log").wait()
    assert again.code == 0 and contents(whole) == expected, again.stderr
    kills, generator = Kills(job.name, ended.seconds), random.Random(f"{job.name}-{seed}")
    while len(kills.moments) < moments:
        out = folder / f"{job.name}-{kills.outputs}"
        out.mkdir()
        for _ in range(generator.randint(1, MOST_IN_A_ROW)):
            moment = generator.uniform(0, 1.1 * kills.undisturbed_seconds)
            ended = Running(job.command(sources, out), folder / "log").kill_after(moment)
            if not ended.killed:
                if ended.code != 0:
                    kills.failures.append(f"exit {ended.code} after {moment:.3f} s: {ended.stderr}")
                break
            kills.moments.append(moment)
            if looks_finished(out) and contents(out) != expected:
                kills.failures.append(f"looks finished and is not, killed after {moment:.3f} s")
        kills.resumed_with_work_done += any(path.is_file() for path in out.rglob("*"))
        ended = Running(job.command(sources, out), folder / "log").wait()
        if ended.code != 0:
            kills.failures.append(f"not resumed: exit {ended.code}: {ended.stderr}")
        elif contents(out) != expected:
            different = sorted(set(contents(out).items()) ^ set(expected.items()))
            kills.failures.append(f"other bytes: {different[:4]}")
        kills.outputs += 1
    return kills
