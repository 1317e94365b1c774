"""Faults of disks, sources, clocks, locks and memory. Each ends with a message, leaves nothing that looks finished, and can be gone on from."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from faults import seccomp
from faults.jobs import JOBS, Job, Sources, contents
from faults.kills import looks_finished
from faults.launch import Ended, Fault, Running

_ATTEMPTS = 12
_EXPECTED: dict[tuple[str, Path], dict[str, str]] = {}


def _expected(job: Job, sources: Sources, folder: Path) -> dict[str, str]:
    """The output of an undisturbed run."""
    key = (job.name, sources.base)
    if key not in _EXPECTED:
        out = folder / f"undisturbed-{job.name}"
        out.mkdir(parents=True)
        ended = Running(job.command(sources, out), folder / "log").wait()
        assert ended.code == 0, ended.stderr
        _EXPECTED[key] = contents(out)
    return _EXPECTED[key]


def _bad_end(ended: Ended, out: Path) -> str | None:
    if not ended.has_message:
        return f"exit {ended.code}: {ended.stderr[-1500:]}"
    return "what is left looks finished" if looks_finished(out) else None


def _resumed(job: Job, sources: Sources, out: Path, folder: Path) -> str | None:
    expected = _expected(job, sources, folder)
    ended = Running(job.command(sources, out), folder / "log").wait()
    if ended.code != 0:
        return f"not gone on with: exit {ended.code}: {ended.stderr[-1500:]}"
    return None if contents(out) == expected else "other bytes after resumption"


def _refused_calls(refusals: tuple[seccomp.Refusal, ...], job: Job, sources: Sources, folder: Path) -> str | None:
    return _with_fault(lambda: seccomp.refuse(refusals), job, sources, folder)


def _with_fault(fault: Fault, job: Job, sources: Sources, folder: Path) -> str | None:
    """A run with the fault has to fail well; without it the same command goes on."""
    _expected(job, sources, folder)
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    ended = Running(job.command(sources, out), folder / "log", fault).wait()
    return _bad_end(ended, out) or _resumed(job, sources, out, folder)


def _short_of_memory() -> None:
    # 60 MB above what the imports have mapped: enough to begin, not for the work.
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 60 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _out_of_memory(job: Job, sources: Sources, folder: Path) -> str | None:
    """A small model may get through; what may not happen is a traceback, or an output that looks finished and is not."""
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    ended = Running(job.command(sources, out), folder / "log", _short_of_memory).wait()
    if ended.code == 0:
        return None if contents(out) == _expected(job, sources, folder) else "other bytes"
    return _bad_end(ended, out) or _resumed(job, sources, out, folder)


def _held(out: Path) -> bool:
    """Whether some process has a lock in this folder; its file stays when it is given back."""
    for path in out.rglob("*lock"):
        try:
            with FileLock(path, timeout=0):
                pass
        except Timeout:
            return True
    return False


def _two_at_once(job: Job, sources: Sources, folder: Path) -> str | None:
    """The second is refused while the first runs, and goes on once that was killed."""
    for attempt in range(_ATTEMPTS):
        out = folder / f"out{attempt}"
        out.mkdir(parents=True)
        first = Running(job.command(sources, out), folder / "log")
        first.until(lambda out=out: _held(out))  # type: ignore[misc]
        os.kill(first._child, signal.SIGSTOP)  # as slow as need be
        if first.going and _held(out):  # `search` has a lock for each model's replies, and none between them
            second = Running(job.command(sources, out), folder / "log2").wait()
            first.kill()
            if second.code != 2 or "another process is writing" not in second.stderr:
                return f"the second one ended with {second.code}: {second.stderr[-500:]}"
            return _resumed(job, sources, out, folder)
        first.kill()
    return "no run was slow enough"


def _stopped(job: Job, sources: Sources, folder: Path) -> tuple[Running, Path] | None:
    """A run that stands still after its first finished piece."""
    for attempt in range(_ATTEMPTS):
        out = folder / f"stopped{attempt}"
        out.mkdir(parents=True)
        running = Running(job.command(sources, out), folder / "log")
        if running.until(lambda out=out: any(out.rglob("*.safetensors.json"))) and not looks_finished(out):  # type: ignore[misc]
            os.kill(running._child, signal.SIGSTOP)
            if running.going:
                return running, out
        running.wait()
    return None


def _source(change: Callable[[Path], None], ends: tuple[int, ...], sources: Sources, folder: Path) -> str | None:
    """A source is changed while `harden` runs. ends: the exit codes that are right."""
    own = Sources(*(shutil.copytree(source, folder / source.name) for source in sources.folders), sources.prompts, sources.judge)
    stopped = _stopped(JOBS["harden"], own, folder)
    if stopped is None:
        return "no run was slow enough"
    running, out = stopped
    change(sorted(own.base.glob("*.safetensors"))[-1])
    os.kill(running._child, signal.SIGCONT)
    ended = running.wait()
    if ended.code == 0:  # it had read the file for the last time
        return None if contents(out) == _expected(JOBS["harden"], sources, folder) else "other bytes"
    if ended.code not in ends:
        return f"exit {ended.code}: {ended.stderr[-1500:]}"
    if ended.code > 0 and not ended.has_message:
        return f"no message: {ended.stderr[-1500:]}"
    return "what is left looks finished" if looks_finished(out) else None


def _same_stamp(sources: Sources, folder: Path) -> str | None:
    """Other contents of the same size and time, between a run that was killed and the next: its hash tells."""
    own = Sources(*(shutil.copytree(source, folder / source.name) for source in sources.folders), sources.prompts, sources.judge)
    stopped = _stopped(JOBS["harden"], own, folder)
    if stopped is None:
        return "no run was slow enough"
    stopped[0].kill()
    for file in own.base.glob("*.safetensors"):
        _flip(file)
    ended = Running(JOBS["harden"].command(own, stopped[1]), folder / "log").wait()
    if ended.code != 1 or "is not the file that" not in ended.stderr:
        return f"exit {ended.code}: {ended.stderr[-500:]}"
    return _bad_end(ended, stopped[1])


def _clock(sources: Sources, folder: Path) -> str | None:
    """The clock jumps to 1970 and to 2100 between a run that was killed and the next: no decision rests on it."""
    job = JOBS["harden"]
    for name, seconds in (("past", 0), ("future", 4_102_444_800)):
        own = folder / name
        own.mkdir(parents=True)
        stopped = _stopped(job, sources, own)
        if stopped is None:
            return "no run was slow enough"
        stopped[0].kill()
        for path in stopped[1].rglob("*"):
            os.utime(path, (seconds, seconds))
        if problem := _resumed(job, sources, stopped[1], own):
            return f"{name}: {problem}"
    return None


def _cut(file: Path) -> None:
    os.truncate(file, 1_000)


def _append(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"\0")


def _flip(file: Path) -> None:
    status, data = file.stat(), bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replace(file: Path) -> None:
    other = file.with_suffix(".new")
    shutil.copy2(file, other)
    _flip(other)
    other.replace(file)


Injected = Callable[[Sources, Path], "str | None"]
_CALLS = {
    "no room on the disk (ENOSPC)": seccomp.FULL_DISK,
    "the disk fails (EIO)": seccomp.BROKEN_DISK,
    "no permission (EACCES)": seccomp.NO_PERMISSION,
    "read-only output (EROFS)": seccomp.READ_ONLY,
}
FAULTS: dict[str, Injected] = {
    **{f"{what}: {job.name}": partial(_refused_calls, calls, job) for what, calls in _CALLS.items() for job in JOBS.values()},
    **{f"two at once: {job.name}": partial(_two_at_once, job) for job in JOBS.values()},
    **{f"memory runs out: {job.name}": partial(_out_of_memory, job) for job in JOBS.values()},
    "a source vanishes": partial(_source, Path.unlink, (1,)),
    "a source grows": partial(_source, _append, (1,)),
    "a source is touched": partial(_source, os.utime, (1,)),
    "a source changes, its size and time are put back": partial(_source, _flip, (1,)),
    "a source is replaced by one of its size and time": partial(_source, _replace, (1,)),
    # A page of a mapped file that is not there any more kills the process; no program can catch that in time.
    "a source is cut short": partial(_source, _cut, (1, -signal.SIGBUS)),
    "a source has other contents when a killed run is gone on with": _same_stamp,
    "the clock jumps": _clock,
}
