"""A pair and a model that was fine-tuned from it, which tests of the projection filter share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

Three = tuple[Path, Path, Path]


def make_three(folder: Path, architecture: str = "llama", dtype: str = "bfloat16", **settings: Any) -> Three:
    from finetuned import finetune
    from tiny_models import make_pair

    base, aligned = make_pair(folder, architecture, dtype, base_shards=2, **settings)
    return base, aligned, finetune(aligned, folder / "finetuned")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Three:
    return make_three(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Three:
    return make_three(tmp_path_factory.mktemp("floats"), dtype="float32")


def copies(three: Three, folder: Path) -> Three:
    base, aligned, finetuned = (shutil.copytree(model, folder / model.name) for model in three)
    return base, aligned, finetuned
