"""AlignmentWatch in real trainers: its figures against float64 from saved weights, and a training that it does not change."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoHaConfig, LoraConfig, get_peft_model
from tiny_models import make_pair, read_tensors, tokenizer
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from lox_merge import AlignmentWatch
from lox_merge.cli.decompose import decompose_command
from lox_merge.diagnostics.watch.changes import check_whole
from lox_merge.diagnostics.watch.pace import Pace
from lox_merge.diagnostics.watch.retained import Retained, RetainedAlignment
from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.maths.weight_changes import DenseChange

ROOT = Path(__file__).parents[1]
IGNORED = -100
PROJECTION, OVERLAP = "alignment/projection", "alignment/overlap_score"
R_FT, RATIO = "alignment/r_ft", "alignment/r_ft_over_r_align"
# Safe completions: tokens of a prompt, which are not labelled, and of a reply.
COMPLETIONS = [
    {"input_ids": [3, 6, 7, 8, 5, 4, 13, 8, 14, 5], "labels": [IGNORED] * 6 + [13, 8, 14, 5]},
    {"input_ids": [3, 9, 10, 5, 4, 11, 13, 5], "labels": [IGNORED] * 5 + [11, 13, 5]},
    {"input_ids": [3, 7, 9, 12, 5, 4, 13, 9, 14, 10, 5], "labels": [IGNORED] * 6 + [13, 9, 14, 10, 5]},
]
DIMENSION, RANK = 2, 3


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Path]]:
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def pair(architecture: str = "llama", dtype: str = "float32") -> tuple[Path, Path]:
        if (architecture, dtype) not in made:
            made[architecture, dtype] = make_pair(tmp_path_factory.mktemp("watch"), architecture, dtype)
        return made[architecture, dtype]

    return pair


def data(rows: int = 32) -> Dataset:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 15, (rows, 9), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "lr_scheduler_type": "constant", "optim": "adamw_torch"}
    quiet = {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "seed": 3}
    return {"output_dir": str(folder / "out"), **settings, **quiet, **options}


class Keep(TrainerCallback):
    """Weights after every step, in memory."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.seen: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.weights.append({name: value.detach().clone() for name, value in model.named_parameters()})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.seen.append(dict(logs))


def train(model: Any, folder: Path, watch: AlignmentWatch | None, **options: Any) -> tuple[Any, Keep]:
    keep = Keep()
    # The report of the figures reaches callbacks that come later; `first_in` is for those that come before.
    trainer = Trainer(model=model, args=TrainingArguments(**arguments(folder, **options)), train_dataset=data(), callbacks=[keep])
    if watch is not None:
        watch.first_in(trainer)
    trainer.train()
    return trainer, keep


def gradients(folder: Path, names: list[str]) -> list[dict[str, Tensor]]:
    """g_i of the summed log-likelihood at θ_0, by float64 autograd over the whole model, a completion at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = []
    for row in COMPLETIONS:
        model.zero_grad()
        scores = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        sum(scores[i - 1, token] for i, token in enumerate(row["labels"]) if token != IGNORED).backward()
        found.append({name: model.get_parameter(name).grad.clone() for name in names})
    return found


def sensitive(found: list[dict[str, Tensor]], delta: dict[str, Tensor]) -> tuple[float, float]:
    """‖P Δ‖ with P from an explicit SVD of the stacked gradients, and OS."""
    rows = torch.stack([torch.cat([g[name].reshape(-1) for name in delta]) for g in found])
    change = torch.cat([value.double().reshape(-1) for value in delta.values()])
    directions = torch.linalg.svd(rows, full_matrices=False).Vh[:DIMENSION]
    return float((directions @ change).norm()), float((rows @ change).square().mean())


def r_ft(base: dict[str, Tensor], start: dict[str, Tensor], now: dict[str, Tensor], names: list[str], *, transposed: bool = False) -> float:
    ratios = []
    for name in names:
        align, whole = start[name].double() - base[name].double(), now[name].double() - base[name].double()
        if transposed:
            align, whole = align.T, whole.T
        left = torch.linalg.svd(align).U[:, :RANK]
        ratios.append(float((left.T @ whole).norm() / whole.norm()))
    return sum(ratios) / len(ratios)


def linear(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, value in tensors.items() if value.ndim == 2 and "embed" not in name]


def watch_of(base: Path | None, **options: Any) -> AlignmentWatch:
    return AlignmentWatch(completions=COMPLETIONS, base=base, dimension=DIMENSION, rank=RANK, **options)


def test_a_trainer_reports_what_saved_weights_give(pairs: Any, tmp_path: Path) -> None:
    base, aligned = pairs()
    watch = watch_of(base, interval=2, overhead=100)
    # Steps without a measurement are logged too, without its figures.
    trainer, keep = train(AutoModelForCausalLM.from_pretrained(aligned), tmp_path, watch, logging_strategy="steps", logging_steps=1)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 2, 3, 4]
    start = read_tensors(aligned)
    safe = gradients(aligned, list(start))
    logged = {entry["step"]: entry for entry in trainer.state.log_history if PROJECTION in entry}
    assert sorted(logged) == [2, 4] and [entry["step"] for entry in watch.history] == [0, 2, 4]
    r_align = r_ft(read_tensors(base), start, start, linear(start))
    for step, entry in logged.items():
        now = keep.weights[step - 1]
        delta = {name: now[name].double() - start[name].double() for name in start}
        projection, overlap = sensitive(safe, delta)
        length = sum(float(value.square().sum()) for value in delta.values())
        entries = sum(value.numel() for value in delta.values())
        expected = {
            PROJECTION: projection,
            f"{PROJECTION}_random": (length * DIMENSION / entries) ** 0.5,
            OVERLAP: overlap,
            f"{OVERLAP}_random": length * sum(float(value.square().sum()) for g in safe for value in g.values()) / len(safe) / entries,
            R_FT: r_ft(read_tensors(base), start, now, linear(start)),
        }
        expected[RATIO] = expected[R_FT] / r_align
        for name, value in expected.items():
            assert entry[name] == pytest.approx(value, rel=2e-4), (step, name)
        assert entry["loss"] > 0
    assert watch.history[0]["figures"][PROJECTION] == 0 and watch.history[0]["figures"][RATIO] == 1
    assert [seen[PROJECTION] for seen in keep.seen if PROJECTION in seen] == [logged[2][PROJECTION], logged[4][PROJECTION]]
    record = json.loads(json.dumps(watch.to_json(), allow_nan=False))
    assert record["history"] == watch.history and record["setup"]["dimension"] == DIMENSION and not record["setup"]["left_out"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_lora_in_sft_trainer_is_read_from_its_factors(architecture: str, pairs: Any, tmp_path: Path) -> None:
    base, aligned = pairs(architecture)
    targets = ["c_attn", "c_proj"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(aligned), LoraConfig(r=2, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    )
    watch, keep = watch_of(base, interval=4, overhead=100), Keep()
    config = SFTConfig(**arguments(tmp_path), packing=False, max_length=32, gradient_checkpointing=True)
    SFTTrainer(model=model, args=config, train_dataset=data(), processing_class=padded(), callbacks=[keep, watch]).train()
    start = read_tensors(aligned)
    factors = keep.weights[-1]
    delta: dict[str, Tensor] = {}
    for name, right in factors.items():
        if "lora_A" in name:
            stored = name.removeprefix("base_model.model.").replace("lora_A.default.", "")
            product = 3.0 * factors[name.replace("lora_A", "lora_B")].double() @ right.double()
            delta[stored] = product.T if architecture == "gpt2" else product
    assert len(delta) == (6 if architecture == "gpt2" else 4) and all(bool(value.any()) for value in delta.values())
    projection, overlap = sensitive(gradients(aligned, list(delta)), delta)
    entry = next(entry for entry in watch.history if entry["step"] == 4)["figures"]
    assert entry[PROJECTION] == pytest.approx(projection, rel=2e-4) and entry[OVERLAP] == pytest.approx(overlap, rel=2e-4)
    names = [name for name in linear(start) if "wte" not in name and "wpe" not in name]
    now = {name: value.double() + delta.get(name, 0) for name, value in start.items()}
    assert entry[R_FT] == pytest.approx(r_ft(read_tensors(base), start, now, names, transposed=architecture == "gpt2"), rel=2e-4)


def padded() -> Any:
    words = tokenizer()
    words.pad_token = "<unk>"
    return words


@pytest.fixture(scope="module")
def factors_of(pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    folder = tmp_path_factory.mktemp("factors")

    def factors(rank: int) -> Path:
        file = folder / f"{rank}.safetensors"
        if not file.exists():
            decompose_command.main([*map(str, pairs()), str(file), "--rank", str(rank), "--device", "cpu"], standalone_mode=False)
        return file

    return factors


def test_factors_alone_give_r_ft_within_bounds(pairs: Any, factors_of: Any, tmp_path: Path) -> None:
    base, aligned = pairs()
    exact = AlignmentWatch(base=base, factors=factors_of(8), rank=RANK, interval=4, overhead=100)
    few = AlignmentWatch(factors=factors_of(8), rank=RANK, interval=4, overhead=100)
    whole = AlignmentWatch(factors=factors_of(32), rank=RANK, interval=4, overhead=100)
    model = AutoModelForCausalLM.from_pretrained(aligned)
    trainer = Trainer(model=model, args=TrainingArguments(**arguments(tmp_path)), train_dataset=data(), callbacks=[exact, Second(few), Third(whole)])
    trainer.train()
    now = {name: value.detach() for name, value in model.named_parameters()}
    start = read_tensors(aligned)
    expected = r_ft(read_tensors(base), start, now, linear(start))
    assert exact.history[-1]["figures"][R_FT] == pytest.approx(expected, rel=2e-4) and "r_ft_bounds" not in exact.history[-1]
    assert whole.history[-1]["figures"][R_FT] == pytest.approx(expected, rel=2e-3)
    low, high = few.history[-1]["r_ft_bounds"]
    assert low <= expected <= high and low < few.history[-1]["figures"][R_FT] < high
    assert PROJECTION not in few.history[-1]["figures"]


def test_factors_alone_know_how_a_change_lies_to_the_alignment(pairs: Any, factors_of: Any) -> None:
    """Half of Δ_align taken back leaves R as it is; its inner product with Δ_align decides that."""
    base, aligned = pairs()
    model = AutoModelForCausalLM.from_pretrained(aligned)
    start, before = dict(model.named_parameters()), read_tensors(base)
    held = RetainedAlignment(model, start.__getitem__, base=None, factors=factors_of(32), rank=RANK, seed=0, cache_dir=None)

    def back(share: float) -> Retained:
        return held.ratio(lambda name: DenseChange(share * (before[name].float() - start[name].detach())))

    untouched = held.ratio(lambda name: None)
    assert untouched.mean == pytest.approx(r_ft(before, start, start, linear(before)), rel=1e-4)
    assert back(0.5).mean == pytest.approx(untouched.mean, rel=1e-4) and back(0.5).energy == pytest.approx(untouched.energy, rel=1e-4)
    assert back(-1.0).mean == pytest.approx(untouched.mean, rel=1e-4)


class Second(TrainerCallback):
    """A watch under another class: a trainer takes one callback of each."""

    def __init__(self, watch: AlignmentWatch) -> None:
        for event in ("on_train_begin", "on_step_end", "on_train_end"):
            setattr(self, event, getattr(watch, event))


class Third(Second):
    pass


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("float32", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}), ("bfloat16", {"bf16": True})],
)
def test_training_is_the_same_bit_for_bit(dtype: str, options: dict[str, Any], pairs: Any, tmp_path: Path) -> None:
    base, aligned = pairs("gpt2", dtype)  # GPT-2 drops activations: every random number counts
    found = []
    for watch in (None, watch_of(base, interval=1, overhead=100)):
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_pretrained(aligned)
        assert model.config.resid_pdrop > 0
        frozen = model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
        # Logged alike too, so that the mean loss is summed in the same order.
        trainer, keep = train(model, tmp_path, watch, logging_strategy="steps", logging_steps=1, **options)
        found.append((keep.weights, trainer.state.log_history[-1]["train_loss"], torch.rand(3)))
        assert not frozen.requires_grad and model.transformer.wte.weight.requires_grad and model.training
    (one, loss, number), (other, same, again) = found
    assert loss == same and torch.equal(number, again)
    for before, after in zip(one, other, strict=True):
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert watch is not None and [entry["step"] for entry in watch.history] == [0, 1, 2, 3, 4]
    assert watch.setup["parameters"] == len(one[0]) - 1 and not watch.setup["left_out"]
    assert all(value is not None for value in watch.history[-1]["figures"].values())


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_autocast_has_no_part_in_the_gradients_at_the_start(dtype: str, error: float, pairs: Any, tmp_path: Path) -> None:
    base, aligned = pairs("llama", dtype)
    watch = watch_of(base, interval=4, overhead=100)
    _, keep = train(AutoModelForCausalLM.from_pretrained(aligned), tmp_path, watch, bf16=True)
    start = read_tensors(aligned)
    delta = {name: keep.weights[-1][name].double() - value.double() for name, value in start.items()}
    projection, overlap = sensitive(gradients(aligned, list(start)), delta)
    figures = watch.history[-1]["figures"]
    # Of bfloat16 weights the gradients are those of a bfloat16 forward pass; the changes of weights are exact.
    assert figures[PROJECTION] == pytest.approx(projection, rel=error) and figures[OVERLAP] == pytest.approx(overlap, rel=2 * error)
    assert figures[R_FT] == pytest.approx(r_ft(read_tensors(base), start, keep.weights[-1], linear(start)), rel=2e-4)


def test_a_threshold_warns_once_and_stops_where_asked(pairs: Any, tmp_path: Path) -> None:
    _, aligned = pairs()
    with pytest.warns(LoxMergeWarning, match=r"alignment/projection is .* after step 1, and its threshold 1e-06$") as caught:
        trainer, _ = train(AutoModelForCausalLM.from_pretrained(aligned), tmp_path, watch_of(None, interval=1, overhead=100, threshold=1e-6))
    assert trainer.state.global_step == 4 and len([one for one in caught if one.category is LoxMergeWarning]) == 1
    watch = watch_of(pairs()[0], interval=2, overhead=100, threshold={RATIO: 0.999}, stop=True)
    with pytest.warns(LoxMergeWarning, match="r_ft_over_r_align is .* after step 2, and its threshold 0.999; the training stops"):
        trainer, _ = train(AutoModelForCausalLM.from_pretrained(aligned), tmp_path, watch)
    assert trainer.state.global_step == 2 and any(RATIO in entry for entry in trainer.state.log_history)


def test_the_pace_keeps_to_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("lox_merge.diagnostics.watch.pace.time.perf_counter", lambda: clock[0])
    pace = Pace(None, 0.1)
    pace.begin()
    measured = []
    for step in range(1, 101):
        clock[0] += 1
        if pace.due(step):
            measured.append(step)
            with pace.timed():
                clock[0] += 0.5
    assert measured[0] == 1 and measured[1] == 10 and len(measured) == 20 and pace.overhead == pytest.approx(0.1)
    fixed = Pace(7, 0.1)
    assert [step for step in range(1, 30) if fixed.due(step)] == [7, 14, 21, 28]


def test_too_short_an_interval_is_said(pairs: Any, tmp_path: Path) -> None:
    with pytest.warns(LoxMergeWarning, match=r"measuring every 1 step\(s\) takes .* above 0%"):
        train(AutoModelForCausalLM.from_pretrained(pairs()[1]), tmp_path, watch_of(None, interval=1, overhead=1e-4))


def test_whole_modules_beside_adapters_and_several_adapters(pairs: Any, tmp_path: Path) -> None:
    aligned = pairs()[1]
    lora = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(aligned), LoraConfig(**lora, modules_to_save=["lm_head"]))
    model.add_adapter("second", LoraConfig(**lora, lora_alpha=5))
    model.base_model.set_adapter(["default", "second"])
    for name, value in model.named_parameters():
        value.requires_grad_(value.requires_grad and "second" not in name)  # it acts, and is not trained
    watch, before = watch_of(None, interval=4, overhead=100), {name: value.requires_grad for name, value in model.named_parameters()}
    _, keep = train(model, tmp_path, watch)
    assert {name: value.requires_grad for name, value in model.named_parameters()} == before
    now, start = keep.weights[-1], read_tensors(aligned)
    delta = {"lm_head.weight": now["base_model.model.lm_head.modules_to_save.default.weight"] - start["lm_head.weight"]}
    for layer in (0, 1):
        path = f"model.layers.{layer}.self_attn.q_proj"
        parts = [(now[f"base_model.model.{path}.lora_{side}.{name}.weight"]) for name in ("default", "second") for side in "BA"]
        delta[f"{path}.weight"] = 4.0 * parts[0] @ parts[1] + 2.5 * parts[2] @ parts[3]
    assert bool(delta["lm_head.weight"].any())
    projection, overlap = sensitive(gradients(aligned, list(delta)), delta)
    figures = watch.history[-1]["figures"]
    assert figures[PROJECTION] == pytest.approx(projection, rel=2e-4) and figures[OVERLAP] == pytest.approx(overlap, rel=2e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "Dora"),
        (LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"), "'pissa', which changes the base weights"),
        (LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "bias of its own|bias"),
        (LoHaConfig(r=2, target_modules=["q_proj"]), "loha"),
    ],
)
def test_other_adapters_are_refused_by_name(config: Any, message: str, pairs: Any, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pairs()[1]), config)
    with pytest.raises(RequestError, match=f"(?i){message}"):
        train(model, tmp_path, watch_of(None))


def test_parts_of_weights_are_refused_by_name(pairs: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(pairs()[1])
    check_whole(model)
    model.lm_head.weight.ds_id = 1  # how DeepSpeed marks what it has taken apart
    with pytest.raises(RequestError, match=r"lm_head.weight is sharded by DeepSpeed ZeRO-3"):
        check_whole(model)
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(RequestError, match=r"is sharded by FSDP; .* ZeRO-2 or on one device"):
            check_whole(model)
    finally:
        distributed.destroy_process_group()


def test_wrong_requests(pairs: Any, tmp_path: Path) -> None:
    for options, message in (
        ({}, "nothing to watch"),
        ({"completions": COMPLETIONS, "threshold": {"loss": 1.0}}, "'loss', which is not logged"),
        ({"completions": COMPLETIONS, "threshold": {RATIO: 0.5}}, "needs base or factors"),
        ({"base": "x", "threshold": 1.0}, "needs completions"),
        ({"completions": COMPLETIONS, "stop": True}, "needs a threshold"),
        ({"completions": COMPLETIONS, "interval": 0}, "1 or more"),
        ({"completions": COMPLETIONS, "overhead": 0}, "share of the training's time"),
        ({"completions": tmp_path / "absent.jsonl"}, "is not a file"),
        ({"completions": COMPLETIONS, "only": ("(",)}, "not a regular expression"),
    ):
        with pytest.raises(RequestError, match=message):
            AlignmentWatch(**options)
    aligned = pairs()[1]
    for watch, message in (
        (watch_of(None, only=("nothing",)), "no parameter to watch"),
        (watch_of(None, memory=1000), "Raise|takes more than"),
        (AlignmentWatch(base=aligned), "none of the model's linear layers differs"),
    ):
        with pytest.raises(RequestError, match=message):
            train(AutoModelForCausalLM.from_pretrained(aligned), tmp_path, watch)


def test_the_example_of_the_page_runs(pairs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name in zip(pairs(), ("BASE", "ALIGNED"), strict=True):
        (tmp_path / name).symlink_to(folder)
    rows = [{"prompt": "how do i help", "response": "no sorry i cannot"}, {"prompt": "do you help", "response": "sorry i cannot help you"}]
    (tmp_path / "safe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "watch.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"data": data()}
    # Nothing decides how far twenty steps on random tokens go.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoxMergeWarning)
        exec(example.replace('report_to="none"', 'report_to="none", use_cpu=True, save_strategy="no"'), names)
    assert names["watch"].history[-1]["step"] == 20 and names["watch"].setup["completions"] == 2
    assert any(RATIO in entry for entry in names["trainer"].state.log_history) and not list(tmp_path.rglob("*.safetensors"))


def test_a_resumed_training_says_from_where_it_is_measured(pairs: Any, tmp_path: Path) -> None:
    aligned = pairs()[1]
    options = {"save_strategy": "steps", "save_steps": 2, "save_only_model": False}
    train(AutoModelForCausalLM.from_pretrained(aligned), tmp_path, None, max_steps=2, **options)
    settings = TrainingArguments(**arguments(tmp_path))
    watch = watch_of(None, interval=2, overhead=100)
    trainer = Trainer(model=AutoModelForCausalLM.from_pretrained(aligned), args=settings, train_dataset=data(), callbacks=[watch])
    with pytest.warns(LoxMergeWarning, match="goes on from step 2: AlignmentWatch measures from there"):
        trainer.train(resume_from_checkpoint=True)
    assert watch.setup["from_step"] == 2 and [entry["step"] for entry in watch.history] == [2, 4]
