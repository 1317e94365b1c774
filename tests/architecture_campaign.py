"""Every model that writes text and that the installed transformers knows, tiny and random: `python tests/architecture_campaign.py`.

Each is saved as base and aligned, hardened, filtered, verified, loaded again, hardened as an adapter that PEFT loads and merges,
and compared tensor by tensor with LoX in float64 (tests/reference.py). Exit code 1 when one of them ends badly. What cannot be
made tiny, or built at all here, is counted apart.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import click
import peft
import torch
from finetuned import finetune
from reference import load, lox_tensor
from small_architectures import KINDS, Architecture, NotBuilt, architectures, small_model
from tiny_models import align
from transformers import AutoConfig, GenerationConfig
from transformers.utils import logging

from lox_merge import FilterRecipe, Recipe, harden, project
from lox_merge.checkpoint.adapter import open_adapter
from lox_merge.checkpoint.checkpoint import open_checkpoint
from lox_merge.errors import LoxMergeError, LoxMergeWarning
from lox_merge.jobs.adapter import execute_adapter
from lox_merge.jobs.adapter_plan import plan_adapter
from lox_merge.jobs.harden import plan_hardening
from lox_merge.jobs.layout import is_vector
from lox_merge.jobs.verify import verify
from lox_merge.safety.automatic import auto_class
from lox_merge.safety.loading import check_words
from lox_merge.safety.padding import allowed_together

RANK, ALPHA = 2, 1.25


@dataclass
class Found:
    """What became of one architecture. outcome: 'hardened', 'not built' or 'failed'. shapes: of edited tensors that are no plain matrix."""

    architecture: str
    kind: str
    outcome: str
    seconds: float = 0.0
    reason: str = ""
    edited: int = 0
    adapter: str = ""
    asked: str = ""
    shapes: dict[str, list[int]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def make_pair(architecture: Architecture, folder: Path) -> tuple[Path, Path]:
    """Writes base and aligned. Raises NotBuilt."""
    model = small_model(architecture)
    with torch.no_grad():
        for change in (lambda values: values + 0.02 * torch.randn(values.shape), lambda values: align(values, 0.05)):
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    # Some leave memory as they found it.
                    parameter.copy_(change(parameter.float().nan_to_num(0, 0, 0).clamp(-1, 1)))
            try:
                model.save_pretrained(folder / ("aligned" if (folder / "base").exists() else "base"))
            except Exception as error:
                raise NotBuilt(f"not saved: {type(error).__name__}: {error}".splitlines()[0][:120]) from error
    return folder / "base", folder / "aligned"


def run(architecture: Architecture, folder: Path) -> Found:
    started = time.perf_counter()
    found = Found(architecture.name, architecture.kind, "hardened")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _look_at(architecture, *make_pair(architecture, folder), folder, found)
        found.warnings = [str(one.message) for one in caught if issubclass(one.category, LoxMergeWarning)]
    except NotBuilt as error:
        found.outcome, found.reason = "not built", str(error)
    except Exception as error:
        found.outcome, found.reason = "failed", f"{type(error).__name__}: {error}"
    found.seconds = time.perf_counter() - started
    return found


def _look_at(architecture: Architecture, base: Path, aligned: Path, folder: Path, found: Found) -> None:
    out = harden(base, aligned, folder / "out", recipe=Recipe(rank=RANK, alpha=ALPHA), device="cpu").out
    tensors = {tensor["name"]: tensor for tensor in json.loads((out / "lox_merge.json").read_text())["tensors"]}
    before, after, written = load(base), load(aligned), load(out)
    config = json.loads((aligned / "config.json").read_text())
    layout = {"gpt_oss": architecture.name == "gpt_oss", "experts_of_dbrx": config.get("ffn_config", {}).get("moe_num_experts", 0)}
    for name, value in written.items():
        if tensors[name]["action"] == "edited":
            assert_close(value, lox_tensor(name, before[name], after[name], RANK, ALPHA, **layout), after[name], name)
            if value.ndim != 2:
                found.shapes[re.sub(r"\d+", "N", name)] = list(value.shape)
        else:
            assert torch.equal(value, after[name]), f"{name} is said to be copied and is not"
            left = value.is_floating_point() and not is_vector(value.shape) and not torch.equal(before[name], after[name])
            assert not left, f"{name} {list(value.shape)} is a matrix that changed and was copied: {tensors[name]['reason']}"
    found.edited = sum(tensor["action"] == "edited" for tensor in tensors.values())
    assert verify(out, base=base, aligned=aligned).ok, "verify finds a difference"
    report = _load(architecture, out, aligned)
    if report:
        assert report == _load(architecture, aligned, aligned), f"not loaded whole: {report}"
        raise NotBuilt("saved, and not loaded whole again")
    found.asked = _ask(out)
    tuned = finetune(aligned, folder / "tuned")
    project(base, aligned, tuned, folder / "projected", recipe=FilterRecipe(fraction=0.1), device="cpu")
    try:
        execute_adapter(plan_adapter(plan_hardening(base, aligned, folder / "adapter", recipe=Recipe(rank=RANK, alpha=ALPHA))), device="cpu")
    except LoxMergeError as error:
        found.adapter = str(error).splitlines()[0]
        return
    adapted = open_adapter(folder / "adapter", "adapter", open_checkpoint(aligned, "aligned"), base_is_right=True)
    for name in adapted.changes:
        exact = lox_tensor(name, before[name], after[name], RANK, ALPHA, **layout)
        assert_close(adapted.tensor(name), exact, after[name], f"{name} with the adapter")
    model = architecture.auto.from_pretrained(aligned)
    names = set(model.state_dict())
    merged = peft.PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    assert set(merged.state_dict()) == names, "PEFT leaves layers of its own behind when it merges the adapter"
    found.adapter = f"changes {len(adapted.changes)}"


def _ask(out: Path) -> str:
    """'answers' where the model that commands would run reads a text alone, and in what batches; else why not."""
    try:
        model = auto_class(AutoConfig.from_pretrained(out)).from_pretrained(out, dtype=torch.float32).eval()
        tokens = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 5, 8, 7, 6, 5]])
        config = GenerationConfig(do_sample=False, max_new_tokens=2, min_new_tokens=2, pad_token_id=0)
        with torch.no_grad():
            scores = model(input_ids=tokens, attention_mask=(tokens > 0).long()).logits
            model.generation_config = config
            reply = model.generate(input_ids=tokens, attention_mask=(tokens > 0).long())
        assert scores.shape[:2] == tokens.shape and bool(scores[1].isfinite().all()), f"logits {list(scores.shape)}"
        assert reply.shape == (2, 8) and torch.equal(reply[:, :6], tokens), f"reply {list(reply.shape)}"
        with torch.no_grad():
            for parameter in model.parameters():  # freshly drawn weights hardly mix what stands at different places
                parameter += 0.05 * torch.randn_like(parameter)
        check_words(model, [5, 6, 7, 8], str(out))
        together = allowed_together(model, [list(range(5, 20)), [5, 6]], 0)
    except AssertionError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:150]
    return {"any": "answers", "alike": "answers, in batches of one length", "one": "answers, one at a time"}[str(together)]


def assert_close(out: torch.Tensor, exact: torch.Tensor, aligned: torch.Tensor, label: str) -> None:
    """`out` is `exact`, but for its rounding and for what the SVD leaves: a thousandth of the edit, a little more where singular values
    lie so close together that the span is not determined (kernels here are noise)."""
    edit = exact - aligned.double()
    allowed = exact.abs() * torch.finfo(out.dtype).eps / 2 * 1.01 + 1e-2 * edit.norm() + 1e-7
    error = out.double() - exact
    assert (error.abs() <= allowed).all(), label
    rounding = (exact.to(out.dtype).double() - exact).norm()
    assert float(error.norm()) <= 1.1 * float(rounding) + 1e-2 * float(edit.norm()) + 1e-6, label


def _load(architecture: Architecture, out: Path, aligned: Path) -> dict[str, Any]:
    """What transformers says it did not load; {} where everything has its place."""
    try:
        report = architecture.auto.from_pretrained(out, output_loading_info=True, dtype=torch.bfloat16)[1]
        return {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[key]}
    except Exception:
        try:
            architecture.auto.from_pretrained(aligned)
        except Exception as error:
            raise NotBuilt(f"saved, and not loaded again: {type(error).__name__}: {error}".splitlines()[0][:120]) from error
        raise


@click.command()
@click.argument("names", nargs=-1)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="These alone; may be repeated.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write what happened here.")
def main(names: tuple[str, ...], kinds: tuple[str, ...], json_file: Path | None) -> None:
    """NAMES: transformers' names of architectures (model_type); all of them without any."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    results: list[Found] = []
    for architecture in architectures(kinds or tuple(KINDS)):
        if names and architecture.name not in names:
            continue
        with tempfile.TemporaryDirectory(prefix="architectures") as folder:
            results.append(run(architecture, Path(folder)))
        found = results[-1]
        reason = found.reason.splitlines()[0][:150] if found.reason else f"{found.adapter}; {found.asked}"
        click.echo(f"{found.kind:15} {found.architecture:28} {found.seconds:5.1f} s  {found.edited:4} edited  {found.outcome}  {reason}")
    for kind in dict.fromkeys(found.kind for found in results):
        of_kind = [found for found in results if found.kind == kind]
        counts = {outcome: sum(found.outcome == outcome for found in of_kind) for outcome in ("hardened", "not built", "failed")}
        shipped = sum(found.adapter.startswith("changes") for found in of_kind)
        answers = sum(found.asked.startswith("answers") for found in of_kind)
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        click.echo(f"{kind}: {outcomes}; {shipped} as an adapter too; {answers} answer to text alone")
    if json_file:
        json_file.write_text(json.dumps([asdict(found) for found in results], indent=2))
    sys.exit(1 if any(found.outcome == "failed" for found in results) else 0)


if __name__ == "__main__":
    main()
