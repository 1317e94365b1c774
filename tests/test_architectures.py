"""Layouts that only some architectures have, from a random model to its adapter; all of them: tests/architecture_campaign.py."""

from __future__ import annotations

from pathlib import Path

import architecture_campaign
import pytest

# Parameters called scales and modules with parameters inside such (deepseek_v4), fused experts by other names (granitemoe, jetmoe,
# aria_text), heads in a stack (recurrent_gemma, zamba), buffers among the weights (minimax), vectors with ones around (kimi_linear).
ARCHITECTURES = ("deepseek_v4", "granitemoe", "jetmoe", "aria_text", "recurrent_gemma", "zamba", "minimax", "kimi_linear")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hardened_filtered_and_shipped_as_an_adapter(architecture: str, tmp_path: Path) -> None:
    found = architecture_campaign.run(architecture, tmp_path)
    assert (found.outcome, found.reason) == ("hardened", "")
    assert found.edited > 20 and found.adapter.startswith("changes ")


def test_what_cannot_be_built_is_counted_apart(tmp_path: Path) -> None:
    assert architecture_campaign.run("no_such_architecture", tmp_path).outcome == "not built"
