"""The merge method `lox` in mergekit and `lox-merge yaml`, on tiny checkpoints of real architectures."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import transformers
import yaml
from finetuned import finetune
from mergekit.merge_methods import merge_state_dicts, registered_methods
from safetensors.torch import load_file, save_file
from tiny_models import ALIGNED_END, CHAT_TEMPLATE, make_pair, read_tensors

import lox_merge.mergekit.plugin as plugin
import lox_merge.mergekit.run as mergekit_run
from lox_merge.cli.yaml import yaml_command
from lox_merge.errors import LoxMergeError, LoxMergeWarning, NumericalError, OutputError, PlanError, RecipeError, RequestError
from lox_merge.jobs.filter_recipe import FilterRecipe
from lox_merge.jobs.harden import harden
from lox_merge.jobs.project import project
from lox_merge.jobs.recipe import Recipe
from lox_merge.maths.edits import lox_edit
from lox_merge.maths.rank import parse_rank

pytest_plugins = ("hub_fixtures",)

CONFIGS = Path(__file__).parent.parent / "merge_configs"
Pair = tuple[Path, Path]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("llama"), "llama", layers=5, base_shards=2)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("qwen3"), "qwen3")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("mixtral"), "mixtral")


def write_config(path: Path, pair: Pair, **settings: Any) -> Path:
    """The smallest configuration for a pair, with changes; a setting of None removes it."""
    config = {"merge_method": "lox", "base_model": str(pair[0]), "models": [{"model": str(pair[1])}], **settings}
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


def command(config: Path, out: Path, *options: str) -> None:
    yaml_command.main([str(config), str(out), "--quiet", *options], standalone_mode=False)


def merge(folder: Path, pair: Pair, *options: str, **settings: Any) -> Tensors:
    command(write_config(folder / "config.yaml", pair, **settings), folder / "out", *options)
    return read_tensors(folder / "out")


def edit(base: torch.Tensor, aligned: torch.Tensor, rank: int | str = 6, alpha: float = 1.25) -> torch.Tensor:
    if aligned.ndim < 2 or alpha == 0 or rank == 0:
        return aligned
    return lox_edit(base, aligned, parse_rank(rank), alpha, seed=0)[0]


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def assert_nothing_left(folder: Path) -> None:
    assert not list(folder.glob("out*"))


# --- the edit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "dtype", "hidden"),
    [
        ("llama", "bfloat16", 160),  # wide enough for block Lanczos instead of the exact SVD
        ("llama", "float32", 32),
        ("qwen3", "bfloat16", 32),
        ("gemma", "bfloat16", 32),
        ("gpt2", "float16", 32),
    ],
)
def test_equals_lox_edit_bit_for_bit(tmp_path: Path, architecture: str, dtype: str, hidden: int) -> None:
    pair = make_pair(tmp_path, architecture, dtype, base_shards=2, aligned_shards=3, hidden=hidden)
    base, aligned = read_tensors(pair[0]), read_tensors(pair[1])
    found = merge(tmp_path, pair)
    assert_same(found, {name: edit(base[name], aligned[name]) for name in aligned})
    assert any(not torch.equal(found[name], aligned[name]) for name in aligned)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_each_expert_is_edited_as_the_matrices_it_is(tmp_path: Path, architecture: str) -> None:
    pair = make_pair(tmp_path, architecture)
    base, aligned = read_tensors(pair[0]), read_tensors(pair[1])
    found = merge(tmp_path, pair)
    names = ("w1", "w3", "w2") if architecture == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    prefix = "block_sparse_moe" if architecture == "mixtral" else "mlp"
    experts = 3 if architecture == "mixtral" else 4
    for layer in range(2):
        for expert in range(experts):
            gate, up, down = (f"model.layers.{layer}.{prefix}.experts.{expert}.{name}.weight" for name in names)
            stacked = f"model.layers.{layer}.mlp.experts"
            parts = torch.cat([edit(base[gate], aligned[gate]), edit(base[up], aligned[up])])
            assert torch.equal(found[f"{stacked}.gate_up_proj"][expert], parts)
            assert torch.equal(found[f"{stacked}.down_proj"][expert], edit(base[down], aligned[down]))
        router = f"model.layers.{layer}.{prefix}.gate.weight"
        assert torch.equal(found[f"model.layers.{layer}.mlp.gate.weight"], edit(base[router], aligned[router]))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.tensor([[1, 6, 7]])).logits).all()


@pytest.mark.parametrize(("rank", "rounding"), [(6, "nearest"), ("energy:0.9", "feedback"), ("noise-floor", "stochastic"), ("full", "nearest")])
def test_equals_harden_bit_for_bit(tmp_path: Path, qwen3: Pair, rank: int | str, rounding: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoxMergeWarning)  # harden may report what rounding lost
        harden(*qwen3, tmp_path / "hardened", recipe=Recipe(rank=rank, rounding=rounding))
    found = merge(tmp_path, qwen3, parameters={"rank": rank, "rounding": rounding})
    assert_same(found, read_tensors(tmp_path / "hardened"))


def test_stacked_experts_equal_harden_where_gate_and_up_alternate(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "gpt_oss")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoxMergeWarning)
        harden(*pair, tmp_path / "hardened")
    assert_same(merge(tmp_path, pair), read_tensors(tmp_path / "hardened"))


def test_output_has_the_dtype_of_aligned_where_base_has_another(tmp_path: Path) -> None:
    (wide, _), (_, narrow) = make_pair(tmp_path / "wide", "llama", "float32"), make_pair(tmp_path / "narrow", "llama", "bfloat16")
    base, aligned = read_tensors(wide), read_tensors(narrow)
    found = merge(tmp_path, (wide, narrow))
    assert_same(found, {name: edit(base[name], aligned[name]) for name in aligned})
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((narrow / "config.json").read_text())
    with pytest.raises(PlanError, match=r"rounding 'feedback' has no effect.*torch.float32"):
        merge(tmp_path, (wide, narrow), "--overwrite", parameters={"rounding": "feedback"})
    with pytest.raises(PlanError, match=r"rank 'noise-floor' is judged by the dtype that aligned is stored in \(torch.bfloat16\)"):
        merge(tmp_path, (wide, narrow), "--overwrite", parameters={"rank": "noise-floor"})


def test_out_dtype_is_written_and_named_in_the_config(tmp_path: Path, llama: Pair) -> None:
    found = merge(tmp_path, llama, out_dtype="float32")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float32"


def test_in_memory_merge() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(24, 16, generator=generator), "norm": torch.randn(16, generator=generator)}
    aligned = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in base.items()}
    found = merge_state_dicts({"base": base, "aligned": aligned}, "lox", base="base", parameters={"rank": 3, "alpha": 2.0})
    assert torch.equal(found["w"], edit(base["w"], aligned["w"], 3, 2.0))
    assert torch.equal(found["norm"], aligned["norm"])
    with pytest.raises(ValueError, match="exactly 1 non-base inputs"):
        merge_state_dicts({"base": base, "aligned": aligned, "other": aligned}, "lox", base="base")
    with pytest.raises(RecipeError, match="removes safety"):
        merge_state_dicts({"base": base, "aligned": aligned}, "lox", base="base", parameters={"alpha": -0.5})


# --- mergekit's parameters -----------------------------------------------------------------------------------------------


def layer_of(name: str) -> int | None:
    match = re.search(r"layers\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def expect(pair: Pair, parameters: Any) -> Tensors:
    """What the aligned model becomes under `parameters(name) -> (rank, alpha)`."""
    base, aligned = read_tensors(pair[0]), read_tensors(pair[1])
    return {name: edit(base[name], aligned[name], *parameters(name)) for name in aligned}


def test_gradients_run_over_the_layers(tmp_path: Path, llama: Pair) -> None:
    found = merge(tmp_path, llama, parameters={"alpha": [0, 1, 0.5], "rank": [0, 8]})
    alphas = [0.0, 0.5, 1.0, 0.75, 0.5]  # of layers 0 to 4
    ranks = [0, 2, 4, 6, 8]

    def parameters(name: str) -> tuple[int, float]:
        layer = layer_of(name)
        return (0, 0.0) if layer is None else (ranks[layer], alphas[layer])  # outside the layers: the first entry

    assert_same(found, expect(llama, parameters))
    edited = {layer_of(name) for name, tensor in read_tensors(llama[1]).items() if not torch.equal(tensor, found[name])}
    assert edited == {1, 2, 3, 4}


def test_a_gradient_over_ranks_is_rounded(tmp_path: Path, llama: Pair) -> None:
    found = merge(tmp_path, llama, parameters={"rank": [1, 4]})  # 1, 1.75, 2.5, 3.25, 4
    ranks = [1, 2, 2, 3, 4]
    assert_same(found, expect(llama, lambda name: (ranks[layer_of(name) or 0], 1.25)))


def test_a_gradient_over_rules_takes_steps(tmp_path: Path, llama: Pair) -> None:
    found = merge(tmp_path, llama, parameters={"rank": ["10%", "full"]})
    assert_same(found, expect(llama, lambda name: ("full" if layer_of(name) == 4 else "10%", 1.25)))


def test_filters_take_the_first_match(tmp_path: Path, llama: Pair) -> None:
    rank = [{"filter": "mlp.down_proj", "value": 3}, {"filter": "mlp", "value": 2}, {"value": 1}]
    alpha = [{"filter": "q_proj", "value": 0}, {"filter": "*", "value": [0, 1]}]
    found = merge(tmp_path, llama, parameters={"rank": rank, "alpha": alpha})

    def parameters(name: str) -> tuple[int, float]:
        layer = layer_of(name)
        alpha = 0.0 if "q_proj" in name or layer is None else layer / 4
        return (3 if "mlp.down_proj" in name else 2 if "mlp" in name else 1), alpha

    assert_same(found, expect(llama, parameters))


def test_parameters_of_the_aligned_entry_count(tmp_path: Path, llama: Pair) -> None:
    models = [{"model": str(llama[0])}, {"model": str(llama[1]), "parameters": {"alpha": 0.5}}]  # naming the base again changes nothing
    found = merge(tmp_path, llama, models=models, parameters={"alpha": 2.0, "rank": 2})
    assert_same(found, expect(llama, lambda name: (2, 0.5)))


def test_slices_with_their_own_parameters(tmp_path: Path, llama: Pair) -> None:
    def part(start: int, stop: int, alpha: float) -> dict[str, Any]:
        sources = [{"model": str(model), "layer_range": [start, stop]} for model in llama]
        return {"sources": sources, "parameters": {"alpha": alpha}}

    found = merge(tmp_path, llama, models=None, slices=[part(0, 2, 0.5), part(2, 5, 1.5)])

    def parameters(name: str) -> tuple[int, float]:
        layer = layer_of(name)
        first = "embed_tokens" in name if layer is None else layer < 2
        return 6, 0.5 if first else 1.5

    assert_same(found, expect(llama, parameters))
    with pytest.raises(PlanError, match="slices must cover all layers in order"):
        merge(tmp_path, llama, "--overwrite", models=None, slices=[part(1, 5, 1.0)])
    with pytest.raises(PlanError, match="leaves out 9 tensor"):
        merge(tmp_path, llama, "--overwrite", models=None, slices=[part(0, 4, 1.0)])


def test_filters_without_a_last_value_are_warned_about(tmp_path: Path, llama: Pair) -> None:
    with pytest.warns(LoxMergeWarning, match="all other tensors get the default"):
        found = merge(tmp_path, llama, parameters={"alpha": [{"filter": "self_attn", "value": 0.5}]})
    assert_same(found, expect(llama, lambda name: (6, 0.5 if "self_attn" in name else 1.25)))


# --- the folder that comes out -----------------------------------------------------------------------------------------------


def test_everything_beside_the_weights_is_aligned_s(tmp_path: Path, llama: Pair) -> None:
    (llama[1] / "custom_code.py").write_text("# code\n")
    try:
        merge(tmp_path, llama, "--out-shard-size", "20k")
    finally:
        (llama[1] / "custom_code.py").unlink()
    out = tmp_path / "out"
    assert len(list(out.glob("model-*.safetensors"))) > 1
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (llama[1] / name).read_bytes(), name
    assert (out / "custom_code.py").read_text() == "# code\n"
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == ALIGNED_END
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.eos_token_id == ALIGNED_END
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.eos_token_id == ALIGNED_END


def test_nothing_of_the_base_model_stays(tmp_path: Path, llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mergekit_run.run_merge

    def with_tagalong(config: Any, out: str, options: Any) -> None:
        real(config, out, options)  # which copies such files for some architectures
        (Path(out) / "preprocessor_config.json").write_text("{}")

    monkeypatch.setattr(mergekit_run, "run_merge", with_tagalong)
    merge(tmp_path, llama)
    assert not (tmp_path / "out/preprocessor_config.json").exists()


def test_edits_lost_to_rounding_are_reported(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", change=0.004, hidden=128)
    with pytest.warns(LoxMergeWarning, match=r"kept only 0\.\d\d of the edit .*rounding: feedback"):
        merge(tmp_path, pair, "--json", str(tmp_path / "nearest.json"), parameters={"alpha": 0.2})
    merge(tmp_path, pair, "--overwrite", "--json", str(tmp_path / "feedback.json"), parameters={"alpha": 0.2, "rounding": "feedback"})
    nearest, feedback = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("nearest", "feedback"))
    assert nearest["realised_gain"] < 0.95 < 0.99 < feedback["realised_gain"]
    # Where mergekit rounds by itself nobody has looked.
    merge(tmp_path, pair, "--overwrite", "--json", str(tmp_path / "cast.json"), dtype="float32", out_dtype="bfloat16", parameters={"alpha": 0.2})
    assert json.loads((tmp_path / "cast.json").read_text())["realised_gain"] is None


def test_json_tells_what_was_done(tmp_path: Path, qwen3: Pair) -> None:
    merge(tmp_path, qwen3, "--json", str(tmp_path / "result.json"), parameters={"alpha": [{"filter": "mlp", "value": 0}, {"value": 2}]})
    text = (tmp_path / "result.json").read_text()
    result = json.loads(text)
    assert str(tmp_path) not in text and str(qwen3[0].parent) not in text
    assert (result["command"], result["method"], result["output"]) == ("yaml", "lox", "out")
    tensors = {entry.pop("name"): entry for entry in result["tensors"]}
    assert tensors.keys() == read_tensors(qwen3[1]).keys()
    assert tensors["model.layers.0.mlp.up_proj.weight"] == {"edited": False, "rank": 6, "alpha": 0, "rounding": "nearest"}
    assert tensors["model.layers.0.self_attn.q_proj.weight"] == {"edited": True, "rank": 6, "alpha": 2, "rounding": "nearest"}
    assert not tensors["model.norm.weight"]["edited"]


def test_no_file_names_a_folder_of_this_machine(tmp_path: Path, llama: Pair) -> None:
    merge(tmp_path, llama)
    for path in (tmp_path / "out").iterdir():
        data = path.read_bytes()
        assert str(llama[0].parent).encode() not in data and str(tmp_path).encode() not in data, path.name
    config = yaml.safe_load((tmp_path / "out/mergekit_config.yml").read_text())
    assert config == {"merge_method": "lox", "base_model": "base", "models": [{"model": "aligned"}]}
    card = (tmp_path / "out/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1]) == {"library_name": "transformers", "tags": ["mergekit", "merge", "lox"]}
    assert "# out\n" in card


def test_mergekit_options_hold(tmp_path: Path, llama: Pair) -> None:
    with pytest.warns(LoxMergeWarning, match="no tokenizer"):
        merge(tmp_path, llama, "--no-write-model-card", "--no-copy-tokenizer")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


def test_pickled_output_is_checked_too(tmp_path: Path, qwen3: Pair) -> None:
    merge(tmp_path, qwen3, "--no-safe-serialization")
    found = torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True)
    assert_same(found, expect(qwen3, lambda name: (6, 1.25)))


def test_tokenizer_source_is_ignored_with_a_warning(tmp_path: Path, llama: Pair) -> None:
    with pytest.warns(LoxMergeWarning, match="tokenizer_source ignored: the output keeps the aligned model's vocabulary"):
        found = merge(tmp_path, llama, tokenizer_source="union")
    assert_same(found, expect(llama, lambda name: (6, 1.25)))


def test_relative_paths_and_an_adapter(tmp_path: Path, llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    base, lora = llama[0], tmp_path / "adapter"
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    model.save_pretrained(lora)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (lora / name).write_bytes((llama[1] / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    settings = {"base_model": os.path.relpath(base), "models": [{"model": f"{os.path.relpath(base)}+adapter"}]}
    with pytest.raises(RequestError, match="--lora-merge-cache FOLDER"):
        merge(tmp_path, llama, **settings)
    found = merge(tmp_path, llama, "--lora-merge-cache", "cache", **settings)
    (merged,) = (tmp_path / "cache").iterdir()
    assert_same(found, {name: edit(read_tensors(base)[name], tensor) for name, tensor in read_tensors(merged).items()})
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHAT_TEMPLATE
    assert yaml.safe_load((tmp_path / "out/mergekit_config.yml").read_text())["models"] == [{"model": "base+adapter"}]


def test_overwrite_replaces_only_what_a_merge_wrote(tmp_path: Path, llama: Pair) -> None:
    out = tmp_path / "out"
    out.mkdir()
    merge(tmp_path, llama)  # an empty folder is no obstacle
    before = (out / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(OutputError, match=r"exists and is not empty.*--overwrite"):
        merge(tmp_path, llama)
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    (out / "left_over.txt").write_text("old")
    merge(tmp_path, llama, "--overwrite", parameters={"alpha": 0.5})
    assert not (out / "left_over.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "out"]
    (out / "mergekit_config.yml").unlink()
    with pytest.raises(OutputError, match=r"no mergekit_config\.yml"):
        merge(tmp_path, llama, "--overwrite")


def test_mergekit_s_own_methods_run_as_they_are(tmp_path: Path, llama: Pair) -> None:
    from mergekit.scripts.run_yaml import main

    models = [{"model": str(llama[1]), "parameters": {"weight": 0.5}}]
    config = write_config(tmp_path / "config.yaml", llama, merge_method="task_arithmetic", models=models)
    command(config, tmp_path / "ours")
    main.main([str(config), str(tmp_path / "theirs"), "--quiet"], standalone_mode=False)
    assert_same(read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs"))
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == sorted(path.name for path in (tmp_path / "theirs").iterdir())


# --- the examples ----------------------------------------------------------------------------------------------------------------


def filled(name: str, pair: Pair, folder: Path) -> Path:
    text = (CONFIGS / name).read_text()
    assert text.count("path-or-org/pretrained-model") == text.count("path-or-org/aligned-model") == 1
    path = folder / name
    path.write_text(text.replace("path-or-org/pretrained-model", str(pair[0])).replace("path-or-org/aligned-model", str(pair[1])))
    return path


def run_example(name: str, pair: Pair, folder: Path) -> tuple[Tensors, Tensors]:
    command(filled(name, pair, folder), folder / "out")
    return read_tensors(folder / "out"), read_tensors(pair[1])


EXAMPLES = {
    "paper_defaults.yaml": lambda name: (6, 1.25),
    "layer_gradient.yaml": lambda name: (
        [2, 4, 6, 6, 6][layer_of(name) or 0],
        1.25 if "lm_head" in name else [0.25, 0.75, 1.25, 1.25, 1.25][layer_of(name) or 0],
    ),
    "attention_only.yaml": lambda name: (6, 1.25 if "self_attn" in name else 0),
    "mlp_only.yaml": lambda name: (8 if "down_proj" in name else 4 if "mlp" in name else 0, 1.25),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(tmp_path: Path, llama: Pair, name: str) -> None:
    found, _ = run_example(name, llama, tmp_path)
    assert_same(found, expect(llama, EXAMPLES[name]))


@pytest.mark.parametrize("fixture", ["llama", "qwen3"])
def test_conservative_example(tmp_path: Path, fixture: str, request: pytest.FixtureRequest) -> None:
    """On untied and tied embeddings alike."""
    found, aligned = run_example("conservative.yaml", request.getfixturevalue(fixture), tmp_path)
    changed = {name for name in aligned if not torch.equal(found[name], aligned[name])}
    assert changed == {name for name, tensor in aligned.items() if tensor.ndim == 2 and layer_of(name) is not None}


def test_moe_example(tmp_path: Path, mixtral: Pair) -> None:
    found, aligned = run_example("moe.yaml", mixtral, tmp_path)
    base = read_tensors(mixtral[0])
    for layer in range(2):
        old = f"model.layers.{layer}.block_sparse_moe"
        assert torch.equal(found[f"model.layers.{layer}.mlp.gate.weight"], aligned[f"{old}.gate.weight"])
        down = f"{old}.experts.1.w2.weight"
        assert torch.equal(found[f"model.layers.{layer}.mlp.experts.down_proj"][1], edit(base[down], aligned[down], 4))
        query = f"model.layers.{layer}.self_attn.q_proj.weight"
        assert torch.equal(found[query], edit(base[query], aligned[query], 6))


def test_every_example_is_tested() -> None:
    assert {path.name for path in CONFIGS.glob("*.y*ml")} == {*EXAMPLES, "conservative.yaml", "moe.yaml", "projection_filter.yaml"}


# --- wrong requests ------------------------------------------------------------------------------------------------------------------

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


# --- failures on the way -----------------------------------------------------------------------------------------------------------


def test_nan_in_a_delta_fails_and_leaves_nothing(tmp_path: Path, llama: Pair) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    aligned = tmp_path / "aligned"
    aligned.mkdir()
    for path in llama[1].iterdir():
        (aligned / path.name).write_bytes(path.read_bytes())
    (file,) = (path for path in aligned.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(file)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=rf"{name}: 1 of them.*filter: its-name") as raised:
        merge(tmp_path, (llama[0], aligned))
    assert raised.value.exit_code == 1
    assert_nothing_left(tmp_path)
    found = merge(tmp_path, (llama[0], aligned), parameters={"alpha": [{"filter": name, "value": 0}, {"value": 1.25}]})
    assert torch.equal(found[name].view(torch.int16), tensors[name].view(torch.int16))


@pytest.mark.parametrize("failure", ["drop", "crash", "disk", "interrupt"])
def test_a_failing_merge_leaves_nothing(tmp_path: Path, llama: Pair, failure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = mergekit_run.run_merge

    def broken(config: Any, out: str, options: Any) -> None:
        real(config, out, options)
        if failure == "crash":
            raise RuntimeError("something {with\nlines} broke")
        if failure == "disk":
            raise OSError(28, "No space left on device")
        if failure == "interrupt":
            raise KeyboardInterrupt
        tensors = load_file(Path(out) / "model.safetensors")
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:4].clone()
        save_file(tensors, Path(out) / "model.safetensors")

    monkeypatch.setattr(mergekit_run, "run_merge", broken)
    message = {
        "drop": r"model.layers.0.mlp.up_proj.weight is missing; model.norm.weight is \[4\] instead of \[32\]",
        "crash": r"mergekit failed: something {…} broke\. Nothing was kept",
        "disk": "could not be written: No space left",
    }
    with pytest.raises((LoxMergeError, click.Abort), match=message.get(failure)) as raised:
        merge(tmp_path, llama)
    assert isinstance(raised.value, click.Abort) if failure == "interrupt" else raised.value.exit_code == 1
    assert_nothing_left(tmp_path)


# --- registration and the command line ------------------------------------------------------------------------------------------------


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


# --- lox_project ------------------------------------------------------------------------------------------------------------------------


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
