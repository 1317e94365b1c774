"""A small part of the fuzz campaign (tests/fuzz_campaign.py): hostile files end in an answer or in an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz.cases import run_cases
from fuzz.materials import Materials
from fuzz.targets import TARGETS

CASES = 32


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_files_end_well(materials: Materials, name: str) -> None:
    target = TARGETS[name](materials)
    count = CASES // target.dear
    outcome = run_cases(target, count, number=1)
    assert not outcome.findings, "\n".join(f"{finding.signature}\n{finding.details}\n{finding.example}" for finding in outcome.findings.values())
    assert outcome.count == outcome.ended["refused"] + outcome.ended["accepted"] == count


def test_a_campaign_sees_what_is_wrong(tmp_path: Path) -> None:
    """Errors without a message for users, hangs, and files outside the folder are findings."""
    from fuzz import guard
    from fuzz.cases import Target
    from hypothesis import strategies as st

    from lox_merge.errors import RequestError

    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "secret")

    def feed(case: str) -> None:
        if case == "traceback":
            raise KeyError("x")
        if case == "silent":
            raise RequestError("")
        if case == "link":
            (tmp_path / "inside" / "link").read_text()
        if case == "hang":
            raise guard.Hang

    target = Target("itself", st.sampled_from(("traceback", "silent", "link", "hang", "well")), feed, tmp_path / "inside", "well")
    found = sorted(run_cases(target, 60).findings)
    assert [signature.split(" at ")[0] for signature in found] == ["KeyError", "RequestError without a message", "hang", "opened link outside"]
