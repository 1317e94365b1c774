"""Directions, residuals and overlaps in hidden states against direct float64 computations on tiny models."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONFIGS, make_pair, read_tensors

import lox_merge
from lox_merge.diagnostics.activations.direction import folds_of
from lox_merge.diagnostics.activations.results import Activations
from lox_merge.maths.activations import PermutedCosines, swapped_norm
from lox_merge.maths.scatter import Scatter
from lox_merge.safety.conversations import Conversations, conversations
from lox_merge.safety.hidden_states import hidden_states
from lox_merge.safety.loading import LoadedModel, in_memory, load_model
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.types import Prompt, PromptSet

Pair = tuple[Path, Path]

FIRST = (
    ("how do i", "no sorry i cannot help"),
    ("do you help", "yes"),
    ("i cannot", "yes i do help you"),
    ("how", "no"),
    ("yes no", "sorry i cannot"),
)
SECOND = (("help", "i do"), ("no", "yes you do"), ("sorry", "how"), ("you", "no no help"))
TOKENS = 4


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), "llama", "float32", layers=2, change=0.3)


@pytest.fixture(scope="module")
def moved(pair: Pair) -> LoadedModel:
    """Another model of the family, which no disk ever holds."""
    model = load_model(pair[1], device="cpu").model
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * parameter.std() * torch.randn_like(parameter)
    return in_memory(model, load_model(pair[1], device="cpu").tokenizer, "moved")


def domain(turns: Any = FIRST, name: str = "first") -> Conversations:
    return conversations(name, "test", [[{"role": "user", "content": one}, {"role": "assistant", "content": other}] for one, other in turns])


def asked(texts: tuple[str, ...]) -> PromptSet:
    return prompt_set([Prompt(str(number), text) for number, text in enumerate(texts)], "test")


def states_of(loaded: LoadedModel, turns: Any, tokens: int = TOKENS) -> list[torch.Tensor]:
    """(layers, positions, width) float64 of each response, one text at a time, by transformers' own output."""
    found = []
    for one, other in turns:
        words = ["<|user|>", *one.split(), "<|end|>", "<|assistant|>", *other.split(), "<|end|>"]
        numbers = loaded.tokenizer.convert_tokens_to_ids(words)
        start, length = len(one.split()) + 3, min(tokens, len(other.split()))
        with torch.no_grad():
            every = loaded.model(input_ids=torch.tensor([numbers]), output_hidden_states=True).hidden_states
        found.append(torch.stack([state[0, start : start + length] for state in every]).double())
    return found


@pytest.fixture(scope="module")
def result(pair: Pair, moved: LoadedModel) -> Activations:
    prompts = {
        "one": asked(("how do i help", "no", "i cannot do", "yes sorry", "you", "help i")),
        "two": asked(("sorry", "do i", "you cannot help", "how yes no")),
    }
    return lox_merge.activations(
        *pair,
        [moved],
        pairs=[domain(), domain(SECOND, "second")],
        prompts=prompts,
        tokens=TOKENS,
        etas=(0.3, 0.6, 0.9, 0.999),
        permutations=20,
        device="cpu",
        batch_size=2,
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma", "mixtral", "gpt_oss", "qwen3"])
def test_hidden_states_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    assert architecture in CONFIGS
    model = load_model(make_pair(tmp_path, architecture, "float32")[0], device="cpu").model
    rows, positions, layers = [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10]], [[1, 3], [0, 5, 2]], [2, 0]
    found = dict(hidden_states(model, rows, positions, layers))
    for number, row in enumerate(rows):
        with torch.no_grad():
            every = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states
        expected = torch.stack([every[layer][0, positions[number]] for layer in layers])
        assert torch.allclose(found[number], expected, atol=2e-6)


def test_directions_and_projections(result: Activations, pair: Pair, moved: LoadedModel) -> None:
    models = {"base": load_model(pair[0], device="cpu"), "aligned": load_model(pair[1], device="cpu"), "moved": moved}
    for measured, turns in zip(result.domains, (FIRST, SECOND), strict=True):
        states = {label: states_of(loaded, turns) for label, loaded in models.items()}
        folds = folds_of(len(turns), 0)
        for layer in measured.layers:

            def mean(label: str, texts: list[int], layer: int = layer.layer, states: Any = states) -> torch.Tensor:
                rows = []
                for position in range(TOKENS):
                    known = [states[label][i][layer, position] for i in texts if states[label][i].shape[1] > position]
                    rows.append(torch.stack(known).mean(0) if known else torch.zeros(32, dtype=torch.float64))
                return torch.stack(rows)

            def project(label: str, number: int, texts: list[int], layer: int = layer.layer, states: Any = states) -> float:
                z = states[label][number][layer]
                v = (mean("aligned", texts, layer, states) - mean("base", texts, layer, states))[: len(z)]
                return float((z * v).sum() / v.norm())

            every = list(range(len(turns)))
            inside = {label: torch.tensor([project(label, i, every) for i in every]) for label in models}
            outside = {label: torch.tensor([project(label, i, [j for j in every if folds[j] != folds[i]]) for i in every]) for label in models}
            direction = mean("aligned", every) - mean("base", every)
            assert layer.norm == pytest.approx(float(direction.norm()), rel=1e-5)
            assert layer.random == pytest.approx(float(direction.norm()) / math.sqrt(max(measured.lengths) * 32), rel=1e-5)
            assert layer.separation.value == pytest.approx(float((inside["aligned"] - inside["base"]).mean()), rel=1e-4)
            gap = float((outside["aligned"] - outside["base"]).mean())
            assert layer.cross_validated.value == pytest.approx(gap, rel=1e-4, abs=1e-6)
            off = mean("moved", every) - mean("base", every)
            off = off - (off * direction).sum() / direction.square().sum() * direction
            for label, found in layer.models.items():
                assert found.projection.value == pytest.approx(float(inside[label].mean()), rel=1e-4, abs=1e-6)
                whole = float((inside["aligned"] - inside["base"]).mean())
                assert found.position.value == pytest.approx(float((inside[label] - inside["base"]).mean()) / whole, rel=1e-4, abs=1e-6)
                if gap > 0:
                    assert found.cross_validated.value == pytest.approx(float((outside[label] - outside["base"]).mean()) / gap, rel=1e-3, abs=1e-6)
                else:
                    assert found.cross_validated.value is None
            assert layer.models["moved"].off_line == pytest.approx(float(off.norm() / direction.norm()), rel=1e-4)
            low, high = layer.models["moved"].position.interval or (0.0, 0.0)
            assert low < (layer.models["moved"].position.value or 0.0) < high


def test_swapped_labels() -> None:
    """Exact over every way of swapping where each fold holds one text; the variance between folds stands in elsewhere."""
    torch.manual_seed(0)
    differences = torch.randn(4, 3, 5, dtype=torch.float64) + 0.5
    counts = torch.ones(4, 3, dtype=torch.float64)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)
    expected = torch.einsum("si,ipd->spd", signs, differences).div(4).square().sum((1, 2)).mean().sqrt()
    assert swapped_norm(differences, counts) == pytest.approx(float(expected), rel=1e-12)
    many = torch.randn(5, 40, 3, 200, dtype=torch.float64) + 0.1
    exact = (many.flatten(0, 1).square().sum() / 200**2).sqrt()
    assert swapped_norm(many.sum(1), torch.full((5, 3), 40.0, dtype=torch.float64)) == pytest.approx(float(exact), rel=0.05)
    alone = torch.tensor([[2.0], [0.0]], dtype=torch.float64)
    assert swapped_norm(torch.ones(2, 1, 5, dtype=torch.float64), alone) is None


def test_residuals_and_their_agreement(result: Activations, pair: Pair) -> None:
    base, aligned = (load_model(folder, device="cpu") for folder in pair)
    rows = []
    for measured, turns in zip(result.domains, (FIRST, SECOND), strict=True):
        both = zip(states_of(aligned, turns), states_of(base, turns), strict=True)
        residuals = torch.stack([one[-1].mean(0) - other[-1].mean(0) for one, other in both])
        rows.append(residuals)
        values = torch.linalg.svdvals(residuals).square()
        assert measured.residual.shares == pytest.approx((values / values.sum()).tolist()[:4], rel=1e-4)
        without = torch.linalg.svdvals(residuals - residuals.mean(0)).square()
        assert measured.residual.centred_shares == pytest.approx((without / without.sum()).tolist()[: min(4, len(turns) - 1)], rel=1e-3)
        assert measured.residual.mean_share == pytest.approx(len(turns) * float(residuals.mean(0).square().sum() / values.sum()), rel=1e-4)
    (both_domains,) = result.pairs
    for agreement, centred in ((both_domains.uncentred, False), (both_domains.centred, True)):
        one, other = (torch.linalg.svd(part - part.mean(0) if centred else part).Vh for part in rows)
        assert agreement.cosines[0][:3] == pytest.approx((one[:1] @ other[:3].T).abs()[0].tolist(), abs=1e-3)
        assert agreement.p_less is not None and 1 / 21 <= agreement.p_less <= 1
    random = torch.randn(20000, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cosines = (random[:, 0] / random.norm(dim=1)).abs()
    assert both_domains.uncentred.random_mean == pytest.approx(float(cosines.mean()), rel=0.03)
    assert both_domains.uncentred.random_95 == pytest.approx(float(cosines.quantile(0.95)), rel=0.03)


@pytest.mark.parametrize("centred", [False, True])
def test_permuted_cosines(centred: bool) -> None:
    torch.manual_seed(1)
    first, second = torch.randn(6, 9) + 1, torch.randn(5, 9)
    drawn = PermutedCosines(first, second, 2, centred=centred).draw(torch.Generator().manual_seed(3))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    pooled = torch.cat([first, second]).double()
    parts = [pooled[order[:6]], pooled[order[6:]]]
    one, other = (torch.linalg.svd(part - part.mean(0) if centred else part).Vh[:2] for part in parts)
    assert drawn is not None
    assert torch.allclose(drawn, (one @ other.T).abs(), atol=1e-9)


def test_domains_of_the_same_rows_cannot_be_told_apart(pair: Pair) -> None:
    found = lox_merge.activations(*pair, pairs=[domain(), domain(name="again")], permutations=30, layers=[-1], device="cpu").pairs[0].uncentred
    assert found.cosines[0][0] == pytest.approx(1)
    assert found.p_less == 1


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("count", [3, 7, 300])
def test_scatter_is_the_svd_of_all_rows(count: int, centred: bool) -> None:
    torch.manual_seed(2)
    rows = torch.randn(count, 7) * torch.arange(1, 8) + 2
    halves = [Scatter(7), Scatter(7)]
    for number, row in enumerate(rows):
        halves[number % 2].add(row[None])
    found, values = (halves[0] + halves[1]).leading(centred=centred), rows.double()
    _, expected, directions = torch.linalg.svd(values - values.mean(0) if centred else values, full_matrices=False)
    kept = len(found.squares)
    assert kept == min(count - centred, 7)
    assert torch.allclose(found.squares, expected[:kept].square(), rtol=1e-6)
    assert torch.allclose((found.directions.T @ directions[:kept].T).abs(), torch.eye(kept, dtype=torch.float64), atol=1e-5)
    assert found.total == pytest.approx(float(expected.square().sum()))


@pytest.mark.parametrize("count", [3, 300])
def test_rounding_is_no_direction(count: int) -> None:
    """Prompts that end with the same token have one embedding: without their mean nothing is left, though not exactly nothing."""
    states = Scatter(7)
    for _ in range(count):
        states.add(torch.linspace(0.1, 1.7, 7)[None])
    found = states.leading(centred=True)
    assert (len(found.squares), found.total) == (0, 0)
    assert len(states.leading(centred=False).squares) == 1


def test_overlaps(result: Activations, pair: Pair) -> None:
    loaded = load_model(pair[1], device="cpu")
    sets = {"one": ("how do i help", "no", "i cannot do", "yes sorry", "you", "help i"), "two": ("sorry", "do i", "you cannot help", "how yes no")}
    for found in (overlap for overlap in result.overlaps if overlap.model == "aligned"):
        columns = []
        for texts in sets.values():
            vectors = []
            for text in texts:
                numbers = loaded.tokenizer.convert_tokens_to_ids(["<|user|>", *text.split(), "<|end|>", "<|assistant|>"])
                with torch.no_grad():
                    every = loaded.model(input_ids=torch.tensor([numbers]), output_hidden_states=True).hidden_states
                vectors.append(every[found.layer][0, -1].double())
            columns.append(torch.stack(vectors, 1))
        for curve, centred in ((found.uncentred, False), (found.centred, True)):
            bases = [torch.linalg.svd(part - part.mean(1, keepdim=True) if centred else part, full_matrices=False) for part in columns]
            for overlap in curve:
                if found.layer == 0 and centred:  # every prompt ends with the same token
                    assert overlap.counts is None and overlap.mso is None
                    continue
                counts = [int((s.square().cumsum(0) < overlap.eta * s.square().sum() * (1 - 1e-9)).sum()) + 1 for _, s, _ in bases]
                assert overlap.counts == tuple(counts)
                one, other = (u[:, :count] for (u, _, _), count in zip(bases, counts, strict=True))
                assert overlap.mso == pytest.approx(float((one.T @ other).square().sum()) / min(counts), abs=1e-4)
                assert overlap.expected == max(counts) / 32


def test_one_by_one_gives_the_same(result: Activations, pair: Pair, moved: LoadedModel) -> None:
    options: dict[str, Any] = {"pairs": [domain()], "tokens": TOKENS, "layers": [0, -1], "device": "cpu", "batch_size": 2}
    one, other = (lox_merge.activations(*pair, [moved], one_by_one=alone, **options).to_json() for alone in (True, False))
    assert one["settings"].pop("one_by_one") is True and other["settings"].pop("one_by_one") is False
    assert one == other
    every = result.to_json()["domains"][0]["layers"]
    assert one["domains"][0]["layers"] == [every[0], every[-1]]


def test_weights_stay_as_they_are(pair: Pair) -> None:
    loaded = [load_model(folder, device="cpu") for folder in pair]
    lox_merge.activations(*loaded, pairs=[domain()], layers=[0, -1])
    for folder, model in zip(pair, loaded, strict=True):
        state = model.model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in read_tensors(folder).items())
