"""Makes the kernel refuse system calls of this process with an error of choice (seccomp filters): needs no root, and lasts until it ends."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass

# linux/audit.h and the tables of system calls.
_MACHINES = {
    "x86_64": (0xC000003E, {"write": 1, "pwrite64": 18, "fsync": 74, "rename": 82, "mkdir": 83, "openat": 257}),
    "aarch64": (0xC00000B7, {"write": 64, "pwrite64": 68, "fsync": 82, "rename": 38, "mkdir": 34, "openat": 56}),
}
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # classic BPF
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_ARGUMENTS = 16  # offset of the first argument in struct seccomp_data, 8 bytes each
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Refusal:
    """One system call that ends with `error`. at_least, any_bit: only where the argument (its place, value) says so."""

    call: str
    error: int
    at_least: tuple[int, int] | None = None
    any_bit: tuple[int, int] | None = None


# A write of many bytes, so that notes of the working state still fit on the disk, as on a real one.
FULL_DISK = tuple(Refusal(call, errno.ENOSPC, at_least=(2, 8_000)) for call in ("write", "pwrite64"))
BROKEN_DISK = (Refusal("fsync", errno.EIO),)
NO_PERMISSION = (Refusal("rename", errno.EACCES),)
# openat(folder, name, flags)
READ_ONLY = (Refusal("openat", errno.EROFS, any_bit=(2, _WRITES)), Refusal("mkdir", errno.EROFS))


def _instruction(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value)


def refuse(refusals: tuple[Refusal, ...]) -> None:
    """Installs the filter for this thread and all that it starts. Raises OSError where the kernel has none."""
    machine, numbers = _MACHINES[platform.machine()]
    program = [_instruction(_LOAD, 4), _instruction(_EQUAL, machine, 1, 0), _instruction(_RETURN, _ALLOW)]
    for refusal in refusals:
        end = _instruction(_RETURN, _ERROR | refusal.error)
        condition: list[bytes] = []
        for code, given in ((_AT_LEAST, refusal.at_least), (_ANY_BIT, refusal.any_bit)):
            if given is not None:
                condition = [_instruction(_LOAD, _ARGUMENTS + 8 * given[0]), _instruction(code, given[1], 0, 1)]
        program += [_instruction(_LOAD, 0), _instruction(_EQUAL, numbers[refusal.call], 0, len(condition) + 1), *condition, end]
    program.append(_instruction(_RETURN, _ALLOW))
    library = ctypes.CDLL(None, use_errno=True)
    code = ctypes.create_string_buffer(b"".join(program))
    described = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code)))
    # PR_SET_NO_NEW_PRIVS, without which only root may; then PR_SET_SECCOMP, SECCOMP_MODE_FILTER.
    if library.prctl(38, 1, 0, 0, 0) or library.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(described)), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")
