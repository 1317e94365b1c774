"""AlignmentWatch where training goes on from a checkpoint, where the base is another model in part, and where it stops at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from test_watch import R_FT, RATIO, arguments, data, linear, r_ft, train, watch_of
from tiny_models import make_pair, read_tensors
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lox_merge.errors import LoxMergeWarning


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("watch"), "llama", "float32")


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
