"""Small sound files that tests of hostile input spoil copies of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fuzz.materials import Materials


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Materials:
    from fuzz.materials import make_materials

    return make_materials(tmp_path_factory.mktemp("materials"))
