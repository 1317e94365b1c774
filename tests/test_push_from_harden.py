"""`harden --push`: published at the end of the job, and every refusal before its beginning."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from hub_clients import LoopbackHub, run_client
from publishers import Publisher
from push_fixtures import assert_published, refused, stored
from transformers import AutoModelForCausalLM

from lox_merge import Recipe, harden


def test_harden_publishes_at_the_end(hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned = made[0], shutil.copytree(made[1], tmp_path / "aligned")
    (aligned / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    for role, folder in (("base", base), ("aligned", aligned)):
        hub.put(f"stranger/{role}", folder)
    done = publisher.run("harden", "stranger/base", "stranger/aligned", tmp_path / "out", "--push", "owner/hardened", "--json", "-")
    assert done.returncode == 0, done.stderr
    assert_published(hub, "owner/hardened", tmp_path / "out")
    assert done.json["push"]["commit"] == hub.repositories["owner/hardened"].branches["main"]
    card = stored(hub, "owner/hardened")["README.md"].decode()
    for words in ("license: mit\n", "language: en\n", "base_model:\n- stranger/aligned\n- stranger/base\n", "base_model_relation: merge\n"):
        assert words in card
    commit = hub.repositories["stranger/aligned"].branches["main"]
    assert f"stranger/aligned@{commit}" in card
    again = publisher.run("harden", "stranger/base", "stranger/aligned", tmp_path / "out", "--push", "owner/hardened")
    assert again.returncode == 0 and "Nothing to upload" in again.stdout
    checked = publisher.run("verify", "owner/hardened")
    assert checked.returncode == 0 and "equal" in checked.stdout, checked.stderr
    # Beside aligned itself, whose main branch stays what it is; and as a pull request to somebody else.
    before = stored(hub, "stranger/aligned")
    hub.put("owner/own", aligned)
    order = ("harden", "stranger/base", "owner/own", tmp_path / "beside")
    branch = publisher.run(*order, "--push", "owner/own", "--revision", "hardened", "--public")
    assert branch.returncode == 0, branch.stderr
    assert_published(hub, "owner/own", tmp_path / "beside", "hardened")
    assert stored(hub, "owner/own") == before
    request = publisher.run(*order, "--push", "stranger/aligned", "--pull-request", "--json", "-")
    assert request.returncode == 0 and request.json["push"]["branch"] == "refs/pr/1", request.stderr
    assert_published(hub, "stranger/aligned", tmp_path / "beside", "refs/pr/1")
    assert stored(hub, "stranger/aligned") == before


def test_an_adapter_is_published_and_loads_on_aligned(hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    aligned = shutil.copytree(made[1], tmp_path / "aligned")
    (aligned / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n")
    for name in ("USE_POLICY.md", "Notice", "licensing.py"):
        (aligned / name).write_text(f"{name}\n")
    for role, folder in (("base", made[0]), ("aligned", aligned)):
        hub.put(f"adapted/{role}", folder)
    arguments = ("harden", "adapted/base", "adapted/aligned", tmp_path / "out", "--rank", 3, "--as-adapter", "--push", "owner/adapter")
    done = publisher.run(*arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    assert_published(hub, "owner/adapter", tmp_path / "out")
    card = stored(hub, "owner/adapter")["README.md"].decode()
    for words in ("library_name: peft\n", "base_model:\n- adapted/aligned\n", "base_model_relation: adapter\n", "PeftModel.from_pretrained"):
        assert words in card
    # The terms that the card links to come along.
    there = stored(hub, "owner/adapter")
    assert there["LICENSE"] == b"Terms.\n" and "license_link: LICENSE\n" in card
    assert sorted(there) == sorted(
        ["LICENSE", "USE_POLICY.md", "Notice", "README.md", "adapter_config.json", "adapter_model.safetensors", "lox_merge.json"]
    )
    checked = publisher.run("verify", "owner/adapter")
    assert checked.returncode == 0, checked.stderr
    body = f"from huggingface_hub import snapshot_download; result = snapshot_download('owner/adapter', revision={done.json['push']['commit']!r})"
    folder = run_client(hub.environment(tmp_path / "reader", token="read-token"), body)
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made[1], dtype=torch.float32), folder)
    merged = adapted.merge_and_unload().state_dict()
    harden(made[0], made[1], tmp_path / "whole", recipe=Recipe(rank=3, dtype="float32"), device="cpu")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.allclose(value, whole[name], atol=1e-5) for name, value in merged.items())
    (aligned / "LICENSE").write_text("Terms of hf_" + "a" * 34)
    arguments = ("harden", made[0], aligned, tmp_path / "second", "--as-adapter", "--push", "owner/adapter")
    refused(publisher.run(*arguments), "LICENSE, line 1, holds an access token")


HARDEN_REFUSALS: dict[str, tuple[str | None, list[str], str]] = {
    "no token": (None, ["--license", "mit"], "needs an access token"),
    "read-only token": ("read-token", ["--license", "mit"], "may only read"),
    "unknown licence": ("owner-token", [], "licence of the output is unknown"),
    "a licence that the Hub does not know": ("owner-token", ["--license", "my-own"], '"license" must be one of'),
    "a name that is taken": ("owner-token", ["--license", "mit", "--push", "owner/base"], "holds another model"),
    "a branch that cannot be": ("owner-token", ["--license", "mit", "--revision", "a..b"], "the name of a branch"),
    "a pull request to nobody": ("owner-token", ["--license", "mit", "--pull-request"], "nothing to open a pull request for"),
}


@pytest.mark.parametrize("case", HARDEN_REFUSALS)
def test_harden_finds_out_first_that_it_may_not_publish(
    case: str, hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    hub.put("owner/base", made[0], private=True)
    token, extra, words = HARDEN_REFUSALS[case]
    refused(publisher.run("harden", made[0], made[1], tmp_path / "out", "--push", "owner/x", *extra, token=token), words)
    assert not (tmp_path / "out").exists()


def test_a_gated_source_is_refused_before_anything_is_computed(
    hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    hub.put("stranger/gated", made[1], gated=True)
    done = publisher.run("harden", made[0], "stranger/gated", tmp_path / "out", "--push", "owner/x", "--license", "mit")
    assert done.returncode == 2 and done.stderr.startswith("error: aligned: stranger/gated is gated") and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    commit = hub.repositories["stranger/gated"].branches["main"]
    out = shutil.copytree(made[2], tmp_path / "made")
    manifest = json.loads((out / "lox_merge.json").read_text())
    manifest["sources"]["aligned"] |= {"kind": "hub", "name": "stranger/gated", "commit": commit, "revision": None}
    (out / "lox_merge.json").write_text(json.dumps(manifest))
    unread = publisher.run("push", out, "owner/of-gated")
    assert unread.returncode == 2 and "Traceback" not in unread.stderr
    assert "the card of a source cannot be read" in unread.stderr and "is gated" in unread.stderr and "--license" in unread.stderr
    stated = publisher.push(out, "owner/of-gated")
    assert stated.returncode == 0 and "warning: the card of aligned was not read" in stated.stderr
    missing = publisher.run("harden", made[0], "stranger/gated@v9", tmp_path / "out", "--push", "owner/x", "--license", "mit")
    refused(missing, "not this revision")


def test_publishing_options_need_a_place(publisher: Publisher, made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    for options in (["--public"], ["--revision", "x"], ["--pull-request"]):
        refused(publisher.run("harden", made[0], made[1], tmp_path / "out", *options), "--push REPO")
    assert os.listdir(tmp_path) == []  # noqa: PTH208
