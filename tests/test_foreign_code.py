"""Code that a checkpoint brings does not run: pickles hold tensors or are refused, and `auto_map` counts for nothing unless asked for."""

from __future__ import annotations

import ast
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCli
from fuzz.materials import Materials
from safetensors.torch import load_file

import lox_merge
from lox_merge import harden
from lox_merge.errors import PlanError, RequestError, SourceError
from lox_merge.safety.judges.classifier import classifier_judge
from lox_merge.safety.loading import load_model

PACKAGE = Path(lox_merge.__file__).parent


class Payload:
    """Makes a folder when it is unpickled by a loader that lets it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.filterwarnings("ignore::lox_merge.errors.LoxMergeWarning")
def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(materials: Materials, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"x": torch.zeros(1), "y": Payload(marker)}, tmp_path / "bad.bin")
    with pytest.raises(FileExistsError):  # the payload works where it is let
        marker.mkdir()
        torch.load(tmp_path / "bad.bin", weights_only=False)
    marker.rmdir()

    aligned = shutil.copytree(materials.single, tmp_path / "aligned")
    (aligned / "model.safetensors").unlink()
    shutil.copy(tmp_path / "bad.bin", aligned / "pytorch_model.bin")
    adapter = shutil.copytree(materials.adapter, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    shutil.copy(tmp_path / "bad.bin", adapter / "adapter_model.bin")
    for source in (aligned, adapter):
        with pytest.raises(PlanError, match="weights_only=True"):
            harden(materials.base, source, tmp_path / "out", base_is_right=True)
    with pytest.raises((PlanError, SourceError)):
        load_model(aligned, device="cpu")
    assert not marker.exists() and not (tmp_path / "out").exists()

    torch.save(load_file(materials.single / "model.safetensors"), aligned / "pytorch_model.bin")
    harden(materials.base, aligned, tmp_path / "out")


def test_the_package_unpickles_in_one_way_only() -> None:
    calls = []
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                # A worker looks whether an exception of its own would arrive whole at the process that started it.
                allowed = {"pickle"} if file.parts[-2:] == ("executors", "worker.py") else set()
                assert not {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"} & set(names) - allowed, file
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load"):
                calls.append((file.name, ast.unparse(node)))
    assert [name for name, _ in calls] == ["weights.py"] and "weights_only=True" in calls[0][1]


@pytest.fixture
def with_code(materials: Materials, tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint whose configuration and tokenizer are classes of its own, and the folder that these make when they are imported."""
    folder, marker = shutil.copytree(materials.aligned, tmp_path / "with_code"), tmp_path / "ran"
    code = (
        f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    (folder / "own.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | own))
    return folder, marker


def test_code_of_a_checkpoint_runs_for_replies_only_and_only_when_asked_for(
    materials: Materials, with_code: tuple[Path, Path], run_cli: RunCli, tmp_path: Path
) -> None:
    folder, marker = with_code
    (tmp_path / "prompts.txt").write_text("how do\n")
    asked = ("--prompts", tmp_path / "prompts.txt", "--judge", "keyword", "--max-new-tokens", "2", "--device", "cpu")
    home = {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    assert run_cli("harden", materials.base, folder, tmp_path / "out").returncode == 0
    assert (tmp_path / "out" / "own.py").read_bytes() == (folder / "own.py").read_bytes()
    assert run_cli("inspect", materials.base, folder, "--rank", "2").returncode == 0
    assert run_cli("verify", tmp_path / "out", "--base", materials.base, "--aligned", folder).returncode == 0
    refused = run_cli("asr", folder, *asked)
    assert refused.returncode == 2 and "trust" in refused.stderr and "Traceback" not in refused.stderr
    refused = run_cli("search", materials.base, folder, *asked, "--ranks", "0,1", "--no-chat-template")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert not marker.exists()
    allowed = run_cli("asr", folder, *asked, "--trust-remote-code", **home)
    assert allowed.returncode == 0, allowed.stderr
    assert marker.exists()


def test_code_of_a_judge_or_of_the_base_of_an_adapter_never_runs(materials: Materials, with_code: tuple[Path, Path], tmp_path: Path) -> None:
    folder, marker = with_code
    with pytest.raises((RequestError, SourceError)):
        classifier_judge(str(folder), "unsafe/safe", device="cpu")
    harden(folder, materials.adapter, tmp_path / "out", base_is_right=True, order_is_right=True)
    assert not marker.exists()
