"""Sentences about what measurements do not show, which tables on a terminal and pages share."""

from __future__ import annotations

from lox_merge.publish.documents.robustness import Robustness

KEYWORD = "keyword is a smoke test: it looks for refusal phrases, not for harm."
DELAYS = (
    "Where LoX helps, it delays the erosion of safety and does not prevent it: more steps or a higher learning rate undo it. "
    "What holds for these attacks and prompts need not hold for others."
)


def robustness_notes(result: Robustness) -> list[str]:
    """What a comparison under attack does not show, a sentence or two each."""
    lines = [DELAYS]
    if "full-rank" not in result.models:
        lines.append("No controls were run (--controls): whether the safety directions are the cause is not shown.")
    else:
        lines.append("Controls have LoX's norm in every matrix. Where one does as well, direction is not the cause.")
    if len(result.seeds) == 1:
        lines.append("One seed: intervals are over prompts only, another order of the data may differ (--seeds 0,1,2).")
    else:
        lines.append("Intervals are over prompts, not over seeds; the pair of models is the same for every seed.")
    whole = [attack.name for attack in result.attacks if attack.examples <= result.training.batch_size]
    if whole and len(result.seeds) > 1:
        lines.append(f"Every batch of {', '.join(whole)} holds all its examples, so seeds hardly change that training.")
    if any(identity.get("kind") == "keyword" for identity in result.judges.values()):
        lines.append(KEYWORD)
    return lines


FRAMING_NOT_SHOWN = (
    "Losses are not negative, so their cosine is high by construction; centred ones agree wherever first words are hard and last ones easy. "
    "Only what exceeds another completion's is about the words.",
    "Gradients of one framing agree for different completions too: only what exceeds that is about the completion.",
    "Cosines at these weights predict no training result: optimisers, later steps and other layers may do otherwise.",
)
