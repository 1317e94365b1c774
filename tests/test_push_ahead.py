"""What `harden --push` asks for before hours of work: a card that the Hub takes, files that may go out, a licence that can be said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from hub_clients import LoopbackHub
from publishers import Publisher
from push_fixtures import refused, since, stored


def test_harden_refuses_a_card_of_somebody_else_first(
    hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], out: Path, repo: str
) -> None:
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    start = len(hub.requests)
    order = ("harden", made[0], made[1], out, "--rank", 4, "--push", repo)
    refused(publisher.run(*order, "--license", "mit"), "out/README.md was not written by lox-merge", "Move it away")
    (out / "README.md").unlink()
    assert publisher.run("card", out, "--repo", repo, "--license", "mit").returncode == 0
    readme = out / "README.md"
    readme.write_text(readme.read_text().replace("## Limits", "## What is not known"))
    refused(publisher.run(*order, "--license", "mit"), "was edited by hand", "--license would replace it")
    readme.write_text(readme.read_text().replace("license: mit", "license: [mit"))
    refused(publisher.run(*order), "its metadata are no YAML", "begins in line 3")
    assert {request.method for request in since(hub, start)} == {"GET"}
    readme.write_text(readme.read_text().replace("license: [mit", "license: mit"))
    done = publisher.run(*order)
    assert done.returncode == 0, done.stderr
    assert stored(hub, repo)["README.md"] == readme.read_bytes()


@pytest.mark.parametrize(
    "line, sent",
    [
        ("language: {a: b}", {"pipeline_tag": "text-generation"}),
        ("language: [en, no]", {"language": ["en", "no"], "pipeline_tag": "text-generation"}),
        ("pipeline_tag: [a]", {"pipeline_tag": "text-generation"}),
        ("pipeline_tag: text2text-generation", {"pipeline_tag": "text2text-generation"}),
    ],
)
def test_metadata_of_aligned_that_the_hub_does_not_take_are_not_sent(
    line: str, sent: dict[str, object], hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    aligned = shutil.copytree(made[1], tmp_path / "aligned")
    (aligned / "README.md").write_text(f"---\nlicense: mit\n{line}\n---\n")
    done = publisher.run("harden", made[0], aligned, tmp_path / "out", "--push", "owner/odd")
    assert done.returncode == 0, done.stderr
    metadata = yaml.safe_load(stored(hub, "owner/odd").pop("README.md").decode().split("---")[1])
    assert {key: value for key, value in metadata.items() if key in ("language", "pipeline_tag")} == sent
    del hub.repositories["owner/odd"]


def test_files_of_an_aligned_model_on_the_hub_are_looked_through_first(
    hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    aligned = shutil.copytree(made[1], tmp_path / "aligned")
    (aligned / "settings.txt").write_text("one\nkey: hf_" + "a" * 34)
    hub.put("stranger/leaky", aligned)
    done = publisher.run("harden", made[0], "stranger/leaky", tmp_path / "out", "--push", "owner/x", "--license", "mit")
    refused(done, "settings.txt, line 2, holds an access token")
    assert not (tmp_path / "out").exists()


def test_harden_takes_a_licence_of_ones_own(hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], repo: str, tmp_path: Path) -> None:
    order = ("harden", made[0], made[1], tmp_path / "out")
    licence = ("--license", "other", "--license-name", "own", "--license-link", "https://example.org/own")
    refused(publisher.run(*order, "--push", repo, *licence[:2]), "--license other says nothing by itself")
    for some in (licence, licence[2:4], licence[4:]):
        refused(publisher.run(*order, *some), "about publishing", "--push REPO")
    assert not (tmp_path / "out").exists()
    done = publisher.run(*order, "--push", repo, *licence)
    assert done.returncode == 0, done.stderr
    card = stored(hub, repo)["README.md"].decode()
    assert "license: other\nlicense_name: own\nlicense_link: https://example.org/own\n" in card
