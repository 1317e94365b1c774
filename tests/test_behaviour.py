"""Every figure of `behaviour` against a direct float64 computation on a tiny model, in both ways of visiting models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from adapters import load_model, make_adapter, merge
from scipy.spatial.distance import jensenshannon
from tiny_models import WORDS, make_pair, read_tensors, tokenizer

import lox_merge
from lox_merge.diagnostics.behaviour import spool
from lox_merge.diagnostics.behaviour.next_tokens import next_tokens
from lox_merge.diagnostics.behaviour.passes import Scores
from lox_merge.diagnostics.behaviour.reversion import reversion
from lox_merge.diagnostics.behaviour.shift import shift
from lox_merge.diagnostics.behaviour.texts import Prefix
from lox_merge.errors import NumericalError, RequestError
from lox_merge.maths.distributions import entropy, kl_divergence, restricted
from lox_merge.safety.conversations import Conversations, conversations
from lox_merge.safety.loading import LoadedModel, in_memory
from lox_merge.safety.loading import load_model as load

REPLIES = ("sorry i cannot", "no", "yes i help you", "sorry i cannot help")
TOKEN = {word: number for number, word in enumerate(WORDS)}


def pairs(name: str = "asked", replies: tuple[str, ...] = REPLIES, prompt: str = "how do i") -> Conversations:
    turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}] for reply in replies]
    return conversations(name, f"{name}.jsonl", turns)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base, aligned, and an adapter over aligned."""
    base, aligned = make_pair(tmp_path_factory.mktemp("models"), "llama", "float32", change=0.6, initializer_range=0.3)
    adapter = make_adapter(aligned, base.parent / "finetuned", target_modules=["q_proj", "down_proj"])
    return {"base": base, "aligned": aligned, "finetuned": adapter}


@pytest.fixture(scope="module")
def measured(models: dict[str, Path]) -> lox_merge.Behaviour:
    return lox_merge.behaviour(
        models["base"],
        models["aligned"],
        [models["finetuned"]],
        pairs=[pairs(), pairs("other", ("help you", "you"))],
        next_tokens=["how do i", lox_merge.Prefix("how do", "no"), lox_merge.Prefix("sorry i", plain=True)],
        top=3,
        device="cpu",
    )


def numbers(text: str) -> list[int]:
    return [TOKEN[word] for word in text.split()]


def rendered(reply: str) -> list[int]:
    return numbers(f"<|user|> how do i <|end|> <|assistant|> {reply}")


@torch.no_grad()
def expected(models: dict[str, Path], tokens: list[int]) -> dict[str, torch.Tensor]:
    """(len(tokens), vocabulary) float64 log-probabilities by model."""
    loaded = {"base": load_model(models["base"]), "aligned": load_model(models["aligned"]), "finetuned": load_model(models["aligned"])}
    loaded["finetuned"].load_state_dict(merge(models["aligned"], models["finetuned"]), strict=False)
    return {label: model.double()(torch.tensor([tokens])).logits[0].log_softmax(-1) for label, model in loaded.items()}


def by_hand(models: dict[str, Path], reply: str) -> dict[str, dict[str, torch.Tensor]]:
    tokens = rendered(reply)
    count = len(reply.split())
    found = {label: values[-count - 1 : -1] for label, values in expected(models, tokens).items()}
    return {
        label: {
            "log p": values.gather(1, torch.tensor(tokens[-count:])[:, None])[:, 0],
            "entropy": -(values.exp() * values).sum(-1),
            "kl": (values.exp() * (values - found["base"])).sum(-1),
        }
        for label, values in found.items()
    }


def test_every_token_of_every_text(models: dict[str, Path], measured: lox_merge.Behaviour) -> None:
    assert measured.models == ("base", "aligned", "finetuned")
    for number, reply in enumerate(REPLIES):
        for label, figures in by_hand(models, reply).items():
            scores = measured.sets[0].scores[label][number]
            numpy.testing.assert_allclose(scores.log_probabilities, figures["log p"], atol=1e-5)
            numpy.testing.assert_allclose(scores.entropy, figures["entropy"], atol=1e-5)
            if label == "base":
                assert scores.divergence is None
            else:
                assert scores.divergence is not None
                numpy.testing.assert_allclose(scores.divergence, figures["kl"], atol=1e-5)
    assert measured.sets[1].tokens == [2, 1]


def test_kl_by_place_and_its_shares(models: dict[str, Path], measured: lox_merge.Behaviour) -> None:
    rows = [by_hand(models, reply)["aligned"]["kl"].tolist() for reply in REPLIES]
    shift = measured.sets[0].shifts["aligned"]
    at = [[row[t] for row in rows if len(row) > t] for t in range(4)]
    means = [sum(values) / len(values) for values in at]
    assert [position.n for position in shift.positions] == [4, 3, 3, 2]
    assert [position.t for position in shift.positions] == [1, 2, 3, 4]
    assert [position.kl for position in shift.positions] == pytest.approx(means, abs=1e-5)
    assert shift.budget == pytest.approx(sum(means), abs=1e-5)
    assert shift.per_token == pytest.approx(sum(map(sum, rows)) / 12, abs=1e-5)
    assert shift.largest == means.index(max(means)) + 1
    for share, first in zip(shift.shares, (1, 3, 5), strict=True):
        assert share.first == first
        assert share.share == pytest.approx(sum(means[:first]) / sum(means), abs=1e-6)
        assert share.even == min(first, 4) / 4
        assert share.per_text == pytest.approx(sum(sum(row[:first]) / sum(row) for row in rows) / 4, abs=1e-6)
        assert share.per_text_even == pytest.approx(sum(min(first, len(row)) / len(row) for row in rows) / 4)
        assert share.interval is not None and share.share is not None
        assert share.interval[0] - 1e-9 <= share.share <= share.interval[1] + 1e-9
    assert shift.shares[2].interval == pytest.approx((1.0, 1.0))
    entropies = [by_hand(models, reply)["aligned"]["entropy"].tolist() for reply in REPLIES]
    assert shift.positions[3].entropy == pytest.approx((entropies[2][3] + entropies[3][3]) / 2, abs=1e-6)


def test_the_largest_place_is_one_that_half_of_the_texts_have() -> None:
    """A single long text does not decide where alignment is deepest."""
    rows = [[1.0, 0.2], [0.8, 0.3], [0.9, 0.1], [0.7, 0.2, 9.0]]
    found = shift([Scores(numpy.zeros(len(row)), numpy.zeros(len(row)), numpy.array(row)) for row in rows], seed=0)
    assert found.largest == 1 and found.positions[2].kl == 9 and found.positions[2].n == 1
    assert found.budget == pytest.approx(0.85 + 0.2 + 9)
    nowhere = shift([Scores(numpy.zeros(2), numpy.zeros(2), numpy.zeros(2))] * 2, seed=0)
    assert nowhere.largest is None and nowhere.shares[0].share is None


def test_differences_that_cancel_over_texts_leave_no_index() -> None:
    """Each text has its own, and their sum means nothing where aligned and base differ both ways."""
    aligned, base = [numpy.array([-2.0]), numpy.array([-6.0])], [numpy.array([-6.0]), numpy.array([-2.3])]
    model = [numpy.array([-4.0]), numpy.array([-4.0])]
    whole, texts = reversion(model, aligned, base, seed=0)
    assert whole.gap == pytest.approx(0.15) and whole.index is None and whole.interval is None
    assert [text.index for text in texts] == pytest.approx([0.5, 2 / 3.7]) and whole.n == 2
    assert reversion(model[:1], aligned[:1], base[:1], seed=0)[0].index == pytest.approx(0.5)


def test_between_models_that_hardly_differ_nothing_lies() -> None:
    near = torch.tensor([0.5, 0.5]).log()
    for aside, known in ((0.02, False), (0.4, True)):
        other = torch.tensor([0.5 + aside, 0.5 - aside]).log()
        found = next_tokens(Prefix("how"), 1, {"base": other, "aligned": near, "it": near}, tokenizer(), top=2)
        between = found.between["it"]
        assert (between.index is not None) == known and (between.detour is not None) == known
        assert between.to_aligned == 0 and between.to_base > 0


def test_the_interval_of_a_share_is_over_texts(measured: lox_merge.Behaviour) -> None:
    """The same by hand: texts drawn again and again, means at each place over those drawn that reach it."""
    table = [found.divergence for found in measured.sets[0].scores["aligned"]]
    generator, drawn = numpy.random.default_rng(5), []
    for _ in range(4000):
        rows = [table[number] for number in generator.integers(0, len(table), len(table))]
        means = [numpy.mean([row[t] for row in rows if row is not None and len(row) > t] or [0.0]) for t in range(4)]
        drawn.append(means[0] / sum(means))
    share = measured.sets[0].shifts["aligned"].shares[0]
    assert share.interval == pytest.approx(tuple(numpy.percentile(drawn, [2.5, 97.5])), abs=0.02)


def test_reversion_is_where_a_model_lies(models: dict[str, Path], measured: lox_merge.Behaviour) -> None:
    sums = [{label: float(figures["log p"].sum()) for label, figures in by_hand(models, reply).items()} for reply in REPLIES]
    found = measured.sets[0].reversions["finetuned"]
    own = [(one["aligned"] - one["finetuned"]) / (one["aligned"] - one["base"]) for one in sums]
    assert [text.index for text in measured.sets[0].text_reversions["finetuned"]] == pytest.approx(own, abs=1e-4)
    gap, moved = (sum(one["aligned"] - one[label] for one in sums) for label in ("base", "finetuned"))
    assert found.index == pytest.approx(moved / gap, abs=1e-4)
    assert (found.gap, found.moved) == pytest.approx((gap / 4, moved / 4), abs=1e-5)
    assert found.median == pytest.approx(float(numpy.median(own)), abs=1e-4)
    assert (found.n, found.undefined, found.outside) == (4, 0, sum(not 0 <= one <= 1 for one in own))
    likelihood = measured.sets[0].likelihoods["finetuned"]
    assert likelihood.joint == pytest.approx(sum(one["finetuned"] for one in sums) / 4, abs=1e-5)
    assert likelihood.per_token == pytest.approx(sum(one["finetuned"] for one in sums) / 12, abs=1e-5)
    assert measured.sets[0].text_reversions["finetuned"][1].interval is None  # a single token
    assert not found.identical


def test_next_tokens(models: dict[str, Path], measured: lox_merge.Behaviour) -> None:
    asked = [rendered(""), numbers("<|user|> how do <|end|> <|assistant|> no"), numbers("sorry i")]
    for found, tokens in zip(measured.next_tokens, asked, strict=True):
        after = {label: values[-1].exp().numpy() for label, values in expected(models, tokens).items()}
        assert found.tokens == len(tokens)
        union = {int(number) for values in after.values() for number in numpy.argsort(-values)[:3]}
        assert {candidate.token for candidate in found.candidates} == union
        most = [max(candidate.probabilities.values()) for candidate in found.candidates]
        assert most == sorted(most, reverse=True)
        for candidate in found.candidates:
            for label, probability in candidate.probabilities.items():
                assert probability == pytest.approx(after[label][candidate.token], rel=1e-5)
        for label, value in found.entropies.items():
            assert value == pytest.approx(-(after[label] * numpy.log(after[label])).sum(), abs=1e-5)
        for row, one in zip(found.distances, measured.models, strict=True):
            for distance, other in zip(row, measured.models, strict=True):
                assert distance == pytest.approx(jensenshannon(after[one], after[other]), abs=1e-5)
        between, labels = found.between["finetuned"], measured.models
        near, far = (found.distances[2][labels.index(label)] for label in ("aligned", "base"))
        assert (between.to_aligned, between.to_base) == (near, far)
        if found.distances[0][1] >= 0.1:
            assert between.index == near / (near + far) and between.detour == (near + far) / found.distances[0][1]
        else:
            assert between.index is None and between.detour is None
    assert any(found.between["finetuned"].index is not None for found in measured.next_tokens)


def without_way(result: lox_merge.Behaviour) -> dict[str, Any]:
    document = result.to_json()
    return {**document, "settings": {key: value for key, value in document["settings"].items() if key != "one_by_one"}}


def test_one_after_another_gives_the_same_numbers(models: dict[str, Path], measured: lox_merge.Behaviour) -> None:
    said: list[str] = []
    again = lox_merge.behaviour(
        models["base"],
        models["aligned"],
        [models["finetuned"]],
        pairs=[pairs(), pairs("other", ("help you", "you"))],
        next_tokens=["how do i", lox_merge.Prefix("how do", "no"), lox_merge.Prefix("sorry i", plain=True)],
        top=3,
        device="cpu",
        one_by_one=True,
        report=said.append,
    )
    assert (measured.settings["one_by_one"], again.settings["one_by_one"]) == (False, True)
    assert without_way(again) == without_way(measured)
    assert "temporary disk" in said[0]


def test_models_in_memory_are_read_and_left_as_they_are(models: dict[str, Path], measured: lox_merge.Behaviour) -> None:
    held = {label: load(models[label], device="cpu") for label in ("base", "aligned")}
    held["aligned"].model.train()
    for one_by_one in (False, True):
        found = lox_merge.behaviour(held["base"], held["aligned"], pairs=[pairs()], device="cpu", one_by_one=one_by_one)
        assert found.sets[0].shifts["aligned"] == measured.sets[0].shifts["aligned"]
    assert held["aligned"].model.training
    for label, loaded in held.items():
        stored = read_tensors(models[label])
        state = loaded.model.state_dict()
        assert all(torch.equal(state[name], values) for name, values in stored.items())


def test_one_forward_pass_per_model_and_batch(models: dict[str, Path]) -> None:
    held = {label: load(models[label], device="cpu") for label in ("base", "aligned")}
    passes: dict[str, int] = dict.fromkeys(held, 0)
    for label, loaded in held.items():

        def count(*_: object, label: str = label) -> None:
            passes[label] += 1

        loaded.model.register_forward_pre_hook(count)
    lox_merge.behaviour(held["base"], held["aligned"], pairs=[pairs()], next_tokens=["how"], batch_size=2)
    assert passes == {"base": 3, "aligned": 3}  # 4 texts and 1 prefix, 2 at a time


class Stop:
    """Progress that ends after some texts, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, total: int, what: str) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, count: int) -> None:
        self.left -= count
        if self.left <= 0:
            raise KeyboardInterrupt


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(spool.tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def test_nothing_is_left_on_disk_and_weights_stay_when_interrupted(models: dict[str, Path], scratch: Path) -> None:
    aligned = load(models["aligned"], device="cpu")
    for after in (2, 6):
        with pytest.raises(KeyboardInterrupt):
            lox_merge.behaviour(models["base"], aligned, pairs=[pairs()], device="cpu", one_by_one=True, progress=Stop(after))
    state = aligned.model.state_dict()
    assert all(torch.equal(state[name], values) for name, values in read_tensors(models["aligned"]).items())


def test_a_full_disk_is_seen_before(models: dict[str, Path], scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = spool.shutil.disk_usage(scratch)
    monkeypatch.setattr(spool.shutil, "disk_usage", lambda _folder: usage._replace(free=4000))
    with pytest.raises(RequestError, match="TMPDIR"):
        lox_merge.behaviour(models["base"], models["aligned"], pairs=[pairs()], device="cpu", one_by_one=True)
    lox_merge.behaviour(models["base"], models["aligned"], pairs=[pairs()], device="cpu", one_by_one=False)


def test_sixteen_bit_models_are_widened(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "qwen3", "bfloat16", change=0.6, initializer_range=0.3)
    found = lox_merge.behaviour(base, aligned, pairs=[pairs()], device="cpu", batch_size=1)
    assert found.settings["dtypes"] == {"base": "bfloat16", "aligned": "bfloat16"}
    assert any("--dtype float32" in note for note in found.notes)
    tokens = torch.tensor([rendered(REPLIES[0])[:-1]])
    with torch.no_grad():
        one, other = (load(folder, device="cpu").model(tokens).logits[0, -3:].double().log_softmax(-1) for folder in (aligned, base))
    divergence = found.sets[0].scores["aligned"][0].divergence
    assert divergence is not None
    numpy.testing.assert_allclose(divergence, (one.exp() * (one - other)).sum(-1), rtol=1e-5)


def test_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(150, 40, generator=generator).log_softmax(-1) for _ in range(2))
    exact = (p.double().exp() * (p.double() - q.double())).sum(-1)
    torch.testing.assert_close(kl_divergence(p, q), exact, atol=1e-6, rtol=0)
    torch.testing.assert_close(entropy(p), -(p.double().exp() * p.double()).sum(-1), atol=1e-6, rtol=0)
    assert kl_divergence(p, p).eq(0).all()
    uniform = torch.full((1, 8), -math.log(8.0))
    assert float(entropy(uniform)) == pytest.approx(math.log(8))
    ruled_out = torch.tensor([[0.5, 0.5, 0.0]]).log()
    other = torch.tensor([[0.25, 0.25, 0.5]]).log()
    assert float(kl_divergence(ruled_out, other)) == pytest.approx(math.log(2))
    assert float(entropy(ruled_out)) == pytest.approx(math.log(2))
    assert not bool(torch.isfinite(kl_divergence(other, ruled_out)).all())
    assert restricted(p, 40) is p
    torch.testing.assert_close(restricted(p, 7).exp().sum(-1), torch.ones(150))


def test_a_model_that_rules_out_a_token_is_named(models: dict[str, Path]) -> None:
    class Sure(torch.nn.Module):
        """An output head that never says token 14."""

        def __init__(self, head: Any) -> None:
            super().__init__()
            self.head, self.weight = head, head.weight

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.head(hidden)
            scores[..., TOKEN["cannot"]] = -torch.inf
            return scores

    base = load(models["base"], device="cpu")
    base.model.lm_head = Sure(base.model.lm_head)
    with pytest.raises(NumericalError, match=r"not finite in row 3 of asked\.jsonl"):
        lox_merge.behaviour(base, models["aligned"], pairs=[pairs()], device="cpu", batch_size=1)


def test_in_memory_labels(models: dict[str, Path]) -> None:
    held = load(models["aligned"], device="cpu")
    made: LoadedModel = in_memory(held.model, tokenizer(), "made")
    found = lox_merge.behaviour(models["base"], held, {"mine": made}, pairs=[pairs()], device="cpu")
    assert found.models == ("base", "aligned", "mine")
    assert found.sources["mine"] == {"title": "made", **made.source}
    reversion = found.sets[0].reversions["mine"]
    assert (reversion.index, reversion.interval, reversion.median, reversion.identical) == (0.0, (0.0, 0.0), 0.0, True)
    assert any("mine gives every token exactly" in note for note in found.notes)
