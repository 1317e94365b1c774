"""What `project` refuses, and what it leaves as it was fine-tuned."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from finetuned import finetune
from project_fixtures import Three, copies
from reference import load
from tiny_models import make_pair

from lox_merge import FilterRecipe, project
from lox_merge.cli.main import cli
from lox_merge.errors import LoxMergeError, LoxMergeWarning, NonFiniteDeltaError, OutputError, PlanError
from lox_merge.jobs.filter_checks import measure_direction
from lox_merge.jobs.project import plan_projection
from lox_merge.maths.geometry import REVERTING_COSINE

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Runs the command, asserts its error's exit code and that there is no output folder; returns the message."""

    def run(*arguments: object, code: int = 2) -> str:
        models, options = [str(model) for model in arguments[:3]], [str(option) for option in arguments[3:]]
        done = CliRunner().invoke(cli, ["project", *models, str(tmp_path / "out"), *(options or ["--fraction", "0.2"])])
        assert isinstance(done.exception, LoxMergeError) and done.exception.exit_code == code, (done.output, done.exception)
        assert not (tmp_path / "out").exists()
        return str(done.exception)

    return run


def test_a_model_with_its_alignment_removed_is_not_written(three: Three, refused: Callable[..., str], tmp_path: Path) -> None:
    base, aligned, _ = three
    assert "base and finetuned are the same checkpoint" in refused(base, aligned, base)
    before = load(base)
    copy = finetune(aligned, tmp_path / "copy", lambda name, _: before[name])
    message = refused(base, aligned, copy, "--fraction", "0.2", "--mode", "parallel")
    assert "the cosine of finetuned − aligned with base − aligned is 1.000" in message and "alignment removed" in message
    half = finetune(aligned, tmp_path / "half", lambda name, tensor: 0.5 * (tensor.float() + before[name].float()))
    assert "points back along the alignment delta" in refused(base, aligned, half, "--rank", "2")
    some = finetune(aligned, tmp_path / "some", lambda name, tensor: before[name] if "q_proj" in name else tensor)
    for options in (["--fraction", "0.2"], ["--fraction", "0.2", "--dry-run"], ["--threshold", "0.9", "--projector", "safe-lora"]):
        assert "points back along the alignment delta" in refused(base, aligned, some, *options)


def test_the_limit_lies_where_half_of_the_update_points_back(floats: Three, tmp_path: Path) -> None:
    base, aligned, _ = floats
    before, after = load(base), load(aligned)
    generator = torch.Generator().manual_seed(0)
    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in after.items()}
    scale = math.sqrt(
        sum(float((after[name] - before[name]).square().sum()) for name in after) / sum(float(part.square().sum()) for part in noise.values())
    )
    for share, allowed in ((0.75, False), (0.6, True)):
        # −share·Δ_align + √(1−share²)·noise of the same norm: the cosine is `share`.
        rest = math.sqrt(1 - share**2) * scale
        change = lambda name, tensor, share=share, rest=rest: tensor - share * (tensor - before[name]) + rest * noise[name]  # noqa: E731
        folder = finetune(aligned, tmp_path / str(share), change)
        plan = plan_projection(base, aligned, folder, tmp_path / "plan", recipe=FilterRecipe(fraction=0.2))
        found = measure_direction(plan).reversal
        assert found == pytest.approx(share, abs=0.03) and (found < REVERTING_COSINE) == allowed


def test_nothing_was_fine_tuned(three: Three, refused: Callable[..., str], tmp_path: Path) -> None:
    base, aligned, _ = three
    assert "aligned and finetuned are the same checkpoint" in refused(base, aligned, aligned)
    copy = shutil.copytree(aligned, tmp_path / "copy")
    assert "fine-tuning deltas are zero" in refused(base, aligned, copy)


def test_order_and_architecture(three: Three, refused: Callable[..., str], tmp_path: Path) -> None:
    base, aligned, finetuned = three
    assert "aligned (aligned) has a chat template and finetuned (base) has none: they look swapped" in refused(finetuned, aligned, base)
    assert "base (aligned) has a chat template and aligned (base) has none" in refused(aligned, base, finetuned)
    other = make_pair(tmp_path / "gpt2", "gpt2")[1]
    assert "tensor(s) of aligned (aligned) are missing in finetuned" in refused(base, aligned, other)
    grown = make_pair(tmp_path / "grown", "llama", aligned_vocabulary=101)[1]
    message = refused(base, aligned, grown)
    assert "aligned has [96, 32]" in message and "finetuned has [101, 32]" in message and "vocabularies differ" in message
    wide = make_pair(tmp_path / "wide", "llama", hidden=64)[1]
    assert "give the checkpoint that finetuned was trained from" in refused(base, aligned, wide)
    with pytest.raises(PlanError) as caught:
        plan_projection(base, aligned, grown, aligned / "out", recipe=FilterRecipe(fraction=0.2))
    assert len(caught.value.problems) >= 3  # all of them in one message


def test_a_vocabulary_that_alignment_changed_is_left_as_fine_tuned(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", aligned_vocabulary=101)
    finetuned = finetune(aligned, tmp_path / "finetuned")
    with pytest.warns(LoxMergeWarning) as caught:
        project(base, aligned, finetuned, tmp_path / "out", recipe=FilterRecipe(fraction=0.2))
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2 and any("embed_tokens.weight is copied, not edited: base has [96, 32] and finetuned [101, 32]" in text for text in texts)
    out, after = load(tmp_path / "out"), load(finetuned)
    assert torch.equal(out["lm_head.weight"], after["lm_head.weight"]) and not torch.equal(out[UP], after[UP])


def test_quantised_and_broken_weights(three: Three, refused: Callable[..., str], tmp_path: Path) -> None:
    base, aligned, _ = three
    fp8 = finetune(three[2], tmp_path / "fp8")
    config = json.loads((fp8 / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (fp8 / "config.json").write_text(json.dumps(config))
    assert "finetuned (fp8) is quantised (fp8, one scale a tensor), and project writes plain weights only" in refused(base, aligned, fp8)
    broken = finetune(three[2], tmp_path / "nan", lambda name, tensor: torch.full_like(tensor, math.nan) if name == UP else tensor)
    assert f"{UP}: 2,048 of them" in refused(base, aligned, broken, code=1)
    with pytest.raises(NonFiniteDeltaError):
        project(base, aligned, broken, tmp_path / "out", recipe=FilterRecipe(fraction=0.2, layers=2))
    result = project(base, aligned, broken, tmp_path / "skipped", recipe=FilterRecipe(fraction=0.2, layers=2, skip_non_finite=True))
    assert load(tmp_path / "skipped")[UP].isnan().all() and result.summary.filtered == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "give either a fraction"),
        (["--fraction", "0.2", "--rank", "3"], "give either a fraction"),
        (["--fraction", "1"], "fraction is 1; use a number in (0, 1)"),
        (["--fraction", "0"], "fraction is 0"),
        (["--fraction", "nan"], "--fraction: 'nan' is not a finite number"),
        (["--fraction", "half"], "not a number"),
        (["--rank", "0"], "rank 0 is not a whole number"),
        (["--rank", "33"], "rank 33 is above the short side of"),
        (["--fraction", "0.2", "--mode", "sideways"], "mode 'sideways' is not known"),
        (["--fraction", "0.2", "--basis", "best"], "basis 'best' is not known"),
        (["--fraction", "0.2", "--side", "up"], "side 'up' is not known"),
        (["--fraction", "0.2", "--threshold", "2"], "threshold is 2; it is a cosine"),
        (["--fraction", "0.2", "--threshold", "0.3", "--layers", "2"], "give one of them"),
        (["--fraction", "0.2", "--layers", "0"], "layers is 0"),
        (["--fraction", "0.2", "--threshold", "0.3", "--mode", "orthogonal"], "go with mode parallel"),
        (["--fraction", "0.2", "--below", "merge"], "give threshold or layers too"),
        (["--fraction", "0.2", "--merge-weight", "0.3"], "it goes with below 'merge'"),
        (["--fraction", "0.2", "--layers", "2", "--below", "merge", "--merge-weight", "1.5"], "merge_weight is 1.5"),
        (["--fraction", "0.2", "--layers", "2", "--below", "merge", "--rounding", "feedback"], "needs a limited rank"),
        (["--fraction", "0.2", "--projector", "safe-lora"], "it takes no fraction"),
        (["--fraction", "0.2", "--include", "no_such_layer"], "matches no tensor"),
        (["--fraction", "0.2", "--dtype", "int4"], "dtype 'int4' is not supported"),
        (["--fraction", "0.2", "--device", "tpu"], "device 'tpu' is not known"),
    ],
)
def test_settings(three: Three, refused: Callable[..., str], options: list[str], words: str) -> None:
    assert words in refused(*three, *(options or ["--seed", "0"]))


def test_outputs_in_the_way(three: Three, tmp_path: Path) -> None:
    models = copies(three, tmp_path)
    for place, words in ((models[2] / "out", "lies inside finetuned"), (tmp_path, "lies inside the output")):
        with pytest.raises(PlanError, match=words):
            project(*models, place, recipe=FilterRecipe(fraction=0.2))
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not written by lox-merge"):
        project(*models, mine, recipe=FilterRecipe(fraction=0.2), overwrite=True)
