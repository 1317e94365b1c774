"""The merge method `lox_project`, beside `lox-merge project`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from finetuned import finetune
from mergekit_runs import (
    CONFIGS,
    Pair,
    assert_nothing_left,
    assert_same,
    command,
)
from tiny_models import make_pair, read_tensors

from lox_merge.errors import RequestError
from lox_merge.jobs.filter_recipe import FilterRecipe
from lox_merge.jobs.project import project


def project_config(path: Path, pair: Pair, finetuned: Path, **settings: Any) -> Path:
    models = [{"model": str(model), "parameters": {"role": role}} for model, role in ((pair[1], "aligned"), (finetuned, "finetuned"))]
    config = {"merge_method": "lox_project", "base_model": str(pair[0]), "models": models, "parameters": {"fraction": 0.2}, **settings}
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings", [{"fraction": 0.2}, {"rank": 3, "mode": "parallel", "basis": "random", "side": "right", "rounding": "stochastic"}]
)
def test_lox_project_equals_the_command_bit_for_bit(tmp_path: Path, architecture: str, settings: dict[str, Any]) -> None:
    pair = make_pair(tmp_path, architecture, base_shards=2)
    finetuned = finetune(pair[1], tmp_path / "finetuned")
    (finetuned / "chat_template.jinja").write_text("{{ 'the fine-tuned one' }}")
    project(*pair, finetuned, tmp_path / "ours", recipe=FilterRecipe(**settings))
    command(project_config(tmp_path / "config.yaml", pair, finetuned, parameters=settings), tmp_path / "out")
    assert_same(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "ours"))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 'the fine-tuned one' }}"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "finetuned, its change from aligned filtered by the subspace" in card and str(tmp_path) not in card


def test_projection_filter_example(tmp_path: Path, llama: Pair) -> None:
    finetuned = finetune(llama[1], tmp_path / "finetuned")
    config = yaml.safe_load((CONFIGS / "projection_filter.yaml").read_text())
    config["base_model"] = str(llama[0])
    for entry, folder in zip(config["models"], (llama[1], finetuned), strict=True):
        entry["model"] = str(folder)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command(tmp_path / "config.yaml", tmp_path / "out")
    project(*llama, finetuned, tmp_path / "ours", recipe=FilterRecipe(fraction=0.25, exclude=("embed_tokens",)))
    assert_same(read_tensors(tmp_path / "out"), read_tensors(tmp_path / "ours"))


def test_lox_project_by_filters(tmp_path: Path, llama: Pair) -> None:
    finetuned = finetune(llama[1], tmp_path / "finetuned")
    fraction = [{"filter": "mlp", "value": 0.2}, {"value": 0}]
    command(project_config(tmp_path / "config.yaml", llama, finetuned, parameters={"fraction": fraction}), tmp_path / "out")
    found, after = read_tensors(tmp_path / "out"), read_tensors(finetuned)
    for name, tensor in after.items():
        assert torch.equal(found[name], tensor) == ("mlp" not in name), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parameters": {"fraction": 1.5}}, "fraction 1.5 is not a number in [0, 1)"),
        ({"parameters": {"fraction": 0}}, "every tensor has fraction 0 and rank 0"),
        ({"parameters": {"fraction": 0.2, "alpha": 1}}, "alpha is no parameter of lox_project"),
        ({"parameters": {"fraction": 0.2, "mode": "sideways"}}, "mode 'sideways' is not known"),
        ({"models": []}, "needs exactly two models beside base_model"),
        ({"models": ["aligned", "finetuned"]}, "which model is which?"),
        ({"models": ["finetuned:aligned", "aligned:finetuned"], "swap": True}, "points back along the alignment delta"),
    ],
)
def test_lox_project_refuses(tmp_path: Path, llama: Pair, change: dict[str, Any], words: str) -> None:
    finetuned = finetune(llama[1], tmp_path / "finetuned")
    folders = {"aligned": llama[1], "finetuned": finetuned}
    if change.pop("swap", False):
        base = read_tensors(llama[0])
        folders = {"finetuned": llama[1], "aligned": finetune(llama[1], tmp_path / "back", lambda name, _: base[name])}
        models = [{"model": str(folders[name]), "parameters": {"role": role}} for name, role in (("finetuned", "aligned"), ("aligned", "finetuned"))]
        change = {"models": models}
    elif "models" in change:
        change = {"models": [{"model": str(folders[name])} for name in change["models"]] or [{"model": str(llama[1])}]}
    with pytest.raises(RequestError, match=re.escape(words)):
        command(project_config(tmp_path / "config.yaml", llama, finetuned, **change), tmp_path / "out")
    assert_nothing_left(tmp_path)
