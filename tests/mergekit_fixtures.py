"""Pairs that tests of merges share."""

from __future__ import annotations

from pathlib import Path

import pytest


def _pair(tmp_path_factory: pytest.TempPathFactory, architecture: str, **settings: int) -> tuple[Path, Path]:
    from tiny_models import make_pair

    return make_pair(tmp_path_factory.mktemp(architecture), architecture, **settings)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return _pair(tmp_path_factory, "llama", layers=5, base_shards=2)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return _pair(tmp_path_factory, "qwen3")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return _pair(tmp_path_factory, "mixtral")
