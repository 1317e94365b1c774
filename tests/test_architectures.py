"""Layouts that only some architectures have, from a random model to its adapter; all of them: tests/architecture_campaign.py."""

from __future__ import annotations

import json
import math
from pathlib import Path

import architecture_campaign
import pytest
import torch
from conftest import RunCli
from small_architectures import Architecture, architectures, small_model

from lox_merge.checkpoint.modules import _kind, empty_model

# Parameters called scales, and modules with parameters inside such (deepseek_v4), fused experts by other names (granitemoe, aria_text),
# stacks of other matrices (zamba), buffers among the weights (minimax).
# experts one below the other (dbrx).
# Zamba's small configuration does not run in transformers itself.
ARCHITECTURES = {
    "deepseek_v4": "answers, in batches of one length",
    "granitemoe": "answers",
    "aria_text": "answers",
    "zamba": "RuntimeError",
    "minimax": "answers",
    "dbrx": "answers",
}


@pytest.mark.parametrize(("name", "asked"), ARCHITECTURES.items())
def test_hardened_filtered_and_shipped_as_an_adapter(name: str, asked: str, tmp_path: Path) -> None:
    found = architecture_campaign.run(Architecture(name), tmp_path)
    assert (found.outcome, found.reason) == ("hardened", "")
    assert found.edited >= 20 and found.adapter.startswith("changes ")
    assert found.asked.partition(":")[0] == asked


def test_each_class_of_transformers_is_tried_once() -> None:
    everything = architectures()
    assert len(everything) > 250 and len(set(everything)) == len(everything)
    kinds = {name: [one.kind for one in everything if one.name == name] for name in ("llama", "gemma3", "llava", "t5", "whisper")}
    assert kinds == {
        "llama": ["causal"],
        "gemma3": ["causal"],  # the same class is in the list of multimodal ones
        "llava": ["multimodal"],
        "t5": ["encoder-decoder"],
        "whisper": ["causal", "speech"],  # two classes
    }


def test_what_cannot_be_built_is_counted_apart(tmp_path: Path) -> None:
    assert architecture_campaign.run(Architecture("no_such_architecture"), tmp_path).outcome == "not built"


def test_numbers_that_json_has_not_are_read_from_a_configuration(tmp_path: Path) -> None:
    small_model(Architecture("bamba")).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["time_step_limit"][1] == {"__float__": "Infinity"}
    assert empty_model(config | {"architectures": ["BambaForCausalLM"]}).config.time_step_limit[1] == math.inf


def test_a_kernel_of_groups_of_channels_has_no_factors() -> None:
    assert [_kind(torch.nn.Conv2d(4, 4, 3, groups=groups), "weight")[0] for groups in (1, 4)] == ["convolution", "parameter"]


def test_what_an_adapter_leaves_out_is_told_once_for_each_reason(run_cli: RunCli, tmp_path: Path) -> None:
    base, aligned = architecture_campaign.make_pair(Architecture("deepseek_v4"), tmp_path)
    for option in (["--dry-run"], []):
        done = run_cli("harden", base, aligned, tmp_path / "out", "--rank", 2, "--as-adapter", *option)
        assert done.returncode == 0, done.stderr
        text = " ".join(done.stdout.split())
        assert text.count("PEFT merges nothing inside a module") == 1 and ".ape and 2 more: PEFT merges nothing" in text
