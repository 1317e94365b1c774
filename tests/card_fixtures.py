"""One hardened model for all tests of its card."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def card_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """base, aligned, and the finished output 'hardened'."""
    from card_documents import RECIPE
    from tiny_models import make_pair

    from lox_merge import harden

    folder = tmp_path_factory.mktemp("card")
    base, aligned = make_pair(folder, "llama", aligned_shards=2)
    harden(base, aligned, folder / "hardened", recipe=RECIPE)
    return base, aligned, folder / "hardened"


@pytest.fixture
def card_out(card_pair: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    """A copy of the output to write into."""
    return shutil.copytree(card_pair[2], tmp_path / "hardened")
