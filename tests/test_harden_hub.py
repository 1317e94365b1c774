"""`harden` with sources on the Hub: the commit is recorded, only what is needed travels, refusals come before any download."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from forked_cli import run_forked
from hub_clients import LoopbackHub
from reference import load
from tiny_models import make_pair

from lox_merge import harden


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base, aligned = make_pair(tmp_path_factory.mktemp("pair"), "llama", base_shards=2, aligned_shards=3)
    (base / "pytorch_model.bin").write_bytes(bytes(200_000))  # the same weights in another format: not needed
    (aligned / "model.gguf").write_bytes(bytes(200_000))
    (aligned / "README.md").write_text("---\nlicense: mit\n---\n")
    return base, aligned


def run(hub: LoopbackHub, home: Path, *arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    return run_forked(["harden", *arguments], hub.environment(home, **settings))  # type: ignore[arg-type]


def test_hub_sources_give_the_bytes_of_local_ones(loopback_hub: LoopbackHub, hub_home: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    commits = {role: loopback_hub.put(f"owner/{role}", folder) for role, folder in zip(("base", "aligned"), pair, strict=True)}
    done = run(loopback_hub, hub_home, "owner/base", "owner/aligned@main", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    harden(*pair, tmp_path / "local")
    for path in (tmp_path / "local").iterdir():
        if path.name != "lox_merge.json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    manifest = json.loads((tmp_path / "out" / "lox_merge.json").read_text())
    assert manifest["sources"]["base"] | {"files": None} == {
        "kind": "hub", "name": "owner/base", "revision": None, "commit": commits["base"], "files": None,
    }  # fmt: skip
    assert manifest["sources"]["aligned"]["revision"] == "main" and manifest["sources"]["aligned"]["commit"] == commits["aligned"]
    assert str(tmp_path) not in json.dumps(manifest)
    fetched = {path.name for path in hub_home.rglob("snapshots/*/*")}
    assert not {"pytorch_model.bin", "model.gguf", "README.md"} & fetched

    before = len(loopback_hub.content_requests())
    assert run(loopback_hub, hub_home, "owner/base", "owner/aligned", tmp_path / "again", offline=True).returncode == 0
    assert len(loopback_hub.content_requests()) == before
    assert load(tmp_path / "again").keys() == load(tmp_path / "local").keys()


def test_dry_run_reads_headers_and_downloads_no_weights(loopback_hub: LoopbackHub, hub_home: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    for role, folder in zip(("base", "aligned"), pair, strict=True):
        loopback_hub.put(f"owner/{role}", folder)
    done = run(loopback_hub, hub_home, "owner/base", "owner/aligned", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "16 tensors" in done.stdout
    assert not [path for path in hub_home.rglob("*.safetensors") if path.is_file()]
    wrong = run(loopback_hub, hub_home, "owner/aligned", "owner/base", tmp_path / "out")
    assert wrong.returncode == 2 and "they look swapped" in wrong.stderr
    same = run(loopback_hub, hub_home, "owner/base", "owner/base@main", tmp_path / "out")
    assert same.returncode == 2 and "same checkpoint" in same.stderr


@pytest.mark.parametrize(
    ("settings", "words"), [({"gated": True}, "is gated"), ({"private": True}, "not found on the Hub"), (None, "not found on the Hub")]
)
def test_no_access_is_said_before_anything_is_downloaded(
    loopback_hub: LoopbackHub, hub_home: Path, pair: tuple[Path, Path], tmp_path: Path, settings: dict[str, bool] | None, words: str
) -> None:
    loopback_hub.put("owner/base", pair[0])
    if settings is not None:
        loopback_hub.put("owner/aligned", pair[1], **settings)
    done = run(loopback_hub, hub_home, "owner/base", "owner/aligned", tmp_path / "out", token="stranger-token")
    assert done.returncode == 2
    assert done.stderr.startswith("error: aligned: owner/aligned") and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert not [path for path in hub_home.rglob("*.safetensors") if path.is_file()]
