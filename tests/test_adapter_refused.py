"""Adapters that cannot be written: what is said, by whoever asked for one and by whoever did not, and that nothing loads of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter
from conftest import RunCli
from quantised_models import pair_in_forms
from safetensors.torch import load_file
from tiny_models import make_pair

from lox_merge.errors import NumericalError
from lox_merge.jobs import adapter
from lox_merge.jobs.adapter import execute_adapter
from lox_merge.jobs.adapter_plan import plan_adapter
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.recipe import Recipe

WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "lox_merge.json"
Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), "llama")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return pair_in_forms(tmp_path_factory.mktemp("quantised"), ("fp8",))


@pytest.mark.parametrize(("dtype", "alpha", "other"), [("float16", 1e7, "another --dtype"), ("float32", 1e200, "")])
def test_an_update_that_overflows_is_not_written(pair: Pair, tmp_path: Path, dtype: str, alpha: float, other: str) -> None:
    made = plan_adapter(plan_hardening(*pair, tmp_path / "out", recipe=Recipe(alpha=alpha, dtype=dtype)))
    with pytest.raises(NumericalError, match=rf"module \S+: its update overflows {dtype}.*smaller --alpha.*{other}"):
        execute_adapter(made)
    assert not [name for name in (WEIGHTS, CONFIG, MANIFEST) if (tmp_path / "out" / name).exists()]


def test_the_command_line_says_it_too(pair: Pair, run_cli: RunCli, tmp_path: Path) -> None:
    done = run_cli("harden", *pair, tmp_path / "out", "--as-adapter", "--dtype", "float16", "--alpha", "1e7")
    assert done.returncode == 1 and "overflows float16" in done.stderr and "Traceback" not in done.stderr
    again = run_cli("harden", *pair, tmp_path / "out", "--as-adapter", "--dtype", "bfloat16", "--overwrite")
    assert again.returncode == 0, again.stderr
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "out" / WEIGHTS).values())


def test_a_folder_whose_manifest_cannot_be_made_does_not_load(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = adapter._manifest
    monkeypatch.setattr(adapter, "_manifest", lambda *given: whole(*given) | {"figure": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        execute_adapter(plan_adapter(plan_hardening(*pair, tmp_path / "out")))
    assert (tmp_path / "out" / WEIGHTS).exists() and not (tmp_path / "out" / CONFIG).exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--workers", "2"], "It is one file, which one worker writes: no --workers. Leave out --workers, or pass"),
        (["--rank", "full"], "rank full is no low-rank update: an adapter of it would be larger than the model. Give a rank, or pass"),
        (["--rounding", "feedback"], "--rounding feedback is about weights that are written anew; an adapter keeps the edit beside them. Leave it"),
    ],
)
def test_who_asked_for_no_form_is_told_the_others(quantised: dict[str, Path], run_cli: RunCli, tmp_path: Path, options: list[str], says: str) -> None:
    given: list[Any] = ["harden", quantised["base-fp8"], quantised["aligned-fp8"], tmp_path / "out", *options]
    done = run_cli(*given)
    assert done.returncode == 2 and "--as-adapter" not in done.stderr
    for text in ("aligned (aligned-fp8) is quantised (fp8, 16×16 blocks)", says, "--dtype bfloat16 for a plain model", "--requantise"):
        assert text in done.stderr
    asked = run_cli(*given, "--as-adapter")
    assert asked.returncode == 2 and "--requantise" not in asked.stderr


def test_an_adapter_over_quantised_weights_has_one_way(quantised: dict[str, Path], run_cli: RunCli, tmp_path: Path) -> None:
    trained = make_adapter(quantised["base"], tmp_path / "trained", target_modules=["q_proj"])
    given = ["harden", quantised["base-fp8"], trained, tmp_path / "out", "--base-is-right"]
    done = run_cli(*given)
    assert done.returncode == 2 and "--as-adapter" not in done.stderr and "--requantise" not in done.stderr
    assert "is itself an adapter, over quantised weights" in done.stderr and "Pass --dtype bfloat16, which writes a plain model" in done.stderr
    assert run_cli(*given, "--dtype", "bfloat16").returncode == 0


def test_a_model_without_configuration_is_not_called_another_architecture(pair: Pair, run_cli: RunCli, tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama")
    (aligned / "config.json").unlink()
    done = run_cli("harden", base, aligned, tmp_path / "out", "--as-adapter")
    assert done.returncode == 2 and "aligned has no config.json" in done.stderr and "architecture" not in done.stderr
