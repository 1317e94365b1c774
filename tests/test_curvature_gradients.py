"""Gradients per completion by hooks, their Gram matrices and inner products, against autograd on one completion at a time."""

from __future__ import annotations

import copy
import random
import weakref

import pytest
import torch
from curvature_reference import completions, explicit_gradients, flat, tiny

from lox_merge.diagnostics.curvature.gram import FisherGram, _Store, fisher_gram
from lox_merge.diagnostics.curvature.passes import Measured, plan_passes
from lox_merge.diagnostics.curvature.products import products_with
from lox_merge.diagnostics.curvature.subspace import combined_gradients, safe_subspace
from lox_merge.errors import NumericalError, RequestError
from lox_merge.maths.fisher import overlap_scores, projection_norm, weighted_norm
from lox_merge.maths.gradients import Contribution

ARCHITECTURES = ("llama", "qwen3", "gpt2", "gemma", "mixtral", "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize(
    ("architecture", "memory"), [(name, 2**31) for name in ARCHITECTURES] + [(name, 60_000) for name in ("qwen3", "gpt2", "mixtral", "gpt_oss")]
)
def test_every_parameter_agrees_with_autograd(architecture: str, memory: int) -> None:
    model, examples = tiny(architecture), completions()
    reduction = "sum" if memory > 2**30 else "mean"
    explicit = explicit_gradients(model, examples, reduction)
    gram = fisher_gram(model, examples, memory=memory, reduction=reduction)
    assert (gram.passes == 1) == (memory > 2**30)
    # All but the attention sinks of gpt-oss, which are named.
    left = {name for name, _ in model.named_parameters()} - set(gram.names)
    assert left == set(gram.left_out) and all(name.endswith("sinks") for name in left) and bool(left) == (architecture == "gpt_oss")
    directions = [{name: torch.randn_like(value) for name, value in model.named_parameters()} for _ in range(2)]
    products = products_with(model, examples, gram, directions)
    # Gemma's norms work in float32 whatever the model's dtype, and how they round depends on the batch and on the processor.
    near = 1e-5 if architecture == "gemma" else 1e-9
    for name in gram.names:
        gradients = flat(explicit, (name,))
        expected = torch.stack([gradients @ direction[name].flatten() for direction in directions])
        for found, wanted in ((gram.grams[name], gradients @ gradients.T), (products[name], expected)):
            torch.testing.assert_close(found, wanted, rtol=near, atol=near * float(wanted.abs().max()))
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_spectrum_the_subspace_and_the_scores_are_those_of_the_explicit_fisher_matrix() -> None:
    model, examples = tiny("llama"), completions()
    gram = fisher_gram(model, examples)
    name = "model.layers.1.self_attn.o_proj.weight"
    gradients = flat(explicit_gradients(model, examples), (name,))
    fisher = gradients.T @ gradients / len(examples)
    values, vectors = torch.linalg.eigh(fisher)
    subspace = safe_subspace(gram, (name,), dimension=3)
    torch.testing.assert_close(subspace.spectrum.values, values.flip(0)[:5], rtol=1e-6, atol=0)
    assert subspace.spectrum.trace == pytest.approx(float(fisher.trace()), rel=1e-9)
    assert subspace.spectrum.smallest(3) == pytest.approx(float(values[-3])) and subspace.spectrum.tail(3) == pytest.approx(float(values[:-3].sum()))
    change = torch.randn_like(model.get_parameter(name))
    products = products_with(model, examples, gram, [{name: change}])[name][0]
    assert float(overlap_scores(products)) == pytest.approx(float(change.flatten() @ fisher @ change.flatten()), rel=1e-9)
    leading = vectors[:, -3:]
    along = leading.T @ change.flatten()
    assert float(projection_norm(subspace.spectrum, products, 3)) == pytest.approx(float(along.norm()), rel=1e-9)
    assert float(weighted_norm(subspace.spectrum, products, 3)) == pytest.approx(float((along * values[-3:].sqrt()).norm()), rel=1e-9)


def test_the_whole_model_counts_the_blocks_between_parameters() -> None:
    model, examples = tiny("llama"), completions()
    gram = fisher_gram(model, examples)
    gradients = flat(explicit_gradients(model, examples), gram.names)
    expected = torch.linalg.eigvalsh(gradients @ gradients.T / len(examples)).flip(0)
    torch.testing.assert_close(safe_subspace(gram).spectrum.values, expected, rtol=1e-6, atol=0)
    assert safe_subspace(gram).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "mixtral"])
def test_eigenvectors_can_be_had_in_full(architecture: str) -> None:
    model, examples = tiny(architecture), completions()
    gram = fisher_gram(model, examples)
    subspace = safe_subspace(gram, dimension=3)
    vectors = combined_gradients(model, examples, gram, subspace.coordinates())
    joined = torch.cat([vectors[name].flatten(1) for name in gram.names], 1)
    torch.testing.assert_close(joined @ joined.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-9)
    gradients = flat(explicit_gradients(model, examples), gram.names)
    torch.testing.assert_close(joined @ (gradients.T @ (gradients @ joined.T)) / 5, torch.diag(subspace.spectrum.values[:3]), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("architecture", "memory"), [("llama", 400_000), ("gpt2", 400_000), ("mixtral", 1_000_000)])
def test_a_pass_over_a_hundred_completions_keeps_no_more_than_memory(architecture: str, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many completions there are: more of them are more passes."""
    most = [0]

    class Watched(_Store):
        def emit(self, name: str, found: Contribution) -> None:
            super().emit(name, found)
            tensors = [value for kept in self._kept.values() for some in kept for value in vars(some).values() if isinstance(value, torch.Tensor)]
            whole = {value.data_ptr(): value.nbytes for value in tensors if value.is_floating_point()}
            # All of it is in the arena; whose row each is, a number of 8 bytes, comes on top in rows as short as these.
            assert sum(whole.values()) <= self.arena.used <= 1.3 * memory
            most[0] = max(most[0], sum(whole.values()))

    monkeypatch.setattr("lox_merge.diagnostics.curvature.gram._Store", Watched)
    model = tiny(architecture, torch.float32)

    def gram(count: int) -> FisherGram:
        # Nearly all of a text is its response, but for the shortest one, whose size is what is looked at first.
        examples = completions((9, 7, 12, 12) * count)
        for place, example in enumerate(examples):
            start = len(example["labels"]) - 1 if place % 4 == 1 else 2
            example["labels"] = [-100] * start + example["input_ids"][start:]
        return fisher_gram(model, examples, memory=memory, wanted=lambda name: "1." in name or "lm_head" in name or "wte" in name)

    few, many = gram(3), gram(25)
    assert many.examples == 100 and many.passes > 3 * few.passes
    assert memory / 2 < most[0] <= memory


def test_long_texts_are_formed_row_by_row_and_many_need_not_fit() -> None:
    model, examples = tiny("llama"), completions((60, 50, 64, 33, 64))
    explicit = explicit_gradients(model, examples)
    # Inputs of all texts alone take more than this: 271 tokens of 32 float64 numbers, 69 kB.
    gram = fisher_gram(model, examples, memory=40_000, wanted=lambda name: "layers.0.mlp" in name)
    for name in gram.names:
        gradients = flat(explicit, (name,))
        torch.testing.assert_close(gram.grams[name], gradients @ gradients.T, rtol=1e-9, atol=1e-12)
    with pytest.raises(RequestError, match="Raise --memory"):
        fisher_gram(model, examples, memory=100)


def test_padding_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of one length are taken as they lie; beside a longer one they are picked out of the padding. Blocks share one memory."""
    from lox_merge.diagnostics.curvature import gram as module

    model = tiny("qwen3")
    alike = [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in torch.randint(1, 60, (6, 9)).tolist()]
    row = torch.randint(1, 60, (17,)).tolist()
    together, apart = fisher_gram(model, alike, batch_size=6), fisher_gram(model, [*alike, {"input_ids": row, "labels": row}], batch_size=7)
    monkeypatch.setattr(module, "_BLOCK", 1)
    monkeypatch.setattr(module, "_BLOCK_ROWS", 3)
    blocks = fisher_gram(model, alike, batch_size=6)
    for name in together.names:
        torch.testing.assert_close(apart.grams[name][:6, :6], together.grams[name], rtol=1e-8, atol=1e-14)
        torch.testing.assert_close(blocks.grams[name], together.grams[name], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_half_precision_is_near_and_nothing_of_the_model_changes(architecture: str) -> None:
    model, examples = tiny(architecture, torch.bfloat16), completions()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    gram = fisher_gram(model, examples)
    exact = fisher_gram(copy.deepcopy(model).double(), examples)
    name = next(name for name in gram.names if "o_proj" in name or "c_proj" in name)
    assert float((gram.grams[name] - exact.grams[name]).norm() / exact.grams[name].norm()) < 0.2
    assert gram.grams[name].dtype == torch.float64 and model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_plans_hold_every_row_once_within_memory() -> None:
    generator = random.Random(0)
    for _ in range(300):
        parameters, memory = [], generator.choice((300, 2_000, 50_000))
        for number in range(generator.randint(1, 6)):
            vector = generator.random() < 0.2
            shared, row = (0, 0) if vector else (generator.randint(0, 400), generator.randint(1, 40))
            parameters.append(Measured(str(number), generator.randint(1, 60), 4, generator.randint(0, 3), shared, row, generator.randint(1, 90)))
        known = {parameter.name: parameter for parameter in parameters}
        rows: dict[str, list[int]] = {name: [] for name in known}
        for pieces in plan_passes(parameters, memory):
            assert len({piece.name for piece in pieces}) == len(pieces)
            used, groups = 0, set[int]()
            for piece in pieces:
                parameter = known[piece.name]
                rows[piece.name] += range(piece.first, piece.last)
                used += (piece.last - piece.first) * (parameter.kept_bytes if piece.formed else parameter.row_bytes)
                used += 0 if piece.formed or parameter.group in groups else parameter.shared_bytes
                groups |= set() if piece.formed else {parameter.group}
            assert used <= memory
        assert all(found == list(range(known[name].rows)) for name, found in rows.items())


def test_a_module_that_vmap_cannot_take_is_differentiated_one_by_one() -> None:
    class Stubborn(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.full((32,), 0.7, dtype=torch.float64))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden * self.scale * float(hidden.shape[-1] if hidden.abs().max().item() > 0 else 1)

    model, examples = tiny("llama"), completions()
    model.model.norm = Stubborn()
    gram = fisher_gram(model, examples)
    gradients = flat(explicit_gradients(model, examples), ("model.norm.scale",))
    torch.testing.assert_close(gram.grams["model.norm.scale"], gradients @ gradients.T, rtol=1e-9, atol=1e-12)


def test_nothing_of_a_pass_stays_in_memory() -> None:
    model, examples, seen = tiny("llama"), completions(), list[weakref.ref[torch.Tensor]]()
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs: seen.append(weakref.ref(inputs[0])))
    fisher_gram(model, examples, batch_size=2)
    handle.remove()
    assert len(seen) == 4 and all(reference() is None for reference in seen)


def test_any_number_of_directions_takes_one_forward_and_backward_pass() -> None:
    model, examples = tiny("llama"), completions()
    gram, calls = fisher_gram(model, examples), list[int]()
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    products_with(model, examples, gram, [{name: torch.randn_like(value) for name, value in model.named_parameters()}] * 3, batch_size=2)
    handle.remove()
    assert len(calls) == 3  # five completions, two at a time


def test_hooks_and_settings_are_gone_after_a_failure() -> None:
    model, examples = tiny("llama"), completions()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        fisher_gram(model, examples)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_completion_without_effect_has_zero_gradients_and_null_figures() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token alike: only the head itself has a gradient
    gram = fisher_gram(model, completions())
    subspace = safe_subspace(gram, ("model.layers.0.mlp.up_proj.weight",))
    assert subspace.dimension is None and subspace.spectrum.smallest(subspace.dimension) is None and subspace.spectrum.effective.stable is None
    assert safe_subspace(gram, ("lm_head.weight",)).dimension is not None


def test_wrong_requests_say_so() -> None:
    model, examples = tiny("llama"), completions()
    with pytest.raises(RequestError, match="there are no safe completions"):
        fisher_gram(model, [])
    with pytest.raises(RequestError, match=r"no token of a response in number\(s\) 2"):
        fisher_gram(model, [examples[0], {"input_ids": [5, 6], "labels": [5, -100]}])
    with pytest.raises(RequestError, match="names none of the model's"):
        fisher_gram(model, examples, wanted=lambda name: "layers.9" in name)
    gram = fisher_gram(model, examples, wanted=lambda name: "norm" in name)
    with pytest.raises(RequestError, match="differs in shape"):
        products_with(model, examples, gram, [{"model.norm.weight": torch.zeros(3)}])
    with pytest.raises(RequestError, match="NaN or Inf"):
        products_with(model, examples, gram, [{"model.norm.weight": torch.full((32,), float("nan"))}])
    with pytest.raises(RequestError, match="above 0 and at most 1"):
        safe_subspace(gram, energy=1.5)
    model.is_quantized = True
    with pytest.raises(RequestError, match="quantised"):
        fisher_gram(model, examples)
