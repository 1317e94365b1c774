"""Every wrong request: what it says, how it exits, and that the output folder is not made or not touched."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import RunCli, run_program
from reference import load
from safetensors.torch import load_file, save_file
from tiny_models import make_pair

INDEX = "model.safetensors.index.json"
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("template"), "llama", base_shards=2, aligned_shards=3)


@pytest.fixture
def pair(template: Pair, tmp_path: Path) -> Pair:
    for folder in template:
        shutil.copytree(folder, tmp_path / folder.name)
    return tmp_path / "base", tmp_path / "aligned"


@pytest.fixture
def refused(run_cli: RunCli, tmp_path: Path) -> Callable[..., str]:
    """Runs harden, asserts exit code, no traceback and no output folder; returns what was printed to standard error."""

    def run(base: object, aligned: object, *options: object, code: int = 2, out: Path | None = None, **environment: str) -> str:
        target = out or tmp_path / "out"
        existed = target.exists()
        done = run_cli("harden", base, aligned, target, *options, **environment)
        assert done.returncode == code, done.stderr
        assert done.stderr.startswith(("error: ", "warning: ", "Usage: ")) and "Traceback" not in done.stderr
        assert done.stdout == ""
        assert target.exists() == existed
        return done.stderr

    return run


def shard(folder: Path, position: int = 0) -> Path:
    return sorted(folder.glob("*.safetensors"))[position]


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def set_index(folder: Path, name: str, file: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def holder(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"


def test_missing_shard(pair: Pair, refused: Callable[..., str]) -> None:
    gone = shard(pair[1], 1)
    gone.unlink()
    message = refused(*pair)
    assert gone.name in message and "aligned" in message and "Download it again" in message


def test_truncated_and_corrupt_files_are_named_together(pair: Pair, refused: Callable[..., str]) -> None:
    truncated, corrupt = shard(pair[0]), shard(pair[1], 2)
    truncated.write_bytes(truncated.read_bytes()[:-100])
    data = corrupt.read_bytes()
    corrupt.write_bytes(data[:8] + b"garbage" + data[15:])
    message = refused(*pair)
    assert "2 problems" in message
    assert f"base: base/{truncated.name} is damaged: it is truncated" in message and f"aligned: aligned/{corrupt.name} is damaged" in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "too short"),
        (b"\xff" * 64, "header claims"),
        (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
        (struct.pack("<Q", 71) + b'{"x":{"dtype":"F32","shape":[2,2],"data_offsets":[0,12]},"__metadata__":{}}'[:71], "header"),
        (struct.pack("<Q", 56) + b'{"x":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}  ' + bytes(4), "unknown dtype 'F99'"),
        (struct.pack("<Q", 56) + b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}  ' + bytes(4), "does not fit its 4 bytes"),
        (struct.pack("<Q", 56) + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}  ' + bytes(8), "behind a hole"),
        (struct.pack("<Q", 56) + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  ' + bytes(9), "5 bytes follow its last tensor"),
    ],
)
def test_damaged_headers(pair: Pair, refused: Callable[..., str], data: bytes, words: str) -> None:
    shard(pair[1]).write_bytes(data)
    assert words in refused(*pair)


def test_index_that_leaves_the_folder(pair: Pair, refused: Callable[..., str], tmp_path: Path) -> None:
    for outside in ("../base/" + shard(pair[0]).name, str(shard(pair[0])), "..\\x.safetensors", "C:\\x.safetensors"):
        set_index(pair[1], NORM, outside)
        assert "outside the checkpoint's folder" in refused(*pair)
    target = shard(pair[1])
    target.rename(tmp_path / "elsewhere.safetensors")
    target.symlink_to(tmp_path / "elsewhere.safetensors")
    assert "link to a file outside" in refused(*pair)


def test_broken_index(pair: Pair, refused: Callable[..., str]) -> None:
    (pair[1] / INDEX).write_text("{")
    assert "no weight_map" in refused(*pair)
    (pair[1] / INDEX).write_text(json.dumps({"weight_map": {"no.such.tensor": shard(pair[1]).name}}))
    assert "no.such.tensor" in refused(*pair)


def test_shapes_that_differ(pair: Pair, refused: Callable[..., str]) -> None:
    change(holder(pair[1], UP), lambda tensors: tensors.update({UP: tensors[UP][:-1].clone()}))
    message = refused(*pair)
    assert UP in message and "[64, 32]" in message and "[63, 32]" in message


def test_tensor_missing_on_one_side(pair: Pair, refused: Callable[..., str]) -> None:
    file = holder(pair[0], UP)
    change(file, lambda tensors: tensors.pop(UP))
    index = json.loads((pair[0] / INDEX).read_text())
    del index["weight_map"][UP]
    (pair[0] / INDEX).write_text(json.dumps(index))
    message = refused(*pair)
    assert f"missing in base (base): {UP}" in message and "BF16 [64, 32]" in message
    assert "missing in aligned" in refused(pair[1], pair[0], "--order-is-right")


def test_tensor_in_two_shards(pair: Pair, refused: Callable[..., str]) -> None:
    other = next(file for file in sorted(pair[1].glob("*.safetensors")) if file != holder(pair[1], NORM))
    change(other, lambda tensors: tensors.update({NORM: torch.zeros(32, dtype=torch.bfloat16)}))
    assert f"tensor {NORM} is in both" in refused(*pair)


@pytest.mark.parametrize("sign", ["config", "fp8", "scale", "packed"])
def test_quantised_checkpoints(pair: Pair, refused: Callable[..., str], sign: str) -> None:
    aligned = pair[1]
    if sign == "config":
        config = json.loads((aligned / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
        (aligned / "config.json").write_text(json.dumps(config))
    elif sign == "fp8":
        change(holder(aligned, UP), lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}))
    elif sign == "scale":
        for folder in pair:
            change(shard(folder), lambda tensors: tensors.update({UP + "_scale_inv": torch.ones(1, 1)}))
    else:
        change(holder(aligned, UP), lambda tensors: tensors.update({UP: torch.zeros(64, 4, dtype=torch.int32)}))
    message = refused(*pair)
    assert "aligned is quantised, which is not supported" in message
    assert {"config": "gptq", "fp8": "F8_E4M3", "scale": "scales", "packed": "I32"}[sign] in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_deltas_name_tensor_and_count(pair: Pair, refused: Callable[..., str], value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][3, 4] = tensors[UP][5, 6] = value

    change(holder(pair[1], UP), spoil)
    head = "lm_head.weight"
    change(holder(pair[0], head), lambda tensors: tensors[head].fill_(value))
    message = refused(*pair, code=1)
    assert f"{UP}: 2 of them" in message and f"{head}: 3,072 of them" in message and "--skip-non-finite" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--alpha", "-0.5"], "removes safety; not supported"),
        (["--alpha-pattern", "mlp=-1"], "removes safety; not supported"),
        (["--alpha", "nan"], "finite number"),
        (["--alpha", "inf"], "finite number"),
        (["--alpha", "0"], "aligned model unchanged"),
        (["--alpha", "much"], "not a number"),
        (["--rank", "0"], "rank 0 is not a whole number"),
        (["--rank", "-3"], "rank -3 is not a whole number"),
        (["--rank-pattern", "mlp"], "not REGEX=VALUE"),
        (["--rank-pattern", "mlp=0"], "rank 0"),
        (["--dtype", "int4"], "dtype 'int4' is not supported"),
        (["--rounding", "up"], "rounding 'up' is not known"),
        (["--rank", "full", "--rounding", "feedback"], "needs a limited rank"),
        (["--fused", "both"], "fused 'both'"),
        (["--tolerance", "2"], "tolerance is 2"),
        (["--include", "("], "not a regular expression"),
        (["--include", "no_such_layer"], "matches no tensor"),
        (["--exclude", "weight"], "edits no tensor at all"),
        (["--device", "tpu"], "device 'tpu' is not known"),
        (["--device", "cuda:99"], "cuda:99 is not there"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_settings(template: Pair, refused: Callable[..., str], options: list[str], words: str) -> None:
    assert words in refused(*template, *options)


def test_base_equal_to_aligned(pair: Pair, refused: Callable[..., str], tmp_path: Path) -> None:
    assert "same checkpoint" in refused(pair[1], pair[1])
    shutil.copytree(pair[1], tmp_path / "copy")
    assert "all 16 deltas are zero" in refused(tmp_path / "copy", pair[1])
    assert "all 16 deltas are zero" in refused(tmp_path / "copy", pair[1], "--dry-run")


def test_swapped(pair: Pair, refused: Callable[..., str]) -> None:
    assert "they look swapped" in refused(pair[1], pair[0])


def test_sources_that_are_not_there(template: Pair, refused: Callable[..., str], tmp_path: Path) -> None:
    assert "there is no folder" in refused(tmp_path / "nothing", template[1])
    (tmp_path / "empty").mkdir()
    assert "has no model.safetensors" in refused(tmp_path / "empty", template[1])
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert "has adapter_config.json, but neither adapter_model.safetensors" in refused(template[0], tmp_path / "empty")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file", template[1])


def test_output_in_the_way(pair: Pair, refused: Callable[..., str], run_cli: RunCli, tmp_path: Path) -> None:
    assert "lies inside aligned" in refused(*pair, out=pair[1] / "hardened")
    assert "lies inside base" in refused(*pair, out=pair[0])
    assert "lies inside the output" in refused(*pair, out=tmp_path)
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(*pair, out=tmp_path / "file")
    assert "is a file, not a folder" in refused(*pair, out=tmp_path / "file" / "out")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for options in ([], ["--overwrite"]):
        assert "was not written by lox-merge" in refused(*pair, *options, out=mine)
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]

    out = tmp_path / "done"
    assert run_cli("harden", *pair, out).returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    message = refused(*pair, "--rank", "4", "--alpha", "2", out=out)
    assert "recipe.rank was 6, is now 4" in message and "recipe.alpha was 1.25, is now 2.0" in message and "--overwrite" in message
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_damaged_finished_output(template: Pair, refused: Callable[..., str], run_cli: RunCli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_cli("harden", *template, out).returncode == 0
    data = bytearray(shard(out).read_bytes())
    data[-1] ^= 1
    shard(out).write_bytes(data)
    assert f"{shard(out).name} is missing or not what was written" in refused(*template, out=out)


def test_full_disk_is_seen_before_writing(tmp_path: Path, refused: Callable[..., str]) -> None:
    free = shutil.disk_usage(tmp_path).free
    rows = free // (2 * 1024) + 1024
    header = json.dumps({"w": {"dtype": "BF16", "shape": [rows, 1024], "data_offsets": [0, rows * 2048]}}).encode()
    header += b" " * (-len(header) % 8)
    for role in ("base", "aligned"):
        folder = tmp_path / role
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        with (folder / "model.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + rows * 2048)  # a hole: takes no room
    assert "GB are needed" in refused(tmp_path / "base", tmp_path / "aligned")


def test_disk_that_fills_up_during_the_run_leaves_a_resumable_state(template: Pair, run_cli: RunCli, tmp_path: Path) -> None:
    # The limit makes the kernel refuse the write, as a full disk would: the third shard is larger than the first ones.
    base, aligned = make_pair(tmp_path / "pair", "llama", base_shards=1, aligned_shards=1, hidden=128)
    out = tmp_path / "out"
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from lox_merge.cli.main import main
main(["harden", {str(base)!r}, {str(aligned)!r}, {str(out)!r}])
"""
    done = run_program(code)
    assert done.returncode == 1
    assert "can't be written" in done.stderr and "run the same command again" in done.stderr and "Traceback" not in done.stderr
    assert not list(out.glob("*.safetensors")) and not (out / "lox_merge.json").exists()
    assert run_cli("harden", base, aligned, out).returncode == 0
    assert len(load(out)) > 10


def test_what_fills_the_disk_is_removed(tmp_path: Path) -> None:
    """Of an unfinished file of factors, too: it may be all that fills the disk, and nobody goes on from it."""
    base, aligned = make_pair(tmp_path / "pair", "llama", base_shards=1, aligned_shards=1, hidden=128)
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from lox_merge.cli.main import main
main(["decompose", {str(base)!r}, {str(aligned)!r}, {str(tmp_path / "out" / "factors.safetensors")!r}])
"""
    done = run_program(code)
    assert done.returncode == 1 and "can't be written" in done.stderr, done.stderr
    assert not list((tmp_path / "out").rglob("*.partial")) and not list((tmp_path / "out").rglob("*.safetensors"))


def _drop_override_capabilities() -> None:
    """Makes root as powerless over permissions as anybody else in the child process."""
    import ctypes

    drop = 24  # PR_CAPBSET_DROP
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None, use_errno=True).prctl(drop, capability, 0, 0, 0)


def test_no_permission(template: Pair, tmp_path: Path) -> None:
    import subprocess
    import sys

    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o500)
    command = [sys.executable, "-m", "lox_merge.cli.main", "harden", *map(str, template), str(closed / "out")]
    preexec = _drop_override_capabilities if os.geteuid() == 0 else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=preexec)
    closed.chmod(0o700)
    assert done.returncode == 2, done.stderr
    assert "no permission to write" in done.stderr and "Traceback" not in done.stderr
    assert not (closed / "out").exists()


def test_two_processes_on_one_output(template: Pair, refused: Callable[..., str], tmp_path: Path) -> None:
    from filelock import FileLock

    out = tmp_path / "out"
    (out / ".lox_merge").mkdir(parents=True)
    with FileLock(out / ".lox_merge" / "lock"):
        assert "another process is writing" in refused(*template, out=out)
