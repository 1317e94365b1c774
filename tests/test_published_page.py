"""docs/published.md: every command runs as it stands, in this order, from two checkpoints on a loopback Hub to a published model."""

from __future__ import annotations

import json
import random
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_clients import LoopbackHub, names_a_server
from huggingface_hub import ModelCard
from publishers import Done, Publisher

from lox_merge.lab.checkpoints import ToyPair
from lox_merge.lab.language import SEEN_FORBIDDEN_NOUNS

DOCS = Path(__file__).parents[1] / "docs"
sys.path.insert(0, str(DOCS))

from check_commands import commands  # noqa: E402

PAGE = (DOCS / "published.md").read_text(encoding="utf-8")
COMMANDS = commands(PAGE)
# Replies of a toy model are a few words; the protocol's sixty would be most of the test's time.
SETTINGS = {"LOX_MERGE_ASR_MAX_NEW_TOKENS": "8", "LOX_MERGE_SEARCH_MAX_NEW_TOKENS": "8"}

# What takes seconds to import and half of the commands need.
READY = ("transformers.models.llama", "transformers.generation", "peft", "matplotlib.figure")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, toy_pair_seed0: ToyPair) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path_factory.mktemp("hub"), {"owner-token": ("me", "write")}) as hub:
        aligned = shutil.copytree(toy_pair_seed0.aligned, tmp_path_factory.mktemp("aligned") / "aligned")
        (aligned / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Toy\n")
        hub.put("org/base", toy_pair_seed0.base)
        hub.put("org/aligned", aligned)
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the session of the page takes place: the prompts and the page's own judge."""
    folder = tmp_path_factory.mktemp("session")
    generator = random.Random(5)
    requests = {f"v{generator.randrange(16)} a{generator.randrange(16)} n{generator.choice(SEEN_FORBIDDEN_NOUNS)}" for _ in range(24)}
    (folder / "prompts.csv").write_text("\n".join(["goal", *sorted(requests)]) + "\n")
    judge = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert judge is not None
    (folder / "judge.py").write_text(judge[1])
    return folder


@pytest.fixture(scope="module")
def session(hub: LoopbackHub, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """What each command of the page did, by its text."""
    done = {}
    with Publisher(hub, tmp_path_factory.mktemp("home"), READY) as publisher:
        for command in COMMANDS:
            words = shlex.split(command)
            assert words[0] == "lox-merge", command
            done[command] = publisher.run(*words[1:], cwd=folder, **SETTINGS)
            assert done[command].returncode == 0, (command, done[command].stderr)
    return done


def said(session: dict[str, Done], start: str) -> str:
    """What the last command that begins so printed."""
    return [done.stdout for command, done in session.items() if command.startswith(start)][-1]


def test_the_page_goes_the_whole_way(session: dict[str, Done], hub: LoopbackHub, folder: Path) -> None:
    asked = [shlex.split(command)[1] for command in COMMANDS]
    assert list(dict.fromkeys(asked)) == ["decompose", "search", "harden", "verify", "asr", "card", "push"]
    assert "effective rank" in said(session, "lox-merge search")
    assert "tensors made again from the sources: equal." in said(session, "lox-merge verify OUT")
    assert "Nothing was published" in said(session, "lox-merge push OUT me/model-lox --results asr.json --dry-run")
    assert "tensors made again from the sources: equal." in said(session, "lox-merge verify me/model-lox --sample")
    assert "made again from the sources: equal." in said(session, "lox-merge verify me/model-lox-adapter")
    assert not any("Traceback" in done.stderr or names_a_server(done.stderr) for done in session.values())
    manifest = json.loads((folder / "OUT" / "lox_merge.json").read_text())
    assert [manifest["sources"][role]["name"] for role in ("base", "aligned")] == ["org/base", "org/aligned"]
    assert manifest["sources"]["aligned"]["commit"] == hub.repositories["org/aligned"].branches["main"]


def test_what_the_page_publishes(session: dict[str, Done], hub: LoopbackHub, folder: Path) -> None:
    assert set(hub.repositories) == {"org/base", "org/aligned", "me/model-lox", "me/model-lox-adapter"}
    for name, out in (("me/model-lox", "OUT"), ("me/model-lox-adapter", "ADAPTER")):
        repository = hub.repositories[name]
        assert not repository.private and len(repository.tags) == 1
        there = {file: hub.blobs.path(stored.sha256).read_bytes() for file, stored in repository.files("main").items() if file != ".gitattributes"}
        assert {path.name: path.read_bytes() for path in (folder / out).iterdir() if path.is_file()}.items() <= there.items()
        metadata = ModelCard(there["README.md"].decode()).data.to_dict()
        assert metadata["license"] == "apache-2.0" and metadata["base_model"]
    card = hub.blobs.path(hub.repositories["me/model-lox"].files("main")["README.md"].sha256).read_text()
    measured = [entry["attack_success"]["python:judge.py:complied"] for entry in json.loads((folder / "asr.json").read_text())["evaluations"]]
    assert [figures["judged"] for figures in measured] == [24, 24] and all(figures["rate"] <= 0.1 for figures in measured)
    assert f"| python:judge.py:complied | prompts.csv | {measured[1]['rate']:.1%}".replace("%", " %") in card and "24 of 24" in card
    assert "lox_merge_asr.svg" in hub.repositories["me/model-lox"].files("main") and str(folder) not in card
