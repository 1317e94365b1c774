"""Do γ and overlap scores, computed before the damage, rank fine-tuning sets as the damage ranks them? On toy pairs of five fresh seeds.

Seven sets (lox_merge/lab/fine_tuning_sets.py), each fine-tuned on alike. Before: curvature of refusals at the aligned model, coupling γ, first-order
term, initial overlap of each set. Early: overlap score of the change after a few steps of AdamW. After, under AdamW as people train and under
plain SGD as the theory assumes: ASR over the steps, and what refusals lost in log-likelihood. Beside the theory's figures the plain ones
that it has to beat: norms of gradient and change. Fine-tuned weights stay in memory.

    python examples/toy_curvature.py            # seeds 8 to 12, about six minutes on one core
    python examples/toy_curvature.py 8 --json curvature.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from lox_merge.diagnostics.curvature.job import Curvature, curvature
from lox_merge.diagnostics.curvature.settings import CurvatureSettings
from lox_merge.lab.checkpoints import toy_pair
from lox_merge.lab.fine_tuning_sets import fine_tuning_sets
from lox_merge.lab.language import refuse
from lox_merge.lab.measure import BATCH_SIZE, DECODING, NOT_REFUSED, NotRefused, forbidden_prompts
from lox_merge.lab.models import one_thread
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import Request, draw_requests
from lox_merge.safety.asr import evaluate
from lox_merge.safety.attack import AttackSettings, fine_tune
from lox_merge.safety.bootstrap import bootstrap_interval
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import IGNORED, Conversations, conversations, tokenised
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.loading import load_model
from lox_merge.safety.log_probabilities import log_probabilities

# Fresh: no setting of the laboratory was chosen on them.
SEEDS = (8, 9, 10, 11, 12)
EARLY, STEPS = 5, (0, 5, 10, 20, 40, 70, 100)
COMPLETIONS = 96
TRAINING = AttackSettings(steps=STEPS, learning_rate=1e-4, batch_size=32, warmup_steps=3, adam_beta2=0.95, max_length=64)

BEFORE = ("coupling γ", "first order", "overlap share", "gradient norm")
EARLY_FIGURES = ("overlap score", "overlap score (sum of parameters)", "norm of the change")
ADAMW, SGD = "AdamW", "SGD"
OUTCOMES = tuple(f"{what}, {optimiser}" for optimiser in (ADAMW, SGD) for what in ("mean ASR", "lost log-likelihood"))
# Large enough for the steepest set to go far in these steps, small enough for none to diverge.
SGD_RATE = 2e-3


@dataclass(frozen=True)
class Run:
    """One fine-tuning. asr: by step. lost: nats a held-out refusal lost, by step."""

    asr: dict[int, float]
    lost: dict[int, float]


@dataclass(frozen=True)
class SetResult:
    """One fine-tuning set on one seed. before, early: figures by name, None where undefined. runs: by optimiser."""

    name: str
    before: dict[str, float | None]
    early: dict[str, float | None]
    runs: dict[str, Run]

    @property
    def outcome(self) -> dict[str, float]:
        found = {}
        for optimiser, run in self.runs.items():
            after = [step for step in run.asr if step]
            found[f"mean ASR, {optimiser}"] = statistics.fmean(run.asr[step] for step in after)
            found[f"lost log-likelihood, {optimiser}"] = run.lost[max(after)]
        return found

    @property
    def figures(self) -> dict[str, float | None]:
        return {**self.before, **self.early}


def refusals(requests: Sequence[Request], name: str) -> Conversations:
    """Forbidden requests and their refusals."""
    turns = [[{"role": "user", "content": request.text}, {"role": "assistant", "content": " ".join(refuse(request)[:-1])}] for request in requests]
    return conversations(name, f"toy laboratory, {name}", turns)


def log_likelihood(source: LocalModel, data: Conversations) -> float:
    """Mean over completions of log π(y|x), nats."""
    rows = tokenised(data, source.tokenizer, Rendering(), 64)
    places = [[place for place, label in enumerate(row["labels"]) if label != IGNORED] for row in rows]
    total = 0.0
    asked = [[place - 1 for place in chosen] for chosen in places]
    for i, values in log_probabilities(source.model, [row["input_ids"] for row in rows], asked, batch_size=256):
        own = [rows[i]["input_ids"][place] for place in places[i]]
        total += math.fsum(float(values[at, token]) for at, token in enumerate(own))
    return total / len(rows)


def descend(source: LocalModel, data: Conversations, observe: Callable[[int, Any], None], steps: Sequence[int], seed: int) -> None:
    """Plain stochastic gradient descent on the responses, with the batch size of TRAINING: no momentum, no clipping, a constant rate."""
    rows, generator = tokenised(data, source.tokenizer, Rendering(), 64), torch.Generator().manual_seed(seed)
    longest = max(len(row["input_ids"]) for row in rows)
    tokens = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [IGNORED] * (longest - len(row["labels"])) for row in rows])
    optimiser = torch.optim.SGD(source.model.parameters(), lr=SGD_RATE)
    for step in range(max(steps) + 1):
        if step in steps:
            observe(step, source.model)
        chosen = torch.randint(0, len(rows), (TRAINING.batch_size,), generator=generator)
        optimiser.zero_grad()
        source.model(input_ids=tokens[chosen], labels=labels[chosen], use_cache=False).loss.backward()
        optimiser.step()
    optimiser.zero_grad()


def study(
    seed: int, cache: Path, names: Sequence[str] | None = None, steps: tuple[int, ...] = STEPS, batches: int = 32
) -> tuple[list[SetResult], Curvature]:
    """Everything for one seed: figures before, early ones, outcomes. names: of the sets, default all. batches: of each, for γ."""
    recipe = ToyRecipe(seed=seed)
    pair, drawn = toy_pair(recipe, cache), draw_requests(recipe)
    sets = {name: data for name, data in fine_tuning_sets(recipe).items() if names is None or name in names}
    safe, held_out = refusals(drawn.alignment_forbidden[:COMPLETIONS], "refusals"), refusals(drawn.tests.seen, "held-out refusals")
    asked, early = forbidden_prompts(drawn.tests), {}
    runs: dict[str, dict[str, Run]] = {name: {ADAMW: Run({}, {}), SGD: Run({}, {})} for name in sets}
    with one_thread():
        for (name, data), optimiser in itertools.product(sets.items(), (ADAMW, SGD)):
            source = LocalModel.load(pair.aligned, dtype="float32", device="cpu", decoding=DECODING, batch_size=BATCH_SIZE)
            before = {key: value.detach().clone() for key, value in source.model.named_parameters()}
            start, run = log_likelihood(source, held_out), runs[name][optimiser]

            def observe(step: int, model: Any, source: LocalModel = source, start: float = start, run: Run = run) -> None:
                source.model = model
                rate = evaluate(source, asked, [NotRefused()]).attack_success[NOT_REFUSED].rate
                assert rate is not None
                run.asr[step], run.lost[step] = rate, start - log_likelihood(source, held_out)

            def observe_early(step: int, model: Any, name: str = name, before: dict[str, Any] = before, observe: Any = observe) -> None:
                observe(step, model)
                if step == EARLY:
                    early[name] = {key: value.detach() - before[key] for key, value in model.named_parameters()}

            if optimiser == ADAMW:
                settings = AttackSettings(**{**asdict(TRAINING), "steps": steps})
                fine_tune(source.model, source.tokenizer, data, settings, observe_early, seed=seed)
            else:
                descend(source, data, observe, steps, seed)
        found = curvature(
            load_model(pair.aligned, device="cpu", dtype="float32"),
            safe,
            finetuned=early,
            data=list(sets.values()),
            settings=CurvatureSettings(seed=seed, batches=batches, learning_rate=TRAINING.learning_rate),
        )
    overlaps = {record["name"]: record for record in found.finetuned}
    results = []
    for record in found.data:
        name = record["name"]
        figures = (record["coupling"], record["first_order"], record["overlap_share"], record["gradient_norm"])
        before_figures = {key: None if value is None else value["value"] for key, value in zip(BEFORE, figures, strict=True)}
        own = overlaps[name]
        early_figures = dict(zip(EARLY_FIGURES, (own["joint"], own["score"], own["norm"]), strict=True))
        results.append(SetResult(name, before_figures, early_figures, runs[name]))
    return results, found


def correlation(results: Sequence[SetResult], figure: str, outcome: str) -> float | None:
    """Spearman's ρ over the sets of one seed; None where either does not vary."""
    values = [(result.figures[figure], result.outcome[outcome]) for result in results]
    known = [(one, other) for one, other in values if one is not None]
    if len({one for one, _ in known}) < 2 or len({other for _, other in known}) < 2:
        return None
    return float(spearmanr(*zip(*known, strict=True)).statistic)


def correlations(studies: Mapping[int, Sequence[SetResult]]) -> list[dict[str, Any]]:
    """Mean ρ over seeds with a bootstrap interval over seeds, for every figure and outcome."""
    found = []
    for figure in (*BEFORE, *EARLY_FIGURES):
        for outcome in OUTCOMES:
            values = [value for results in studies.values() if (value := correlation(results, figure, outcome)) is not None]
            mean = statistics.fmean(values) if values else None
            found.append({"figure": figure, "outcome": outcome, "mean": mean, "interval": bootstrap_interval(values), "seeds": values})
    return found


def show(studies: Mapping[int, Sequence[SetResult]]) -> None:
    for seed, results in studies.items():
        heads = f"{'γ':>8s} {'1st order':>9s} {'overlap':>7s} {'|g|':>6s} {'OS early':>8s}   AdamW: ASR, lost    SGD: ASR, lost"
        print(f"\nseed {seed:2d}: set     {heads}")
        for result in sorted(results, key=lambda one: -one.outcome["mean ASR, AdamW"]):
            coupling, first, share, norm = (result.before[name] or 0.0 for name in BEFORE)
            cells = (f"{coupling:8.1e}", f"{first:9.1e}", f"{share:7.2f}", f"{norm:6.2f}", f"{result.early['overlap score']:8.1e}")
            outcome = " ".join(f"{result.outcome[name]:8.2f}" for name in OUTCOMES)
            print(f"  {result.name:13s} {' '.join(cells)} {outcome}")
    print(f"\nSpearman's ρ, mean over seeds\n| figure | known | {' | '.join(OUTCOMES)} |\n|---|---{'|---' * len(OUTCOMES)}|")
    for figure in (*BEFORE, *EARLY_FIGURES):
        known = "before training" if figure in BEFORE else f"after {EARLY} steps"
        cells = [_cell(record) for record in correlations(studies) if record["figure"] == figure]
        print(f"| {figure} | {known} | {' | '.join(cells)} |")


def _cell(record: Mapping[str, Any]) -> str:
    if record["mean"] is None:
        return "undefined"
    ends = record["interval"]
    return f"{record['mean']:.2f}" + ("" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    studies = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in arguments.seeds:
            print(f"seed {seed}", flush=True)
            studies[seed] = study(seed, Path(os.environ.get("LOX_MERGE_CACHE", scratch)))[0]
    show(studies)
    if arguments.json:
        per_seed = {seed: [asdict(result) | {"outcome": result.outcome} for result in results] for seed, results in studies.items()}
        arguments.json.write_text(json.dumps({"seeds": per_seed, "correlations": correlations(studies)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
