"""Coupling, overlap and predictions against an explicit Hessian, an explicit Fisher matrix and gradient flow itself, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from curvature_reference import completions, explicit_gradients, flat, log_likelihood, tiny
from torch import Tensor
from torch.func import functional_call

from lox_merge.diagnostics.curvature.condition import Moments, condition_record, moments
from lox_merge.diagnostics.curvature.gram import FisherGram, fisher_gram
from lox_merge.diagnostics.curvature.hessian import batch_loss
from lox_merge.diagnostics.curvature.records import coupling_by_layer
from lox_merge.diagnostics.curvature.settings import CurvatureSettings
from lox_merge.diagnostics.curvature.subspace import SafeSubspace, safe_subspace

# Two small matrices, so that the Hessian can be written out: 2 · 16 · 24 entries and a norm's 16.
NAMES = ("model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
SETTINGS = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


class Case:
    """A tiny model with safe completions, four batches to fine-tune on, and everything written out."""

    def __init__(self) -> None:
        self.model = tiny("llama", **SETTINGS)
        self.safe, data = completions(), completions((6, 8, 7, 9, 6, 10, 8, 7), seed=5)
        self.batches = [data[start : start + 2] for start in range(0, 8, 2)]
        self.gram: FisherGram = fisher_gram(self.model, self.safe, wanted=lambda name: name in NAMES)
        self.names = self.gram.names
        self.subspace: SafeSubspace = safe_subspace(self.gram, dimension=3)
        self.found: Moments = moments(self.model, self.safe, self.gram, self.batches, memory=2**30)
        gradients = flat(explicit_gradients(self.model, self.safe), self.names)
        self.fisher = gradients.T @ gradients / len(self.safe)
        values, vectors = torch.linalg.eigh(self.fisher)
        self.values, self.vectors = values.flip(0)[:3], vectors.flip(1)[:, :3]
        self.start = torch.cat([self.model.get_parameter(name).detach().flatten() for name in self.names])

    def loss(self, weights: Tensor) -> Tensor:
        """Mean over the batches of the mean over their tokens, at other weights of NAMES."""
        own, start = {}, 0
        for name in self.names:
            value = self.model.get_parameter(name)
            own[name], start = weights[start : start + value.numel()].view_as(value), start + value.numel()
        self.model.config._attn_implementation = "eager"
        total = torch.zeros((), dtype=torch.float64)
        for rows in self.batches:
            count = sum(label != -100 for row in rows for label in row["labels"])
            for row in rows:
                total = total - log_likelihood(lambda **inputs: functional_call(self.model, own, (), inputs), row) / count
        self.model.config._attn_implementation = "sdpa"
        return total / len(self.batches)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.fixture(scope="module")
def derivatives(case: Case) -> tuple[Tensor, Tensor]:
    """g and the whole Hessian."""
    gradient = torch.autograd.functional.jacobian(case.loss, case.start)
    return gradient, torch.autograd.functional.hessian(case.loss, case.start, vectorize=True)


def test_the_coupling_is_that_of_the_explicit_hessian(case: Case, derivatives: tuple[Tensor, Tensor]) -> None:
    gradient, hessian = derivatives
    along = case.vectors.T @ (hessian @ gradient)
    record = condition_record(case.found, case.subspace, [0.1])
    coupling = float((along * case.values.sqrt()).norm())
    assert record["coupling"]["value"] == pytest.approx(coupling, rel=1e-5)
    assert record["gradient_norm"]["value"] == pytest.approx(float(gradient.norm()), rel=1e-6)
    overlap = float((case.vectors.T @ gradient).norm())
    assert record["overlap"]["value"] == pytest.approx(overlap, rel=1e-6)
    assert record["overlap_share"]["value"] == pytest.approx(overlap / float(gradient.norm()), rel=1e-6)
    assert record["expected_overlap_share"] == pytest.approx(math.sqrt(3 / len(case.start)))
    first = float((case.vectors.T @ gradient * case.values.sqrt()).norm())
    assert record["first_order"]["value"] == pytest.approx(first, rel=1e-6)
    assert record["second_order_from"] == pytest.approx(2 * first / coupling, rel=1e-5)
    predicted = record["predictions"][0]
    assert predicted["projection"]["value"] == pytest.approx(coupling * 0.01 / 2, rel=1e-5)
    assert predicted["loss"]["value"] == pytest.approx(float(case.values[2]) * coupling**2 * 1e-4, rel=1e-5)
    assert predicted["quadratic_loss"]["value"] == pytest.approx(coupling**2 * 1e-4 / 8, rel=1e-5)
    assert case.found.kernels == ["attention: eager in place of sdpa, whose kernel has no second derivative"]
    assert case.model.config._attn_implementation == "sdpa" and all(parameter.requires_grad for parameter in case.model.parameters())


def test_gradient_flow_moves_as_predicted_up_to_the_third_order(case: Case) -> None:
    """||F^{1/2} P (θ(t) − θ*)||²/2 after integrating the flow in small steps, against the second-order prediction."""
    misses = []
    for time in (0.02, 0.04):
        weights = case.start.clone()
        for _ in range(8):  # midpoint steps: their error is far below the term that the prediction leaves out
            slope = torch.autograd.functional.jacobian(case.loss, weights)
            weights = weights - time / 8 * torch.autograd.functional.jacobian(case.loss, weights - time / 16 * slope)
        moved = (case.vectors.T @ (weights - case.start) * case.values.sqrt()).norm()
        predicted = condition_record(case.found, case.subspace, [time])["predictions"][0]["second_order_loss"]["value"]
        misses.append(abs(float(moved) - math.sqrt(2 * predicted)))
        assert misses[-1] < 0.02 * float(moved)
    assert misses[1] / misses[0] == pytest.approx(8, rel=0.3)  # t³


def test_the_expected_coupling_is_the_mean_over_random_directions(case: Case, derivatives: tuple[Tensor, Tensor]) -> None:
    gradient, hessian = derivatives
    product = hessian @ gradient
    draws = torch.randn(4000, len(product), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    draws *= product.norm() / draws.norm(dim=1, keepdim=True)
    mean = float(((draws @ case.vectors).square() * case.values).sum(1).mean().sqrt())
    record = condition_record(case.found, case.subspace, [])
    assert record["expected_coupling"] == pytest.approx(mean, rel=0.05)
    assert record["control_coupling"] > 0


def test_the_control_is_the_coupling_of_a_random_direction_of_the_gradients_length(case: Case, derivatives: tuple[Tensor, Tensor]) -> None:
    gradient, hessian = derivatives
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(value.shape, generator=generator) for name, value in case.model.named_parameters() if name in NAMES}
    direction = torch.cat([drawn[name].double().flatten() for name in case.names])
    direction *= gradient.norm() / direction.norm()
    along = case.vectors.T @ (hessian @ direction)
    record = condition_record(case.found, case.subspace, [])
    assert record["control_coupling"] == pytest.approx(float((along * case.values.sqrt()).norm()), rel=1e-5)


def test_the_coupling_of_a_layer_is_that_of_its_own_parameters(case: Case, derivatives: tuple[Tensor, Tensor]) -> None:
    gradient, hessian = derivatives
    records = {record["layer"]: record for record in coupling_by_layer(case.found, case.gram, CurvatureSettings(dimension=2))}
    assert len(records) == 2
    start = 0
    for name in case.names:
        entries = slice(start, start + case.model.get_parameter(name).numel())
        start = entries.stop
        if "layers" not in name:
            continue
        values, vectors = torch.linalg.eigh(case.fisher[entries, entries])
        record = records[int(name.split(".")[2])]
        for field, vector in (("coupling", hessian @ gradient), ("first_order", gradient)):
            along = vectors[:, -2:].T @ vector[entries] * values[-2:].sqrt()
            assert record[field] == pytest.approx(float(along.norm()), rel=1e-5)


def test_groups_of_parameters_give_the_same_figures(case: Case) -> None:
    small = moments(case.model, case.safe, case.gram, case.batches, memory=20_000)
    whole = condition_record(case.found, case.subspace, [0.5])
    parts = condition_record(small, case.subspace, [0.5])
    assert parts["coupling"]["value"] == pytest.approx(whole["coupling"]["value"], rel=1e-9)
    assert parts["coupling"]["interval"] == pytest.approx(whole["coupling"]["interval"], rel=1e-9)
    assert parts["control_coupling"] == pytest.approx(whole["control_coupling"], rel=1e-9)


def test_intervals_hold_the_value_and_one_batch_has_none(case: Case) -> None:
    record = condition_record(case.found, case.subspace, [0.5])
    low, high = record["overlap"]["interval"]
    assert low < record["overlap"]["value"] < high
    single = moments(case.model, case.safe, case.gram, case.batches[:1], memory=2**30)
    assert condition_record(single, case.subspace, [0.5])["coupling"]["interval"] is None


def test_the_loss_is_that_of_transformers(case: Case) -> None:
    rows = [copy.deepcopy(row) for row in case.batches[0]]
    longest = max(len(row["input_ids"]) for row in rows)
    tokens = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows])
    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    expected = case.model(input_ids=tokens, attention_mask=mask, labels=labels).loss
    assert batch_loss(case.model, rows).item() == pytest.approx(expected.item(), rel=1e-6)  # transformers' loss is float32


def test_experts_are_differentiated_twice_too() -> None:
    model = tiny("mixtral", torch.float32)
    model.set_experts_implementation("grouped_mm")
    gram = fisher_gram(model, completions(), wanted=lambda name: "layers.1" in name)
    found = moments(model, completions(), gram, [completions(seed=7)], memory=2**30)
    assert len(found.kernels) == 2 and model.config._experts_implementation == "grouped_mm"
    assert condition_record(found, safe_subspace(gram), [])["coupling"]["value"] > 0
