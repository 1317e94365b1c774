"""A small part of the fault campaign (tests/fault_campaign.py): kills and faults in real runs leave nothing that only looks finished."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import run_program
from tiny_models import make_pair

from lox_merge.errors import RequestError, SourceChangedError
from lox_merge.jobs.hashing import SourceHasher
from lox_merge.safety.reply_store import ReplyStore
from lox_merge.safety.types import Prompt, PromptSet, Reply

CAMPAIGN = Path(__file__).with_name("fault_campaign.py")


def test_kills_and_a_failing_disk(tmp_path: Path) -> None:
    options = ["--moments", "4", "--job", "decompose", "--fault", "(EIO): decompose", "--json", str(tmp_path / "out.json")]
    program = f"import runpy, sys\nsys.path.insert(0, {str(CAMPAIGN.parent)!r})\nrunpy.run_path({str(CAMPAIGN)!r}, run_name='__main__')"
    done = run_program(program, *options, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    (kills,) = report["kills"]
    assert len(kills["moments"]) >= 4 and kills["outputs"] >= 1 and report["failures"] == []
    assert [fault["problem"] for fault in report["faults"]] == [None]


def test_one_process_at_a_time_writes_a_store_of_replies(tmp_path: Path) -> None:
    asked = PromptSet((Prompt("0", "how"),), "0" * 64, "prompts")
    file = tmp_path / "replies.jsonl"
    store = ReplyStore(file, {}, asked)
    code = (
        "import sys\nfrom pathlib import Path\nfrom lox_merge.safety.reply_store import ReplyStore\nfrom lox_merge.safety.types import *\n"
        "ReplyStore(Path(sys.argv[1]), {}, PromptSet((Prompt('0', 'how'),), '0' * 64, 'prompts'))\n"
    )
    other = run_program(code, file)
    assert other.returncode == 1 and "another process is writing replies.jsonl" in other.stderr
    with pytest.raises(RequestError, match="another process is writing"):
        ReplyStore(file, {}, asked)
    store.keep([("0", Reply("how", "no", True, 1))])
    del store
    assert ReplyStore(file, {}, asked).finished["0"].text == "no"


def test_memory_that_runs_out_is_said(tmp_path: Path) -> None:
    """torch has no class of its own for it; the limit is the address space that the imports have taken, and a little more."""
    base, aligned = make_pair(tmp_path / "pair", "llama", hidden=256, layers=4, vocabulary=2_000)
    code = f"""
import resource
from pathlib import Path
import torch, lox_merge.jobs.harden, lox_merge.cli.harden, lox_merge.cli.show
torch.set_num_threads(1)
limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 3 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
from lox_merge.cli.main import main
main(["harden", {str(base)!r}, {str(aligned)!r}, {str(tmp_path / "out")!r}])
"""
    done = run_program(code)
    assert done.returncode == 1, done.stderr
    assert "error: " in done.stderr and "memory" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("change", ["contents", "file", "time"])
def test_a_source_that_changes_before_it_is_hashed_is_noticed(tmp_path: Path, change: str) -> None:
    """Tensors are read ahead of the hashing: without this the output would carry the hash of contents that it was not made from."""
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(b"0123")
    hasher = SourceHasher([[("base", file.name)] for file in files], lambda source: tmp_path / source[1])
    hasher.start_shard(0)
    status, last = files[2].stat(), files[2]
    if change == "file":
        last.rename(tmp_path / "old")
    if change != "time":
        last.write_bytes(b"4567")
        os.utime(last, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        os.utime(last)
    assert hasher.hashes(0) and hasher.hashes(1)
    with pytest.raises(SourceChangedError, match="changed while it was being read"):
        hasher.hashes(2)
    hasher.close()
