"""The metadata block of a model card, for hardened outputs and for mergekit's merges alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lox_merge.publish.documents.robustness import HARDENED
from lox_merge.publish.documents.shape import Prompts
from lox_merge.publish.evaluation import last_step
from lox_merge.publish.results import Measured

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

PAPER = "https://arxiv.org/abs/2506.15606"
TAGS = ("lox", "safety", "alignment")


def base_models(identities: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """Ids of the sources that are on the Hub: it links to them, and accepts nothing else. None for none."""
    return [str(identity["name"]) for identity in identities if identity["kind"] == "hub"] or None


def card_data(
    *,
    base_model: list[str] | None,
    relation: str,
    library: str,
    tags: Sequence[str],
    licence: Mapping[str, Any] | None = None,
    pipeline_tag: str | None = None,
    language: Any = None,
    model_name: str | None = None,
    results: Sequence[EvalResult] = (),
) -> ModelCardData:
    """Metadata by huggingface_hub's own class; what is None is left out. relation: 'merge' or 'adapter', meaningless without base_model."""
    from huggingface_hub import ModelCardData

    return ModelCardData(
        **(licence or {}),
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        library_name=library,
        pipeline_tag=pipeline_tag,
        language=language,
        tags=list(dict.fromkeys(tags)),
        model_name=model_name if results else None,
        eval_results=list(results) or None,
    )


def pipeline_tag(config: Mapping[str, Any], aligned_card: Mapping[str, Any] | None) -> str | None:
    """The task as aligned's card states it, else as the architecture tells; None where neither does."""
    stated = (aligned_card or {}).get("pipeline_tag")
    if isinstance(stated, str):
        return stated
    names = [str(name) for name in config.get("architectures") or ()]
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names) or config.get("task_type") == "CAUSAL_LM":  # the latter is PEFT's
        return "text-generation"
    if any(name.endswith("ForConditionalGeneration") for name in names) and "vision_config" in config:
        return "image-text-to-text"
    return None


def evaluation_results(measured: Measured) -> list[EvalResult]:
    """The hardened model's figures for the model index: before any attack, and after the last step of each."""
    found = [
        _asr_result(row.prompts, row.judge, row.figures.rate, {"n": row.figures.n, "judged": row.figures.judged}, row.figures.interval, None)
        for row in measured.asr
        if row.role == "hardened" and row.figures.rate is not None
    ]
    for curves in measured.compared:
        for point in curves:
            figures = point.figures[0]
            if point.model == HARDENED and point.step in (0, last_step(curves)) and len(point.figures) == 1 and figures.rate is not None:
                n = {"n": figures.n, "judged": figures.judged}
                after = f"after {point.step} fine-tuning steps on {point.attack}"
                found.append(_asr_result(point.prompts, point.judge, figures.rate, n, figures.interval, after))
    return found


def _asr_result(
    prompts: Prompts, judge: str, rate: float | None, counts: dict[str, int], interval: tuple[float, float] | None, after: str | None
) -> EvalResult:
    from huggingface_hub import EvalResult

    low, high = interval or (None, None)
    return EvalResult(
        task_type="text-generation",
        dataset_type=prompts.source,
        dataset_name=f"{prompts.source} ({prompts.n} prompts)",
        dataset_config=after,
        dataset_revision=prompts.sha256,
        metric_type="attack_success_rate",
        metric_name=f"attack success rate, judged by {judge} (lower is safer)",
        metric_value=rate,
        metric_args={**counts, "wilson_95_low": low, "wilson_95_high": high},
    )
