"""`verify`: sound outputs pass; a flipped bit, a swapped tensor, an edited manifest and other sources do not."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCli
from hub_clients import LoopbackHub
from reference import load
from safetensors.torch import load_file, save_file
from tiny_models import make_pair

from lox_merge import Recipe, harden
from lox_merge.errors import PlanError, RequestError, SourceError
from lox_merge.jobs.verify import verify

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("verify")
    base, aligned = make_pair(folder, "llama", base_shards=2, aligned_shards=3)
    harden(
        base, aligned, folder / "out", recipe=Recipe(rank=4, exclude=("lm_head",), rank_pattern=((r"k_proj", 2),), alpha_pattern=(("v_proj", 0.5),))
    )
    return base, aligned, folder / "out"


@pytest.fixture
def out(made: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[2], tmp_path / "out")


def manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "lox_merge.json").read_text())  # type: ignore[no-any-return]


def write_manifest(out: Path, value: dict[str, Any]) -> None:
    (out / "lox_merge.json").write_text(json.dumps(value))


def holder(out: Path, name: str) -> Path:
    index = json.loads((out / "model.safetensors.index.json").read_text())
    return out / index["weight_map"][name]


def rewrite(out: Path, name: str, tensor: torch.Tensor) -> None:
    """Puts another tensor in, and the new hash into the manifest, as somebody would who wants it to go unnoticed."""
    file = holder(out, name)
    save_file({**load_file(file), name: tensor}, file, metadata={"format": "pt"})
    value = manifest(out)
    for entry in value["output"]["shards"]:
        if entry["file"] == file.name:
            entry.update(sha256=hashlib.sha256(file.read_bytes()).hexdigest(), size=file.stat().st_size)
    write_manifest(out, value)


def test_sound_outputs_pass_on_every_path(made: tuple[Path, Path, Path], run_cli: RunCli, tmp_path: Path) -> None:
    base, aligned, out = made
    result = verify(out, base=base, aligned=aligned)
    assert result.ok and result.sources_checked and result.tensors_recomputed == result.tensors == len(load(out))
    assert result.rounded_apart == []
    assert verify(out, base=base, aligned=aligned, sample=3).tensors_recomputed == 3
    offline = verify(out, offline=True)
    assert offline.ok and not offline.sources_checked
    done = run_cli("verify", out, "--base", base, "--aligned", aligned, "--json", tmp_path / "result.json")
    assert done.returncode == 0 and "made again from the sources: equal" in done.stdout
    assert json.loads((tmp_path / "result.json").read_text())["ok"] is True


@pytest.mark.parametrize("architecture", ["gpt_oss", "mixtral", "gpt2"])
@pytest.mark.parametrize("settings", [{"rounding": "stochastic"}, {"dtype": "float32"}, {"rank": "full"}, {"rank": "energy:0.5"}])
def test_every_kind_of_recipe_can_be_recomputed(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "pair", architecture, layers=1)
    harden(base, aligned, tmp_path / "out", recipe=Recipe(**settings))
    result = verify(tmp_path / "out", base=base, aligned=aligned)
    assert result.problems == [] and result.rounded_apart == []


def test_one_flipped_bit_is_found_by_its_hash(out: Path, run_cli: RunCli) -> None:
    file = holder(out, UP)
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    done = run_cli("verify", out, "--offline")
    assert done.returncode == 1
    assert f"{file.name} is not what was written" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("forged", ["aligned's", "scaled", "one value"])
def test_a_swapped_tensor_is_found_by_recomputing(made: tuple[Path, Path, Path], out: Path, forged: str) -> None:
    base, aligned, _ = made
    written = load(out)[UP].clone()
    if forged == "aligned's":
        written = load(aligned)[UP]
    elif forged == "scaled":
        written = (written.float() * 1.02).bfloat16()
    else:
        written[3, 4] = torch.nextafter(written[3, 4], torch.tensor(torch.inf, dtype=written.dtype))
    rewrite(out, UP, written)
    assert verify(out, offline=True).ok
    (problem,) = verify(out, base=base, aligned=aligned).problems
    assert problem.startswith(f"tensor {UP} (") and "is not what the recipe gives" in problem


def test_an_edited_manifest_is_found(made: tuple[Path, Path, Path], out: Path) -> None:
    base, aligned, _ = made
    sound = manifest(out)

    def problems(**changes: Any) -> list[str]:
        write_manifest(out, {**json.loads(json.dumps(sound)), **changes})
        return verify(out, base=base, aligned=aligned).problems

    assert problems() == []
    assert "summary does not follow" in problems(summary={**sound["summary"], "mean_r_align": 0.999})[0]
    stronger = json.loads(json.dumps(sound["job"]))
    stronger["recipe"]["alpha"] = 2.5
    assert any("is not what the recipe gives" in problem for problem in problems(job=stronger))
    tensors = json.loads(json.dumps(sound["tensors"]))
    edited = next(tensor for tensor in tensors if tensor["name"] == UP)
    edited["matrices"][0]["singular_values"][0] *= 1.1
    assert any("figures of tensor" in problem for problem in problems(tensors=tensors))
    renamed = json.loads(json.dumps(sound["tensors"]))
    renamed[0]["name"] = "something.else"
    assert len(problems(tensors=renamed)) == 2


def test_files_that_do_not_belong_or_are_gone(out: Path) -> None:
    save_file({"x": torch.zeros(1)}, out / "extra.safetensors")
    (out / "tokenizer.json").unlink()
    (out / "config.json").write_text("{}")
    found = verify(out, offline=True).problems
    assert [problem for problem in found if "extra.safetensors is not in the manifest" in problem]
    assert [problem for problem in found if "tokenizer.json is missing" in problem]
    assert [problem for problem in found if "config.json is not what was written" in problem]


def test_other_sources_are_named(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned, out = made
    other = shutil.copytree(base, tmp_path / "other")
    file = sorted(other.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (problem,) = verify(out, base=other, aligned=aligned).problems
    assert problem.startswith(f"base: {file.name} of other is not the file that was used")
    assert "its headers differ" in verify(out, base=aligned, aligned=aligned).problems[0]
    with pytest.raises(SourceError, match="say where it is with --base"):
        verify(out)


def test_wrong_requests(made: tuple[Path, Path, Path], out: Path, run_cli: RunCli, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="nothing to verify it against"):
        verify(made[1])
    write_manifest(out, {**manifest(out), "format": 99})
    with pytest.raises(RequestError, match="format 99"):
        verify(out)
    holder(out, UP).unlink()
    with pytest.raises(PlanError, match="lacks the shard"):
        verify(out)
    done = run_cli("verify", tmp_path / "nothing")
    assert done.returncode == 2 and "there is no folder" in done.stderr


def test_output_and_sources_on_the_hub(
    loopback_hub: LoopbackHub, hub_home: Path, made: tuple[Path, Path, Path], run_cli: RunCli, tmp_path: Path
) -> None:
    for name, folder in zip(("base", "aligned"), made[:2], strict=True):
        loopback_hub.put(f"owner/{name}", folder)
    environment = loopback_hub.environment(hub_home)
    made_from_hub = run_cli("harden", "owner/base", "owner/aligned", tmp_path / "out", **environment)
    assert made_from_hub.returncode == 0, made_from_hub.stderr
    loopback_hub.put("owner/hardened", tmp_path / "out")
    done = run_cli("verify", "owner/hardened", "--sample", 5, **environment)
    assert done.returncode == 0, done.stderr
    assert "5 tensors made again from the sources: equal" in done.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_may_not_differ_at_all(tmp_path: Path, dtype: str) -> None:
    """What rounding on another machine explains of an edit explains nothing of a tensor that nothing was computed of."""
    base, aligned = make_pair(tmp_path, "llama", dtype)
    out = harden(base, aligned, tmp_path / "out", recipe=Recipe(rank=4, exclude=("lm_head",))).out
    copied = load(out)["lm_head.weight"].clone()
    flat = copied.view(-1)
    few = flat[: flat.numel() // 60]
    few.copy_(torch.nextafter(few, torch.full_like(few, torch.inf)))
    rewrite(out, "lm_head.weight", copied)
    (problem,) = verify(out, base=base, aligned=aligned).problems
    assert problem.startswith("tensor lm_head.weight") and f"{few.numel():,} of {copied.numel():,} values differ" in problem
