"""`push`: what arrives is what was verified, once, in one commit; every refusal comes before anything is changed."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from hub_clients import LoopbackHub, files_under, run_client
from publishers import Publisher
from push_fixtures import assert_published, refused, sent_bytes, since, stored

from lox_merge import Recipe, harden

UP = "model-00002-of-00003.safetensors"


# What is published


@pytest.mark.parametrize("way", ["LFS", "multipart", "Xet"])
def test_what_is_pushed_comes_back_and_generates(
    way: str, hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], repo: str, tmp_path: Path
) -> None:
    hub.part_size = 10_000 if way == "multipart" else None
    # Of its own: what another test or way uploaded would be there already, in its form.
    out = harden(made[0], made[1], tmp_path / "out", recipe=Recipe(rank=4, alpha={"LFS": 1.75, "multipart": 1.0, "Xet": 1.5}[way])).out
    done = publisher.push(out, repo, "--json", "-", xet=way == "Xet")
    assert done.returncode == 0, done.stderr
    result = done.json
    assert_published(hub, repo, out)
    repository = hub.repositories[repo]
    assert repository.private and result["private"] and result["created"]
    assert repository.tags == {"lox-merge-v0.1.0": result["commit"]} and repository.branches["main"] == result["commit"]
    assert result["url"] == f"{hub.endpoint}/{repo}/tree/lox-merge-v0.1.0"
    assert len(repository.commits) == 2  # the Hub's own and ours
    large = repository.files("main")[UP]
    assert (large.lfs, large.xet_hash is not None) == (True, way == "Xet")

    start = len(hub.requests)
    again = publisher.push(out, repo, "--json", "-", xet=way == "Xet")
    assert again.returncode == 0, again.stderr
    assert again.json["commit"] == result["commit"] and again.json["sent"] == [] and not again.json["created"]
    assert sent_bytes(since(hub, start)) == 0
    assert not [
        request for request in since(hub, start) if request.method in ("PUT", "DELETE") or "/commit/" in request.path or "/tag/" in request.path
    ]
    assert len(repository.commits) == 2 and len(repository.tags) == 1

    if way == "LFS":
        _use_as_the_card_says(hub, stored(hub, repo)["README.md"].decode(), repo, result["commit"], out, tmp_path)


def _use_as_the_card_says(hub: LoopbackHub, card: str, repo: str, commit: str, out: Path, tmp_path: Path) -> None:
    """The card's own Python, on what snapshot_download brings by the commit; and the card's metadata as the Hub takes and gives it."""
    body = (
        "from huggingface_hub import ModelCard, snapshot_download; "
        f"card = ModelCard.load({repo!r}); card.validate(); result = [snapshot_download({repo!r}, revision={commit!r}), card.data.to_dict()]"
    )
    folder, metadata = run_client(hub.environment(tmp_path / "reader", token="read-token"), body)
    for name in files_under(out):
        assert (Path(folder) / name).read_bytes() == (out / name).read_bytes()
    assert metadata == {
        "license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["lox", "safety", "alignment", "lox-merge", "merge"],
    }  # fmt: skip
    used: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0].replace(repo, folder), used)
    assert used["reply"].shape[1] > used["prompt"]["input_ids"].shape[1]
    assert str(used["model"].dtype) == "torch.bfloat16"


def test_nothing_of_this_machine_is_written_or_uploaded(
    hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    out = shutil.copytree(made[2], tmp_path / "out")
    (out / "notes.txt").write_text("mine, and not of the model")
    results = _asr_results(out, tmp_path / "asr.json")
    report = tmp_path / "push.json"
    done = publisher.push(out, "owner/private-things", "--results", results, "--json", report, "--aligned", made[1])
    assert done.returncode == 0, done.stderr
    carded = publisher.run("card", out, "--repo", "owner/private-things", "--license", "mit", "--results", results)
    assert carded.returncode == 0, carded.stderr
    texts = stored(hub, "owner/private-things") | {path.name: path.read_bytes() for path in out.iterdir()} | {"json": report.read_bytes()}
    assert "notes.txt" not in stored(hub, "owner/private-things")
    secrets = [str(tmp_path), str(out.parent), str(Path.home()), "owner-token", str(made[1].parent)]
    if len(socket.gethostname()) > 3:
        secrets.append(socket.gethostname())
    for name, data in texts.items():
        for secret in secrets:
            if secret not in ("/root", "/"):
                assert secret.encode() not in data, (name, secret)
    assert b"127.0.0.1" not in b"".join(data for name, data in texts.items() if name != "json")
    origins = {request.origin for request in hub.requests if request.authorization}
    assert origins == {"hub"}  # the token never reached the storage


def _asr_results(out: Path, file: Path, rate: float = 0.25) -> Path:
    """What `lox-merge asr` writes about this output."""
    import hashlib

    figures = {"n": 4, "judged": 4, "successes": 1, "undecided": 0, "rate": rate, "interval": [0.05, 0.7], "mean_score": None}
    source = {"kind": "folder", "name": out.name, "manifest_sha256": hashlib.sha256((out / "lox_merge.json").read_bytes()).hexdigest()}
    evaluation = {
        "title": out.name, "model": {"kind": "local", "source": source}, "prompts": {"source": "p.csv", "sha256": "ab" * 32, "n": 4},
        "judges": {"keyword": {"kind": "keyword"}}, "attack_success": {"keyword": figures}, "agreement": [],
    }  # fmt: skip
    file.write_text(json.dumps({"command": "asr", "evaluations": [evaluation], "comparisons": []}))
    return file


def test_another_output_replaces_the_earlier_one_whole(
    hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], out: Path, repo: str, tmp_path: Path
) -> None:
    first = publisher.push(out, repo, "--results", _asr_results(out, tmp_path / "asr.json"), "--json", "-")
    assert first.returncode == 0, first.stderr
    assert "lox_merge_asr.svg" in stored(hub, repo)
    hub.repositories[repo].commit(
        "main", {**hub.repositories[repo].files("main"), "mine.md": hub.repositories[repo].files("main")["README.md"]}, "mine"
    )
    other = tmp_path / "other"
    harden(made[0], made[1], other, recipe=Recipe(rank=2, dtype="float32"))
    # One file in float32 where there were three.
    second = publisher.push(other, repo, "--json", "-")
    assert second.returncode == 0, second.stderr
    assert set(stored(hub, repo)) == {*files_under(other), "README.md", "mine.md"}
    assert "lox_merge_asr.svg" in second.json["removed"]
    assert second.json["tag"] == "lox-merge-v0.1.0-2"
    assert hub.repositories[repo].tags == {"lox-merge-v0.1.0": first.json["commit"], "lox-merge-v0.1.0-2": second.json["commit"]}


def test_a_dry_run_lists_files_and_shows_the_card_and_changes_nothing(hub: LoopbackHub, publisher: Publisher, out: Path, repo: str) -> None:
    start = len(hub.requests)
    done = publisher.push(out, repo, "--dry-run", "--public")
    assert done.returncode == 0, done.stderr
    assert repo not in hub.repositories
    assert {request.method for request in since(hub, start)} <= {"GET", "POST"}
    assert [request.path for request in since(hub, start) if request.method == "POST"] == ["/api/validate-yaml"]
    for words in (UP, "lox_merge.json", "README.md", "(public; would be created)", "Nothing was published", "## How to use", "license: apache-2.0"):
        assert words in done.stdout
    plan = publisher.push(out, repo, "--dry-run", "--json", "-").json
    assert {entry["file"]: entry["size"] for entry in plan["files"] if entry["file"] != "README.md"} == {
        name: (out / name).stat().st_size for name in files_under(out)
    }
    assert plan["creates"] and plan["private"] and plan["card"].startswith("---\n")


def test_a_branch_and_a_pull_request(hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], out: Path, tmp_path: Path) -> None:
    hub.put("stranger/model", made[1])
    before = hub.repositories["stranger/model"].branches["main"]
    hub.fail("POST /api/models/stranger/model/discussions", cut_after=-1)  # it was opened, and nobody was told
    first = publisher.push(out, "stranger/model", "--pull-request", "--json", "-")
    assert first.returncode == 0, first.stderr
    assert first.json["branch"] == "refs/pr/1" and first.json["tag"] is None and len(hub.repositories["stranger/model"].pull_requests) == 1
    assert first.json["url"] == f"{hub.endpoint}/stranger/model/discussions/1"
    repository = hub.repositories["stranger/model"]
    assert repository.branches["main"] == before and not repository.tags
    assert stored(hub, "stranger/model", "refs/pr/1")[UP] == (out / UP).read_bytes()
    again = publisher.push(out, "stranger/model", "--pull-request", "--json", "-")
    assert again.json["branch"] == "refs/pr/1" and again.json["sent"] == [] and len(repository.pull_requests) == 1
    resumed = publisher.push(out, "stranger/model", "--revision", "refs/pr/1")
    refused(resumed, "stranger is somebody else", "--pull-request")

    hub.put("owner/aligned", made[1])
    (tmp_path / "extra").mkdir()
    done = publisher.push(out, "owner/aligned", "--revision", "hardened", "--public", "--json", "-")
    assert done.returncode == 0, done.stderr
    branches = hub.repositories["owner/aligned"].branches
    assert branches["hardened"] == done.json["commit"] != branches["main"]
    assert_published(hub, "owner/aligned", out, "hardened")
    assert publisher.push(out, "org/hardened").returncode == 0
    assert_published(hub, "org/hardened", out)


# Who may, and what is there already: all before anything is read


def _nothing_happened(hub: LoopbackHub, start: int) -> None:
    assert {request.method for request in since(hub, start)} <= {"GET"}


TOKEN_REFUSALS: dict[str, tuple[str | None, str, list[str]]] = {
    "no token": (None, "owner/x", ["needs an access token", "hf auth login", "HF_TOKEN"]),
    "read-only token": ("read-token", "owner/x", ["may only read", "write access"]),
    "token not accepted": ("wrong-token", "owner/x", ["does not accept your access token", "hf auth login"]),
    "somebody else": ("owner-token", "stranger/x", ["stranger is somebody else", "owner, org", "--pull-request"]),
    "no name": ("owner-token", "model", ["no repository of the Hub", "NAMESPACE/NAME"]),
    "a revision in the name": ("owner-token", "owner/x@v1", ["--revision"]),
}


@pytest.mark.parametrize("case", TOKEN_REFUSALS)
def test_who_may_not_publish_is_told_before_anything_is_computed(case: str, hub: LoopbackHub, publisher: Publisher, out: Path) -> None:
    token, repo, words = TOKEN_REFUSALS[case]
    (out / UP).unlink()
    (out / UP).symlink_to("/dev/full")  # reading it would end in another error
    shutil.copy(out / "config.json", out / "model.tmp")
    (out / UP).unlink()
    (out / "model.tmp").rename(out / UP)
    start = len(hub.requests)
    refused(publisher.push(out, repo, token=token), *words)
    _nothing_happened(hub, start)
    assert repo not in hub.repositories


def test_the_token_of_hf_auth_login_counts(hub: LoopbackHub, publisher: Publisher, out: Path, repo: str) -> None:
    (publisher.home / "token").write_text("owner-token")
    done = publisher.push(out, repo, "--dry-run", token=None)
    (publisher.home / "token").unlink()
    assert done.returncode == 0, done.stderr


def test_fine_grained_tokens_are_read(hub: LoopbackHub, publisher: Publisher, out: Path) -> None:
    hub.fine_grained["fine-token"] = {"global": [], "scoped": [{"entity": {"name": "org", "type": "org"}, "permissions": ["repo.write"]}]}
    refused(publisher.push(out, "owner/x", token="fine-token"), "fine-grained", "write access to owner or owner/x")
    assert publisher.push(out, "org/fine", "--dry-run", token="fine-token").returncode == 0


def test_visibility_is_checked_and_never_changed(hub: LoopbackHub, publisher: Publisher, out: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    hub.put("owner/closed", empty, private=True)
    hub.put("owner/open", empty)
    refused(publisher.push(out, "owner/closed", "--public"), "exists and is private", "visibility is not changed")
    assert stored(hub, "owner/closed") == {}
    done = publisher.push(out, "owner/open")
    assert done.returncode == 0 and "warning: owner/open exists and is public" in done.stderr
    assert publisher.push(out, "owner/closed").returncode == 0
    assert (hub.repositories["owner/closed"].private, hub.repositories["owner/open"].private) == (True, False)
    assert publisher.push(out, "owner/new-and-open", "--public").returncode == 0
    assert not hub.repositories["owner/new-and-open"].private


def test_a_hub_that_makes_it_public_gets_no_file(hub: LoopbackHub, publisher: Publisher, out: Path, repo: str) -> None:
    hub.fail(f"GET /api/models/{repo}$")  # the look before: there is none
    hub.fail(f"GET /api/models/{repo}$", meanwhile=lambda: setattr(hub.repositories[repo], "private", False))
    refused(publisher.push(out, repo), "was to be private, and the Hub has it as public", "Nothing was uploaded", code=1)
    assert stored(hub, repo) == {}


def test_a_name_that_is_taken_is_not_written_over(hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], out: Path) -> None:
    commit = hub.put("owner/taken", made[1], private=True)
    refused(publisher.push(out, "owner/taken"), "holds another model", "--revision BRANCH")
    assert hub.repositories["owner/taken"].branches == {"main": commit}


def test_revisions_that_cannot_be_written_to_are_refused(hub: LoopbackHub, publisher: Publisher, out: Path) -> None:
    hub.put("owner/with-branches", out, private=True)
    for revision, words in {"0" * 40: "the name of a branch", "a..b": "the name of a branch", "refs/pr/7": "has no refs/pr/7"}.items():
        refused(publisher.push(out, "owner/with-branches", "--revision", revision), words)
    refused(publisher.push(out, "owner/with-branches", "--revision", "x", "--pull-request"), "--pull-request opens a new one")
    refused(publisher.push(out, "owner/not-there", "--pull-request"), "nothing to open a pull request for")
    refused(publisher.push(out, "owner/x", HF_HUB_OFFLINE="1", token=None), "access token")


# What is no finished output


def test_only_finished_outputs_are_published(
    hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], out: Path, tmp_path: Path
) -> None:
    start = len(hub.requests)
    refused(publisher.push(made[1], "owner/x"), "has no lox_merge.json", "no finished output")
    refused(publisher.push(tmp_path / "nothing", "owner/x"), "there is no folder")
    (out / ".lox_merge").mkdir()
    refused(publisher.push(out, "owner/x"), "is unfinished")
    (out / ".lox_merge").rmdir()
    manifest = (out / "lox_merge.json").read_text()
    (out / "lox_merge.json").write_text(manifest[:200])
    refused(publisher.push(out, "owner/x"), "is damaged")
    (out / "lox_merge.json").write_text(manifest)
    assert since(hub, start) == []
    data = bytearray((out / UP).read_bytes())
    data[-1] ^= 1
    (out / UP).write_bytes(data)
    refused(publisher.push(out, "owner/x"), UP, "sha256 differs", code=1)
    (out / UP).unlink()
    refused(publisher.push(out, "owner/x"), "lacks " + UP)
    _nothing_happened(hub, start)


def test_the_weights_are_made_again_where_that_is_asked_for(
    hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    import hashlib

    from safetensors.torch import load_file, save_file

    base, aligned, finished = made
    sources = ["--base", base, "--aligned", aligned, "--recompute"]
    assert publisher.push(finished, "owner/recomputed", *sources, "--sample", "4", "--dry-run").returncode == 0
    out = shutil.copytree(finished, tmp_path / "out")
    tensors = load_file(out / UP)
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    save_file({**tensors, name: tensors[name] * 1.5}, out / UP, metadata={"format": "pt"})
    manifest = json.loads((out / "lox_merge.json").read_text())
    entry = next(entry for entry in manifest["output"]["shards"] if entry["file"] == UP)
    entry.update(sha256=hashlib.sha256((out / UP).read_bytes()).hexdigest(), size=(out / UP).stat().st_size)
    (out / "lox_merge.json").write_text(json.dumps(manifest))
    refused(publisher.push(out, "owner/recomputed", *sources), f"tensor {name}", "is not what the recipe gives", code=1)
    refused(publisher.push(out, "owner/recomputed", "--sample", "3"), "add --recompute")
    assert "owner/recomputed" not in hub.repositories


def test_private_things_in_the_files_stop_it(hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned = made[0], shutil.copytree(made[1], tmp_path / "aligned")
    (aligned / "training_settings.json").write_text(json.dumps({"output": str(aligned), "note": "x"}, indent=1))
    harden(base, aligned, tmp_path / "out")
    refused(publisher.push(tmp_path / "out", "owner/leaky"), "training_settings.json, line 2, names a path of this machine")
    (aligned / "training_settings.json").write_text('{"key": "hf_' + "a" * 34 + '"}')
    harden(base, aligned, tmp_path / "out2")
    refused(publisher.push(tmp_path / "out2", "owner/leaky"), "training_settings.json, line 1, holds an access token")
    ahead = publisher.run("harden", base, aligned, tmp_path / "out3", "--push", "owner/leaky", "--license", "mit")
    refused(ahead, "training_settings.json, line 1, holds an access token")
    assert not (tmp_path / "out3").exists()
    assert "owner/leaky" not in hub.repositories
