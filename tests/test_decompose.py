"""Factors are the leading triplets of every delta, know their pair, and come out the same whatever interrupted them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import RunCli, start_cli
from safetensors import safe_open
from tiny_models import make_pair, read_tensors

from lox_merge.checkpoint.checkpoint import open_checkpoint
from lox_merge.cli.decompose import decompose_command
from lox_merge.errors import NonFiniteDeltaError, OutputError, RequestError, SourceChangedError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.factors import Factors
from lox_merge.jobs.recipe import Recipe

RANK = 5


def expected_matrices(architecture: str, name: str, values: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The matrices of a stored tensor by label, cut out here by hand."""
    if values.ndim != 3 or "expert" not in name:
        yield "", values.reshape(values.shape[0], -1)
        return
    for number, expert in enumerate(values):
        if "gate_up_proj" not in name:
            yield f"[{number}]", expert
        elif architecture == "gpt_oss":
            yield f"[{number}].gate", expert[:, 0::2]
            yield f"[{number}].up", expert[:, 1::2]
        else:
            yield f"[{number}].gate", expert[: expert.shape[0] // 2]
            yield f"[{number}].up", expert[expert.shape[0] // 2 :]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gpt_oss", "llava"])
def test_triplets_against_a_full_svd_in_float64(tmp_path: Path, architecture: str) -> None:
    base, aligned = make_pair(tmp_path, architecture)
    factors = decompose(base, aligned, tmp_path / "f.safetensors", recipe=Recipe(rank=RANK)).factors
    before, after = read_tensors(base), read_tensors(aligned)
    expected = {
        (name, label): aligned_matrix.double() - base_matrix.double()
        for name, values in after.items()
        if values.ndim >= 2
        for (label, aligned_matrix), (_, base_matrix) in zip(
            expected_matrices(architecture, name, values), expected_matrices(architecture, name, before[name]), strict=True
        )
    }
    assert set(factors.matrices) == set(expected)
    for (name, label), delta in expected.items():
        found = factors.subspace(name, label)
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        k = min(RANK, min(delta.shape))
        assert found.left.shape == (delta.shape[0], k) and found.right.shape == (delta.shape[1], k)
        assert found.left.dtype == torch.float32 and found.singular_values.dtype == torch.float64
        torch.testing.assert_close(found.singular_values, values[:k], rtol=1e-5, atol=0)
        best = left[:, :k] @ torch.diag(values[:k]) @ right[:k]
        error = torch.linalg.matrix_norm(found.low_rank().double() - best) / torch.linalg.matrix_norm(best)
        assert error < 1e-4, (name, label)
        assert found.norm == pytest.approx(float(torch.linalg.matrix_norm(delta)), rel=1e-6)
        following = found.certificate.next_singular_value
        assert (following is None and k == min(delta.shape)) or following == pytest.approx(float(values[k]), rel=1e-5)


def test_the_file_is_plain_safetensors_and_says_what_it_is_of(tmp_path: Path, run_cli: RunCli) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    path = tmp_path / "f.safetensors"
    done = run_cli("decompose", base, aligned, path, "--rank", RANK, "--exclude", "lm_head", "--json", "-")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
        assert "model.embed_tokens.weight.left" in names and not any("lm_head" in name for name in names)
        text = "".join(file.metadata().values())
    assert str(tmp_path) not in text
    assert {"base", "aligned"} == set(report["sources"]) and len(report["sources"]["aligned"]["files"]) == 3
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["aligned", "base", "f.safetensors"], "no work folder stays behind"
    with Factors.open(path) as held:
        assert held.recipe.exclude == ("lm_head",) and held.rank == RANK
    table = run_cli("decompose", base, aligned, path, "--rank", RANK, "--exclude", "lm_head")
    assert table.returncode == 0 and "nothing to do" in table.stdout and max(map(len, table.stdout.splitlines())) <= 80


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    capsys.readouterr()
    decompose_command.main([str(base), str(aligned), str(tmp_path / "f.safetensors"), "--dry-run", "--json", "-"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["matrices"] == 16
    assert {entry.name for entry in tmp_path.iterdir()} == {"aligned", "base"}


def test_factors_of_another_pair_are_refused(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "one", "llama")
    other_base, other_aligned = make_pair(tmp_path / "other", "llama", seed=1)
    factors = decompose(base, aligned, tmp_path / "f.safetensors", recipe=Recipe(rank=RANK)).factors
    factors.check(open_checkpoint(base, "base"), open_checkpoint(aligned, "aligned"))
    renamed = base.rename(tmp_path / "renamed")
    factors.check(open_checkpoint(renamed, "base"), open_checkpoint(aligned, "aligned"))
    with pytest.raises(RequestError, match=r"another pair: base base, aligned aligned; given were base base.*base: model.safetensors has other"):
        factors.check(open_checkpoint(other_base, "base"), open_checkpoint(aligned, "aligned"))
    with pytest.raises(RequestError, match=r"aligned: model-00001-of-00003.safetensors has other contents"):
        factors.check(open_checkpoint(renamed, "base"), open_checkpoint(other_aligned, "aligned"))


def test_a_rank_above_what_is_held_is_refused(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    factors = decompose(base, aligned, tmp_path / "f.safetensors", recipe=Recipe(rank=RANK)).factors
    assert factors.subspace("lm_head.weight", rank=2).rank == 2
    with pytest.raises(RequestError, match=r"rank 6 is asked and f.safetensors holds 5 .*--rank 6"):
        factors.subspace("lm_head.weight", rank=6)
    with pytest.raises(RequestError, match=r"no factors of model.norm.weight"):
        factors.subspace("model.norm.weight")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("f.bin", Recipe(rank=4), r"does not end in \.safetensors"),
        ("f.safetensors", Recipe(rank="energy:0.9"), "depends on the matrix"),
        ("f.safetensors", Recipe(rank=4, include=("nothing",)), "matches no tensor"),
        ("aligned/f.safetensors", Recipe(rank=4), "lies inside aligned"),
        ("base", Recipe(rank=4), "does not end in"),
        ("aligned/model-00001-of-00003.safetensors", Recipe(rank=4), "lies inside aligned"),
    ],
)
def test_wrong_requests(tmp_path: Path, name: str, settings: Recipe, message: str) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    with pytest.raises(RequestError, match=message):
        decompose(base, aligned, tmp_path / name, recipe=settings)


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    path = tmp_path / "f.safetensors"
    path.write_bytes((base / "model.safetensors").read_bytes())
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds no factors"):
            decompose(base, aligned, path, recipe=Recipe(rank=4), overwrite=overwrite)
    with pytest.raises(RequestError, match="holds no factors"):
        Factors.open(path)
    path.unlink()
    decompose(base, aligned, path, recipe=Recipe(rank=4))
    with pytest.raises(OutputError, match="another job"):
        decompose(base, aligned, path, recipe=Recipe(rank=3))
    assert decompose(base, aligned, path, recipe=Recipe(rank=3), overwrite=True).factors.rank == 3


def test_non_finite_deltas_are_named_or_left_out(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, aligned = make_pair(tmp_path, "llama", aligned_shards=1)
    tensors = read_tensors(aligned)
    tensors["lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, aligned / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteDeltaError, match=r"lm_head.weight: 1 of them"):
        decompose(base, aligned, tmp_path / "f.safetensors", recipe=Recipe(rank=4))
    assert {entry.name for entry in tmp_path.iterdir()} == {"aligned", "base"}
    factors = decompose(base, aligned, tmp_path / "f.safetensors", recipe=Recipe(rank=4, skip_non_finite=True)).factors
    assert factors.document["non_finite"] == ["lm_head.weight"] and ("lm_head.weight", "") not in factors


def test_a_zero_delta_has_no_directions(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    base, aligned = make_pair(tmp_path, "llama", aligned_shards=1)
    tensors = read_tensors(aligned)
    tensors["lm_head.weight"] = read_tensors(base)["lm_head.weight"]
    save_file(tensors, aligned / "model.safetensors", metadata={"format": "pt"})
    factors = decompose(base, aligned, tmp_path / "f.safetensors", recipe=Recipe(rank=4)).factors
    found = factors.subspace("lm_head.weight", rank=3)
    assert found.rank == 0 and found.norm == 0 and found.alignment_ratio is None


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", base_shards=2, aligned_shards=8, hidden=256, layers=6, vocabulary=2000)
    expected = decompose(base, aligned, tmp_path / "whole.safetensors", recipe=Recipe(rank=16), device="cpu").path.read_bytes()
    path = tmp_path / "f.safetensors"
    arguments = ("decompose", base, aligned, path, "--rank", "16", "--device", "cpu")
    parts = tmp_path / ".f.safetensors.parts"
    for kill in range(2):
        process = start_cli(*arguments)
        while process.poll() is None and len(list(parts.glob("*.piece"))) < 2 * (kill + 1):
            time.sleep(0.001)
        process.kill()
        process.finish()
        assert not path.exists(), "the run was too quick to be killed"
    kept = {piece: piece.stat().st_mtime_ns for piece in parts.glob("*.piece") if (parts / ".lox_merge" / f"{piece.name}.json").exists()}
    assert len(kept) >= 2
    with pytest.raises(OutputError, match=r"another job: recipe.exclude was \[\], is now \['lm_head'\]"):
        decompose(base, aligned, path, recipe=Recipe(rank=16, exclude=("lm_head",)), device="cpu")

    process = start_cli(*arguments)
    untouched = True
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            untouched = untouched and all(piece.stat().st_mtime_ns == stamp for piece, stamp in kept.items())
    done = process.finish()
    assert done.returncode == 0, done.stderr
    assert untouched, "finished pieces were made again"
    assert path.read_bytes() == expected


def test_a_source_that_changed_in_between_is_noticed(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", base_shards=2, aligned_shards=8, hidden=256, layers=6, vocabulary=2000)
    parts = tmp_path / ".f.safetensors.parts"
    process = start_cli("decompose", base, aligned, tmp_path / "f.safetensors", "--rank", 16)
    while process.poll() is None and not list((parts / ".lox_merge").glob("*.piece.json")):
        time.sleep(0.001)
    process.kill()
    process.finish()
    shard = sorted(aligned.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(SourceChangedError):
        decompose(base, aligned, tmp_path / "f.safetensors", recipe=Recipe(rank=16))
