"""AlignmentWatch where training goes on from a checkpoint, where the base is another model in part, and where it stops at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_watch import R_FT, RATIO, arguments, data, linear, r_ft, train, watch_of
from tiny_models import make_pair, read_tensors
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lox_merge import AlignmentWatch
from lox_merge.cli.decompose import decompose_command
from lox_merge.errors import LoxMergeWarning, RequestError


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("watch"), "llama", "float32")


def rewritten(base: Path, folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> Path:
    """The base with other tensors in the place of each."""
    folder.mkdir()
    tensors = {name: value for before, tensor in read_tensors(base).items() for name, value in change(before, tensor).items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(base / "config.json", folder)
    return folder


def adapted(aligned: Path, **settings: Any) -> Any:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **settings)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(aligned), config)


def resumed(model: Any, folder: Path, watch: Any) -> None:
    settings = TrainingArguments(**arguments(folder))
    Trainer(model=model, args=settings, train_dataset=data(), callbacks=[watch]).train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))


def test_r_align_of_a_resumed_adapter_is_that_of_the_aligned_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = pair
    whole, rest = (watch_of(base, interval=2, overhead=100) for _ in range(2))
    train(adapted(aligned), tmp_path, whole, learning_rate=0.05, save_strategy="steps", save_steps=2)
    resumed(adapted(aligned), tmp_path, rest)
    assert [entry["step"] for entry in rest.history] == [2, 4]
    at_two, again = whole.history[1]["figures"], rest.history[0]["figures"]
    assert again[RATIO] == pytest.approx(at_two[RATIO], rel=1e-6) and again[RATIO] < 0.999


def test_an_adapter_that_begins_at_random_has_moved_from_r_align(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = pair
    watch = watch_of(base, interval=4, overhead=100)
    train(adapted(aligned, init_lora_weights=False), tmp_path, watch)
    start = read_tensors(aligned)
    r_align = r_ft(read_tensors(base), start, start, linear(start))
    for entry in watch.history:
        assert entry["figures"][RATIO] == pytest.approx(entry["figures"][R_FT] / r_align, rel=1e-4)
    assert watch.history[0]["figures"][RATIO] < 0.9


def test_a_resumed_full_fine_tuning_says_that_r_align_is_of_the_checkpoint(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = pair
    train(AutoModelForCausalLM.from_pretrained(aligned), tmp_path, None, max_steps=2, save_strategy="steps", save_steps=2)
    watch = watch_of(base, interval=2, overhead=100)
    with pytest.warns(LoxMergeWarning, match="goes on from step 2: AlignmentWatch measures from there, R_align too, and what was lost before is not"):
        resumed(AutoModelForCausalLM.from_pretrained(aligned), tmp_path, watch)
    assert watch.history[0]["figures"][RATIO] == 1


@pytest.mark.parametrize(("accumulation", "steps"), [(1, 1), (2, 0)])
def test_a_threshold_that_is_crossed_before_the_training_ends_it_after_a_batch(
    accumulation: int, steps: int, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, aligned = pair
    watch = watch_of(base, interval=4, overhead=100, threshold={R_FT: 0.999}, stop=True)
    with pytest.warns(LoxMergeWarning, match="r_ft is .* after step 0, and its threshold 0.999; the training stops after its first batch"):
        trainer, _ = train(AutoModelForCausalLM.from_pretrained(aligned), tmp_path, watch, gradient_accumulation_steps=accumulation)
    assert trainer.state.global_step == steps and [entry["step"] for entry in watch.history] == list(range(steps + 1))


def test_a_threshold_without_stop_ends_no_training(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = pair
    with pytest.warns(LoxMergeWarning, match="after step 0, and its threshold 0.999$"):
        trainer, _ = train(AutoModelForCausalLM.from_pretrained(aligned), tmp_path, watch_of(base, overhead=100, threshold={R_FT: 0.999}))
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("lora", [False, True])
def test_a_base_of_another_vocabulary_is_compared_without_the_output_head(lora: bool, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = pair
    shorter = rewritten(base, tmp_path / "base", lambda name, value: {name: value[:-10] if len(value) == 96 else value})
    watch = watch_of(shorter, interval=4, overhead=100)
    model = adapted(aligned, modules_to_save=["lm_head"]) if lora else AutoModelForCausalLM.from_pretrained(aligned)
    shapes = r"\[96, 32\] in the model and \[86, 32\] in base"
    with pytest.warns(LoxMergeWarning, match=rf"without 1 linear layer\(s\): 1 over another vocabulary, {shapes} \(lm_head.weight\)$"):
        train(model, tmp_path, watch)
    start = read_tensors(aligned)
    names = [name for name in linear(start) if name != "lm_head.weight"]
    assert watch.history[0]["figures"][R_FT] == pytest.approx(r_ft(read_tensors(base), start, start, names), rel=1e-4)
    assert list(watch.setup["r_ft_left_out"]) == ["lm_head.weight"]


def test_a_base_of_other_shapes_is_refused_by_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = pair
    narrow = rewritten(base, tmp_path / "narrow", lambda name, value: {name: value[:, :-2] if "q_proj" in name else value})
    other, other_aligned = make_pair(tmp_path / "other", "llama", "float32", hidden=64)
    factors = tmp_path / "factors.safetensors"
    decompose_command.main([*map(str, (other, other_aligned, factors)), "--rank", "6", "--device", "cpu"], standalone_mode=False)
    q = r"model.layers.0.self_attn.q_proj.weight is \[32, 32\] in the model and"
    for watch, message in (
        (watch_of(narrow), rf"another model: {q} \[32, 30\] in base, model.layers.1.self_attn.q_proj.weight .* Give the base"),
        (watch_of(other), r"lm_head.weight is \[96, 32\] in the model and \[96, 64\] in base, .* and 12 more"),
        (watch_of(None, factors=factors), r"\[96, 64\] in factors"),
        (watch_of(base, factors=factors), r"\[96, 64\] in factors"),
    ):
        with pytest.raises(RequestError, match=message):
            train(AutoModelForCausalLM.from_pretrained(aligned), tmp_path, watch)


def test_linear_layers_that_are_not_compared_are_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = pair
    start = read_tensors(aligned)

    def fewer(name: str, value: Tensor) -> dict[str, Tensor]:
        if "o_proj" in name:  # as it was before alignment, which needs no warning
            return {name: start[name]}
        return {} if "layers.1.mlp" in name else {name: value * float("nan")} if "layers.0.self_attn.q" in name else {name: value}

    watch = watch_of(rewritten(base, tmp_path / "base", fewer), interval=4, overhead=100)
    absent = r"3 without a tensor of the same name in base \(model.layers.1.mlp.\w+.weight, .*\)"
    broken = r"1 with NaN or Inf in the model or in base \(model.layers.0.self_attn.q_proj.weight\)"
    with pytest.warns(LoxMergeWarning, match=rf"^R_ft is without 4 linear layer\(s\): {absent}; {broken}$"):
        train(adapted(aligned), tmp_path, watch)
    left_out = watch.setup["r_ft_left_out"]
    assert len(left_out) == 6 and left_out["model.layers.0.self_attn.o_proj.weight"] == "that alignment left as they were"
    names = [name for name in linear(start) if name not in left_out]
    assert watch.history[0]["figures"][R_FT] == pytest.approx(r_ft(read_tensors(base), start, start, names), rel=1e-4)


def test_what_factors_do_not_hold_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = pair
    factors = tmp_path / "factors.safetensors"
    decompose_command.main([*map(str, (base, aligned, factors)), "--rank", "6", "--exclude", "down_proj", "--device", "cpu"], standalone_mode=False)
    for watch in (watch_of(base, factors=factors, overhead=100), watch_of(None, factors=factors, overhead=100)):
        with pytest.warns(LoxMergeWarning, match=r"2 without a tensor of the same name in factors \(model.layers.0.mlp.down_proj.weight, .*\)$"):
            train(AutoModelForCausalLM.from_pretrained(aligned), tmp_path, watch)


def test_a_base_under_other_names_is_told_from_one_that_does_not_differ(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, aligned = pair
    renamed = rewritten(base, tmp_path / "renamed", lambda name, value: {f"other.{name}": value})
    broken = rewritten(base, tmp_path / "broken", lambda name, value: {name: value * float("nan")})
    for folder, message in (
        (renamed, r"goes by a name of base: the model has model.layers.0.* and base other.model.layers.0.* stored under the model's names"),
        (broken, r"can be compared: without 15 linear layer\(s\): 15 with NaN or Inf"),
    ):
        with pytest.raises(RequestError, match=message):
            train(AutoModelForCausalLM.from_pretrained(aligned), tmp_path, watch_of(folder))


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}])
def test_an_output_head_that_is_the_embedding_is_not_missed(settings: dict[str, Any], tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "pair", "llama", "float32", tie_word_embeddings=True)
    watch = AlignmentWatch(base=base, interval=4, overhead=100)
    train(adapted(aligned, **settings), tmp_path, watch)
    assert watch.setup["r_ft_left_out"] == {}
