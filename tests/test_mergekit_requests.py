"""Merge configurations that are refused, and the command around them."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.merge_methods import registered_methods
from mergekit_runs import (
    Pair,
    assert_nothing_left,
    assert_same,
    command,
    expect,
    merge,
    write_config,
)
from tiny_models import CHAT_TEMPLATE, make_pair, read_tensors

import lox_merge.mergekit.plugin as plugin
from lox_merge.errors import LoxMergeError, OutputError, PlanError, RequestError

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no base model": ({"base_model": None}, "base_model is missing: name the pre-trained model"),
    "two aligned models": ({"models": [{"model": "ALIGNED"}, {"model": "some/other"}]}, r"exactly one model beside base_model.*it has 2"),
    "no aligned model": ({"models": [{"model": "BASE"}]}, "exactly one model beside base_model, the aligned one; it has 0"),
    "negative alpha": ({"parameters": {"alpha": -1.25}}, r"alpha is -1.25: a negative factor .* removes safety; not supported"),
    "negative in a gradient": ({"parameters": {"alpha": [1, -0.1, 1]}}, r"alpha is -0.1: .*removes safety"),
    "negative in a filter": (
        {"parameters": {"alpha": [{"filter": "never_reached", "value": [0, -2]}, {"value": 1}]}},
        r"parameters.alpha \(filter 'never_reached'\): alpha is -2",
    ),
    "NaN": ({"parameters": {"alpha": float("nan")}}, "alpha is nan; use a finite number"),
    "infinite": ({"parameters": {"alpha": float("inf")}}, "alpha is inf; use a finite number"),
    "alpha is text": ({"parameters": {"alpha": "much"}}, "alpha 'much' is not a number"),
    "alpha is true": ({"parameters": {"alpha": True}}, "alpha True is not a number"),
    "negative rank": ({"parameters": {"rank": -1}}, "rank is -1; use a whole number"),
    "rank with a fraction": ({"parameters": {"rank": 6.5}}, "rank 6.5 is not a whole number"),
    "unknown rank rule": ({"parameters": {"rank": "most"}}, "rank 'most' is not understood"),
    "unknown rounding": ({"parameters": {"rounding": "up"}}, "rounding 'up' is not known"),
    "unknown parameter": ({"parameters": {"aplha": 1.0}}, "parameters.aplha is no parameter of lox; it has rank, alpha, rounding"),
    "unknown key": ({"parameter": {"alpha": 1.0}}, "parameter is not a setting"),
    "unknown key of a model": ({"models": [{"model": "ALIGNED", "parameter": {"alpha": 1}}]}, r"models\[0\]\.parameter is not a setting"),
    "parameters of the base": (
        {"models": [{"model": "BASE", "parameters": {"alpha": 1}}, {"model": "ALIGNED"}]},
        "have no effect, it is the base_model",
    ),
    "an empty list": ({"parameters": {"alpha": [{"value": []}]}}, "parameters.alpha is an empty list"),
    "feedback at full rank": (
        {"parameters": {"rank": [{"filter": "lm_head", "value": "full"}, {"value": 6}], "rounding": "feedback"}},
        "^lm_head.weight: rounding 'feedback' needs a limited rank; with rank 'full' use `rounding: stochastic`",
    ),
    "nothing to do": ({"parameters": {"alpha": 0}}, "every tensor has alpha 0 or rank 0"),
    "a filter that matches nothing": (
        {"parameters": {"alpha": [{"filter": "self_atn", "value": 1}, {"value": 0}]}},
        "the filter 'self_atn' is part of no tensor name; a name looks like 'model.layers",
    ),
    "unknown method": ({"merge_method": "lux"}, "merge_method 'lux' is not known; use 'lox', 'lox_project' or one of mergekit's: .*task_arithmetic"),
    "no models": ({"models": None}, "Exactly one of 'models', 'slices', or 'modules' must be present"),
    "no method": ({"merge_method": None}, "merge_method: Field required"),
    "a missing folder": ({"models": [{"model": "./not-there"}]}, "aligned: .*not-there"),
    "one model twice": ({"models": [{"model": "BASE/../base"}]}, "base and aligned are the same checkpoint"),
    "unknown dtype": ({"dtype": "int4"}, "dtype 'int4' is not supported"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_request(tmp_path: Path, llama: Pair, case: str) -> None:
    settings, message = WRONG[case]
    config = write_config(tmp_path / "config.yaml", llama, **settings)
    config.write_text(config.read_text().replace("ALIGNED", str(llama[1])).replace("BASE", str(llama[0])))
    with pytest.raises(RequestError, match=re.compile(message, re.DOTALL)) as raised:
        command(config, tmp_path / "out")
    assert raised.value.exit_code == 2
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("a: [", "is not YAML"), ("- lox\n", "holds no settings"), ("", "holds no settings")])
def test_what_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RequestError, match=message):
        command(tmp_path / "config.yaml", tmp_path / "out")
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        command(tmp_path / "absent.yaml", tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_swapped_models_are_noticed(tmp_path: Path, llama: Pair) -> None:
    with pytest.raises(PlanError, match="they look swapped"):
        merge(tmp_path, (llama[1], llama[0]))
    assert_nothing_left(tmp_path)
    merge(tmp_path, (llama[1], llama[0]), "--order-is-right")


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("llama", {"attention_bias": True}, r"leaves out 8 tensor\(s\) of aligned.*model.layers.0.self_attn.k_proj.bias.*lox-merge harden"),
        ("llama", {"aligned_vocabulary": 104}, r"the vocabularies differ .*embed_tokens.weight: base \[96, 32\], aligned \[104, 32\]"),
        ("llava", {}, r"leaves out 21 tensor\(s\).*language_model"),
        ("qwen2_vl", {}, "mergekit cannot plan this merge|leaves out"),
    ],
)
def test_what_mergekit_would_drop_or_fail_on_is_refused(tmp_path: Path, architecture: str, settings: dict[str, Any], message: str) -> None:
    pair = make_pair(tmp_path, architecture, **settings)
    with pytest.raises(RequestError, match=message) as raised:
        merge(tmp_path, pair)
    assert "\n" not in str(raised.value)
    assert_nothing_left(tmp_path)


def test_output_inside_a_source_or_around_it(tmp_path: Path, llama: Pair) -> None:
    config = write_config(tmp_path / "config.yaml", llama)
    with pytest.raises(PlanError, match="lies inside aligned"):
        command(config, llama[1] / "out")
    with pytest.raises(OutputError, match="exists and is not empty"):
        command(config, llama[1])
    assert not (llama[1] / "out").exists()


def test_registration_is_idempotent(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register_methods()
    importlib.reload(plugin)
    assert [method.spec.name for method in registered_methods()].count("lox") == 1
    strange = type("Strange", (), {"spec": type("Spec", (), {"name": "lox", "reference_url": None, "parameters": ()})})()
    monkeypatch.setattr(plugin, "registered_methods", lambda: (strange,))
    with pytest.raises(LoxMergeError, match="another merge method named 'lox'"):
        plugin.register_methods()


def test_importing_the_command_loads_neither_torch_nor_mergekit() -> None:
    code = "import sys, lox_merge.cli.yaml; print([name for name in ('torch', 'mergekit', 'transformers') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_help_shows_mergekit_s_options_and_ours(run_cli: Any) -> None:
    shown = run_cli("yaml", "--mergekit-help")
    assert shown.returncode == 0
    for option in ("--cuda", "--out-shard-size", "--lora-merge-cache", "--trust-remote-code", "--overwrite", "CONFIG_FILE OUT_PATH"):
        assert option in shown.stdout
    quick = run_cli("yaml", "config.yaml", "--cuda", "--help")
    assert quick.returncode == 0 and "--cuda" not in quick.stdout
    for option in ("--mergekit-help", "--overwrite", "CONFIG_FILE OUT_PATH"):
        assert option in quick.stdout


def test_command_line_merges(tmp_path: Path, qwen3: Pair, run_cli: Any) -> None:
    config = write_config(tmp_path / "config.yaml", qwen3)
    done = run_cli("yaml", config, "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hardened aligned: 15 of 24 tensors edited, written to out\n"
    assert_same(read_tensors(tmp_path / "out"), expect(qwen3, lambda name: (6, 1.25)))


def test_command_line_refuses(tmp_path: Path, qwen3: Pair, run_cli: Any) -> None:
    config = write_config(tmp_path / "config.yaml", qwen3, parameters={"alpha": -1})
    refused = run_cli("yaml", config, "out", cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: parameters.alpha: alpha is -1: a negative factor")
    assert refused.stderr.count("\n") == 1 and not refused.stdout
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--out-shard-size", "5GB"], r"Invalid value for '--out-shard-size': '5GB' cannot be read"),
        (["--device", "foo"], "device foo is not there"),
        *([] if torch.cuda.is_available() else [(["--cuda"], "device cuda is not there")]),
        (["--num-threads", "0"], "mergekit cannot use its options"),
    ],
)
def test_options_of_mergekit_that_are_of_no_use(tmp_path: Path, llama: Pair, run_cli: Any, options: list[str], says: str) -> None:
    config = write_config(tmp_path / "config.yaml", llama)
    refused = run_cli("yaml", config, tmp_path / "out", *options)
    assert refused.returncode == 2 and says in refused.stderr and "Traceback" not in refused.stderr
    assert_nothing_left(tmp_path)


def test_devices_are_looked_at_for_mergekit_s_own_methods_too(tmp_path: Path, llama: Pair, run_cli: Any) -> None:
    config = write_config(tmp_path / "config.yaml", llama, merge_method="task_arithmetic")
    refused = run_cli("yaml", config, tmp_path / "out", "--device", "foo")
    assert refused.returncode == 2 and "device foo is not there" in refused.stderr


def test_models_on_the_hub(tmp_path: Path, qwen3: Pair, loopback_hub: Any, hub_home: Path, run_cli: Any) -> None:
    """mergekit itself fetches neither chat templates nor code."""
    loopback_hub.put("owner/base", qwen3[0])
    loopback_hub.put("owner/aligned", qwen3[1])
    config = write_config(tmp_path / "config.yaml", qwen3, base_model="owner/base", models=[{"model": "owner/aligned@main"}])
    done = run_cli("yaml", config, "out", cwd=tmp_path, **loopback_hub.environment(hub_home))
    assert done.returncode == 0, done.stderr
    assert_same(read_tensors(tmp_path / "out"), expect(qwen3, lambda name: (6, 1.25)))
    assert (tmp_path / "out/chat_template.jinja").read_text() == CHAT_TEMPLATE
    card = (tmp_path / "out/README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == ["owner/base", "owner/aligned"] and metadata["base_model_relation"] == "merge"
