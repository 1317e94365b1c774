"""The kernels of the GPU without one: run by Triton's interpreter on a CPU, built for one that is not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lox_merge.errors import LoxMergeWarning
from lox_merge.maths import thin_products

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is made for Linux")

PROGRAM = Path(__file__).with_name("thin_kernels_alone.py")
# Of a block, by how many stages a GPU takes that has it: data-centre GPUs since Ampere, consumer ones.
SHARED_MEMORY = {3: 120_000, 2: 99 * 1024}


def program(what: str, **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), what], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def ran() -> Any:
    return program("run", TRITON_INTERPRET="1")


def test_products_have_the_errors_of_float32(ran: Any) -> None:
    assert len(ran["products"]) == 10 and ran["splits"] == [1, 2]
    for shape, error in ran["products"].items():
        assert error <= 1e-6, shape  # not <: NaN fails it


def test_products_of_rows_have_the_errors_of_float64(ran: Any) -> None:
    assert len(ran["rows"]) == 10
    for shape, error in ran["rows"].items():
        assert error <= 1e-15, shape


def test_rows_become_orthonormal_as_with_torch(ran: Any) -> None:
    assert len(ran["orthonormal"]) == 4
    for found in ran["orthonormal"]:
        assert found["lost"] == found["expected_lost"] == [False, False, True, True, True, True]
        assert found["of_lost"] == 0
        assert found["difference"] <= 1e-5
        assert found["skew"] <= 1e-6
        assert found["gram"] <= 1e-12


def test_whole_svds_go_through_them(ran: Any) -> None:
    assert ran["calls"]["rows_times"] > 20
    assert ran["calls"]["products_of_rows"] > 2 and ran["calls"]["orthonormal_rows"] > 8
    assert len(ran["svd"]) == 2 and all(error <= 1e-3 for error in ran["svd"])


def test_they_are_built_for_a_gpu(tmp_path: Path) -> None:
    built = program("build", TRITON_CACHE_DIR=str(tmp_path))
    assert len(built) == 10
    for kernel, found in built.items():
        assert 0 < found["shared"] <= SHARED_MEMORY[int(kernel.split()[1])], kernel
        assert found["matrix_units"], kernel


def test_where_they_do_not_work_products_go_through_torch_and_a_warning_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    try:
        with pytest.warns(LoxMergeWarning, match=r"Triton's kernels cannot be used on cuda:0 \(.+\); SVDs take about twice as long") as heard:
            assert thin_products.fast_kernels(device) is None
            assert thin_products.fast_kernels(device) is None
        assert len(heard) == 1
    finally:
        thin_products._built.cache_clear()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_where_there_are_none_nothing_is_said(device: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    try:
        assert thin_products.fast_kernels(torch.device(device)) is None
        assert not recwarn.list
    finally:
        thin_products._built.cache_clear()
