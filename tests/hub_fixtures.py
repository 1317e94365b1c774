"""Fixtures around the loopback Hub. A test module takes them with `pytest_plugins = ("hub_fixtures",)`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
from hub_clients import LARGE, LONG_HEADER, TOKENS, LoopbackHub
from safetensors.numpy import save_file


@pytest.fixture
def loopback_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path_factory.mktemp("hub"), TOKENS) as hub:
        yield hub


@pytest.fixture(scope="session")
def hub_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a sharded checkpoint: a shard of 6 MB, one whose header alone is 70 kB, and files beside them."""
    folder = tmp_path_factory.mktemp("model")
    generator = numpy.random.default_rng(0)
    save_file({f"layer.{i}.weight": generator.standard_normal((500, 500)).astype("float32") for i in range(6)}, folder / LARGE)
    save_file({f"model.layers.{i}.a_long_name.of_a_norm.weight": numpy.full(4, i, "float32") for i in range(700)}, folder / LONG_HEADER)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    return folder


@pytest.fixture
def hub_home(tmp_path: Path) -> Path:
    """HF_HOME of the test's clients."""
    return tmp_path / "home"
