"""`harden --low-disk`: weight files of the Hub are on disk only while their shard is written, and the output is the same."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_clients import LoopbackHub, client_command, files_under, run_client
from safetensors.torch import load_file, save_file
from tiny_models import make_pair

from lox_merge import harden
from lox_merge.cli.harden import harden_command
from lox_merge.errors import RequestError

# A harden in which every step of the progress looks at what is on disk and what is mapped.
WATCHED = """
from pathlib import Path
from lox_merge import harden
from lox_merge.cli.harden import harden_command
from click.testing import CliRunner

out, seen, mapped = Path({out!r}), [], set()

class Watch:
    def advance(self, count):
        downloads = out / ".lox_merge" / "downloads"
        seen.append(sorted({{path.relative_to(downloads).as_posix().split("/")[0] + "/" + path.name for path in downloads.rglob("*.safetensors")}}))
        blobs = [path for path in downloads.rglob("blobs/*") if path.is_file()]
        assert len(blobs) == len(seen[-1]), (blobs, seen[-1])
        for line in open("/proc/self/maps"):
            if "(deleted)" in line and "downloads" in line:
                mapped.add(line.split("/")[-1])

report = out.parent / "report.json"
shown = CliRunner().invoke(harden_command, ["org/base", "org/aligned", str(out), "--low-disk", "--dry-run", "--json", str(report)]).output
assert "on disk at once, beside the output" in shown, shown
most = json.loads(report.read_text())["most_bytes_downloaded_at_once"]
harden("org/base", "org/aligned", out, low_disk=True, progress=Watch())
result = [[list(files) for files in dict.fromkeys(map(tuple, seen))], sorted(mapped), most]
"""
# Dies in the middle of its sixth shard.
KILLED = """
import os, signal
from pathlib import Path
from lox_merge import harden

class Fuse:
    def advance(self, count):
        if len(list(Path({out!r}).glob("*.safetensors"))) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

harden("org/base", "org/aligned", {out!r}, low_disk=True, progress=Fuse())
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"), "llama", base_shards=4, aligned_shards=9, layers=4)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, pair: tuple[Path, Path]) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        for role, folder in zip(("base", "aligned"), pair, strict=True):
            hub.put(f"org/{role}", folder)
        yield hub


@pytest.fixture(scope="module")
def usual(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run without the option; its Hub cache is 'full' beside it."""
    folder = tmp_path_factory.mktemp("usual")
    run_client(hub.environment(folder / "full"), f"from lox_merge import harden; harden('org/base', 'org/aligned', {str(folder / 'out')!r})")
    return folder / "out"


def assert_equal_outputs(one: Path, other: Path) -> None:
    assert files_under(one) == files_under(other)
    for name in files_under(one):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def downloads(hub: LoopbackHub, start: int) -> list[str]:
    """Weight files that were sent whole since request number `start`, as role/file."""
    by_content = {
        f"/lfs/{file.sha256}": f"{name.removeprefix('org/')}/{path}"
        for name, repository in hub.repositories.items()
        for path, file in repository.files("main").items()
        if path.endswith(".safetensors")
    }
    return [by_content[request.path] for request in hub.requests[start:] if request.origin == "storage" and request.range is None]


def needed(base: Path, aligned: Path) -> list[set[str]]:
    """Files of each shard of the output, worked out from the two indexes."""
    maps = [json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"] for folder in (base, aligned)]
    files = sorted(set(maps[1].values()))
    matrices = {name for file in files for name, tensor in load_file(aligned / file).items() if tensor.ndim > 1}
    return [{f"aligned/{file}"} | {f"base/{maps[0][name]}" for name, home in maps[1].items() if home == file and name in matrices} for file in files]


def shared(shards: list[set[str]], position: int) -> set[str]:
    """What is on disk while a shard is written: its own files, and those that one before it and one after it read."""
    return shards[position] | (set().union(*shards[:position]) & set().union(*shards[position + 1 :]))


def test_only_the_shard_in_hand_is_on_disk_and_the_output_is_the_same(
    hub: LoopbackHub, hub_home: Path, pair: tuple[Path, Path], usual: Path, tmp_path: Path
) -> None:
    out, start = tmp_path / "out", len(hub.requests)
    seen, mapped, most = run_client(hub.environment(hub_home), WATCHED.format(out=str(out)))
    assert_equal_outputs(out, usual)
    shards = needed(*pair)
    for files in seen:
        assert any(set(files) <= shared(shards, position) for position in range(len(shards))), files
        assert sum(file.startswith("aligned") for file in files) == 1
    assert {file for files in seen for file in files} == set().union(*shards)
    assert mapped == []  # a file that is dropped while it is mapped would keep its room
    assert sorted(downloads(hub, start)) == sorted(set().union(*shards))  # each once
    assert most == max(sum((pair[0].parent / file).stat().st_size for file in shared(shards, position)) for position in range(len(shards)))
    assert not list(hub_home.rglob("*.safetensors"))


def test_killed_and_resumed_downloads_what_is_left(hub: LoopbackHub, hub_home: Path, pair: tuple[Path, Path], usual: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    environment = hub.environment(hub_home)
    killed = subprocess.run(client_command(KILLED.format(out=str(out))), env=environment, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = sorted(path.name for path in (out / ".lox_merge").rglob("snapshots/*/*"))
    assert len(left) == 2
    shutil.copytree(out, other, symlinks=True)
    record = next((other / ".lox_merge").glob("model-00001-of-*.json"))
    document = json.loads(record.read_text())
    document["sources"]["aligned"] = dict.fromkeys(document["sources"]["aligned"], "ab" * 32)
    record.write_text(json.dumps(document))
    start = len(hub.requests)
    body = (
        "from lox_merge import harden; from pathlib import Path; go = lambda out: harden('org/base', 'org/aligned', out, low_disk=True)\n"
        f"result = [attempt(lambda: go({str(other)!r})), go({str(out)!r}).resumed_shards]"
    )
    changed, resumed = run_client(environment, body)
    assert changed["error"] == "SourceChangedError" and "is not the file that" in changed["message"]
    assert resumed == 5
    assert_equal_outputs(out, usual)
    shards = needed(*pair)
    assert sorted(downloads(hub, start)) == sorted(set().union(*shards[5:]) - shards[5])  # what was there for the sixth was taken


def test_cached_files_stay_and_refusals_leave_nothing(hub: LoopbackHub, hub_home: Path, pair: tuple[Path, Path], usual: Path, tmp_path: Path) -> None:
    cache = shutil.copytree(usual.parent / "full", hub_home, symlinks=True)
    cached = files_under(cache / "hub")
    twin, broken = tmp_path / "twin", tmp_path / "broken"
    shutil.copytree(pair[0], twin)
    (twin / "new.txt").write_text("another commit")
    shutil.copytree(pair[1], broken)
    spoilt = []
    for file in sorted(broken.glob("*.safetensors"))[1::4]:
        tensors = load_file(file)
        spoilt.append(next(name for name, tensor in tensors.items() if tensor.ndim > 1))
        tensors[spoilt[-1]].view(-1)[3] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
    hub.put("org/twin", twin)
    hub.put("org/broken", broken)
    finished = shutil.copytree(usual, tmp_path / "finished")
    start = len(hub.requests)
    body = (
        "from lox_merge import harden; from pathlib import Path\n"
        "def go(aligned, out, **settings):\n"
        "    return harden('org/base', 'org/' + aligned, out, low_disk=True, order_is_right=True, **settings).seconds\n"
        f"folder = Path({str(tmp_path)!r}); result = [go('aligned', folder / 'cached'), attempt(lambda: go('twin', folder / 'equal')), "
        "attempt(lambda: go('twin', folder / 'finished', overwrite=True)), attempt(lambda: go('broken', folder / 'spoilt'))]"
    )
    _, equal, over, non_finite = run_client(hub.environment(hub_home), body)
    assert_equal_outputs(tmp_path / "cached", usual)
    assert not [file for file in downloads(hub, start) if file.split("/")[0] in ("base", "aligned")]
    assert set(cached) <= set(files_under(cache / "hub"))
    assert equal["error"] == "RequestError" and "deltas are zero" in equal["message"] and not (tmp_path / "equal").exists()
    assert "deltas are zero" in over["message"]
    assert_equal_outputs(finished, usual)
    assert non_finite["error"] == "NonFiniteDeltaError" and all(name in non_finite["message"] for name in spoilt) and len(spoilt) == 2
    assert not (tmp_path / "spoilt").exists()
    assert not [path for path in (cache / "hub").rglob("*.safetensors") if "twin" in str(path) or "broken" in str(path)]


def test_what_it_is_not_for(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no model is on the Hub"):
        harden(*pair, tmp_path / "out", low_disk=True)
    for other in (["--as-adapter"], ["--rank", "search", "--prompts", "prompts.csv"]):
        with pytest.raises(RequestError, match="--low-disk does not go with"):
            harden_command.main([*map(str, pair), str(tmp_path / "out"), "--low-disk", *other], standalone_mode=False)
    assert not (tmp_path / "out").exists()
