"""Where `push` may write: never over another model, on whatever branch; to branches, not to tags, commits and what is no repository."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hub_clients import LoopbackHub
from publishers import Publisher
from push_fixtures import assert_published, refused, since, stored

from lox_merge import Recipe, harden


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model in the forms of others."""
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("pytorch_model.bin", "model.gguf"):
        (folder / name).write_bytes(b"w" * 2000)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("branch", ["main", "stable"])
def test_another_model_on_a_branch_that_is_named_is_not_written_over(
    branch: str, hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], out: Path, other: Path, tmp_path: Path
) -> None:
    repo = f"owner/taken-on-{branch}"
    hub.put(repo, made[1], private=True)
    hub.put(repo, other, revision=branch, private=True)
    before, start = dict(hub.repositories[repo].branches), len(hub.requests)
    where = repo if branch == "main" else f"{repo}, branch {branch},"
    words = (f"{where} holds another model (model.gguf …)", "not made by lox-merge", "a new --revision BRANCH")
    refused(publisher.push(out, repo, "--revision", branch), *words)
    refused(publisher.push(out, repo, "--revision", branch, "--dry-run"), *words)
    refused(publisher.push(out, repo, LOX_MERGE_PUSH_REVISION=branch), *words)
    hardening = ("harden", made[0], made[1], tmp_path / "new", "--push", repo, "--license", "mit")
    refused(publisher.run(*hardening, "--revision", branch), *words)
    refused(publisher.run(*hardening, LOX_MERGE_HARDEN_REVISION=branch), *words)
    assert not (tmp_path / "new").exists()
    assert hub.repositories[repo].branches == before and {request.method for request in since(hub, start)} == {"GET"}


def test_a_new_branch_is_gone_on_with_and_an_own_one_replaced(
    hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], out: Path, other: Path, repo: str, tmp_path: Path
) -> None:
    hub.put(repo, other, private=True)
    main = hub.repositories[repo].branches["main"]
    hub.fail(f"POST /api/models/{repo}/commit/", status=403)
    assert publisher.push(out, repo, "--revision", "hardened").returncode == 2
    assert hub.repositories[repo].branches == {"main": main, "hardened": main}, "it was made, and is as main is"
    done = publisher.push(out, repo, "--revision", "hardened")
    assert done.returncode == 0, done.stderr
    assert_published(hub, repo, out, "hardened")
    harden(made[0], made[1], tmp_path / "second", recipe=Recipe(rank=1))
    again = publisher.push(tmp_path / "second", repo, "--revision", "hardened")
    assert again.returncode == 0, again.stderr
    assert_published(hub, repo, tmp_path / "second", "hardened")
    assert hub.repositories[repo].branches["main"] == main
    assert publisher.push(out, repo, "--revision", "20260131").returncode == 0, "digits are no commit by themselves"
    assert_published(hub, repo, out, "20260131")


def test_main_may_be_named_where_it_is_free(hub: LoopbackHub, publisher: Publisher, out: Path, repo: str) -> None:
    for _ in range(2):
        done = publisher.push(out, repo, "--revision", "main")
        assert done.returncode == 0, done.stderr
    assert_published(hub, repo, out)


def test_only_branches_are_written_to(hub: LoopbackHub, publisher: Publisher, out: Path, repo: str) -> None:
    hub.put(repo, out, private=True)
    hub.tag(repo, "v1")
    before = stored(hub, repo)
    commit = hub.repositories[repo].branches["main"]
    start = len(hub.requests)
    for revision in ("v1", commit[:8]):
        refused(publisher.push(out, repo, "--revision", revision), f"{revision!r} is a tag or a commit of {repo}", "the name of a branch")
    for revision in ("HEAD", "refs/heads/main", "refs/convert/parquet", "refs/pr/x", "refs/pr/1/2"):
        refused(publisher.push(out, repo, "--revision", revision), "give the name of a branch")
        refused(publisher.push(out, "owner/not-there-yet", "--revision", revision), "give the name of a branch")
    refused(publisher.push(out, "owner/not-there-yet", "--revision", "refs/pr/1"), "owner/not-there-yet was not found on the Hub")
    assert "owner/not-there-yet" not in hub.repositories and {request.method for request in since(hub, start)} == {"GET"}
    assert stored(hub, repo) == before and list(hub.repositories[repo].branches) == ["main"]


def test_a_card_is_written_for_what_could_be_pushed_to(publisher: Publisher, out: Path) -> None:
    for name in ("not a repo/../x", "me/x@v1", "model", "https://huggingface.co/me/x"):
        refused(publisher.run("card", out, "--license", "mit", "--repo", name), "no repository of the Hub", "NAMESPACE/NAME")
    assert not (out / "README.md").exists()
    shutil.rmtree(out)  # the name is looked at first
    refused(publisher.run("card", out, "--repo", "me/x@v1"), "no repository of the Hub")
