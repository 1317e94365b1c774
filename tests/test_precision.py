"""TF32 is off while certificates are computed, whoever turned it on, through whichever interface, and on again afterwards."""

from __future__ import annotations

import subprocess
import sys
import threading

import torch

from lox_merge.maths.precision import full_precision_matmul

# Only the setting is looked at: no CUDA is needed for that.
CUDA = torch.device("cuda")

_CASES = {
    "nothing": "pass",
    "allow_tf32": "matmul.allow_tf32 = True",
    "high": "torch.set_float32_matmul_precision('high')",
    "medium": "torch.set_float32_matmul_precision('medium')",
    "fp32_precision": "matmul.fp32_precision = 'tf32'",
    "of all backends": "torch.backends.fp32_precision = 'tf32'",
}
_SCRIPT = """
import os, sys
import torch
from lox_merge.maths.precision import full_precision_matmul

matmul = torch.backends.cuda.matmul


def state():
    found = [matmul.fp32_precision]
    for read in (lambda: matmul.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(read())
        except RuntimeError:
            found.append("not to be read through the old interface")
    return found


for setting in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    exec(setting)  # in a process of its own: settings are the process's
    before = state()
    with full_precision_matmul(torch.device("cuda")):
        with full_precision_matmul(torch.device("cuda")):
            inside = state()
        assert state() == inside
    print(before[0], inside[0], before == state(), flush=True)
    os._exit(0)
"""


def test_tf32_is_off_inside_and_as_it_was_outside() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT, *_CASES.values()], capture_output=True, text=True, check=False)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == len(_CASES), done.stderr
    assert [before for before, _, _ in lines] == ["none", *["tf32"] * 5]
    assert all(inside in ("none", "ieee") and same == "True" for _, inside, same in lines)


def test_the_last_thread_puts_tf32_back() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = True
    try:
        first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
        seen = []

        def first() -> None:
            with full_precision_matmul(CUDA):
                first_in.set()
                assert second_in.wait(10)
            first_out.set()

        def second() -> None:
            assert first_in.wait(10)
            with full_precision_matmul(CUDA):
                second_in.set()
                assert first_out.wait(10)
                seen.append(matmul.allow_tf32)

        threads = [threading.Thread(target=work) for work in (first, second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [False] and matmul.allow_tf32
    finally:
        matmul.allow_tf32 = False
