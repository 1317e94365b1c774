"""Symbolic data of fine-tuning attacks on toy pairs."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def attack_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Symbolic data of both attacks, prompts and a judge."""
    from attack_runs import write_files

    folder = tmp_path_factory.mktemp("robustness")
    write_files(folder)
    return folder
