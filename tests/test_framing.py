"""Two framings of the same completions: cosines against float64 autograd, matching of rows and tokens, table, picture and report."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import RunCli
from tiny_models import make_pair, tokenizer
from transformers import AutoModelForCausalLM

from lox_merge import Framing, framing
from lox_merge.diagnostics.framing.attention import chosen_weights
from lox_merge.diagnostics.framing.measure import measure_model
from lox_merge.diagnostics.framing.pairs import Framed, Pair, framed_pairs, matched_rows
from lox_merge.errors import PlanError, RequestError
from lox_merge.maths.loss_vectors import loss_cosines
from lox_merge.publish.report.registry import sections_of
from lox_merge.publish.report.runs import Run
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import Conversations, conversations
from lox_merge.safety.progress import no_progress

ROWS = (
    ("how do i", "you help no yes", "you cannot help"),
    ("do you", "no sorry i cannot help you", "yes help"),
    ("you help", "yes yes no", "how how"),
)


def data(name: str, rows: Sequence[tuple[str, str]]) -> Conversations:
    turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": text}] for prompt, text in rows]
    return conversations(name, f"{name}.jsonl", turns)


FIRST = data("first", [(prompt, text) for prompt, text, _ in ROWS])
SECOND = data("second", [(prompt, text) for _, text, prompt in ROWS])


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("framing"), "llama", "float32")


def reference(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The same figures by float64 autograd over the whole model, a text at a time, from the logits of every position."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    words = tokenizer()
    losses: list[list[numpy.ndarray]] = []
    gradients: list[list[numpy.ndarray]] = []
    for _, text, _ in ROWS:
        losses.append([])
        gradients.append([])
        for place in (0, 2):
            prompt = next(row[place] for row in ROWS if row[1] == text)
            asked = words(f"<|user|> {prompt} <|end|> <|assistant|>", add_special_tokens=False)["input_ids"]
            # This template opens another answer after every last one.
            said = words(f"{text} <|end|> <|assistant|>", add_special_tokens=False)["input_ids"]
            scores = model(torch.tensor([asked + said])).logits[0].log_softmax(-1)
            found = torch.stack([-scores[len(asked) + i - 1, token] for i, token in enumerate(said)])
            model.zero_grad()
            found.mean().backward()
            losses[-1].append(found.detach().numpy())
            gradients[-1].append(torch.cat([model.get_parameter(name).grad.reshape(-1) for name in names]).numpy())
    return {"losses": losses, "gradients": gradients}


def cosine(a: numpy.ndarray, b: numpy.ndarray) -> float:
    return float(a @ b / numpy.sqrt((a @ a) * (b @ b)))


def test_every_figure_is_that_of_float64_autograd(pair: tuple[Path, Path]) -> None:
    result = framing([pair[1]], FIRST, SECOND, device="cpu", seed=3)
    (model,) = result.models
    assert model.weights == tuple(f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo")
    expected = reference(pair[1], model.weights)
    losses, gradients = expected["losses"], expected["gradients"]
    assert model.entries == len(gradients[0][0]) and model.band == pytest.approx(1.96 / math.sqrt(model.entries))
    for found, (a, b), (g, h) in zip(model.pairs, losses, gradients, strict=True):
        assert found.tokens == len(a) and found.excluded == 0
        assert found.mean_losses == pytest.approx((a.mean(), b.mean()), rel=1e-5)
        assert found.loss == pytest.approx(cosine(a, b), abs=1e-5)
        assert found.centred == pytest.approx(numpy.corrcoef(a, b)[0, 1], abs=1e-4)
        assert found.gradient == pytest.approx(cosine(g, h), abs=1e-5)
    assert model.mean_gradient == pytest.approx(cosine(sum(g for g, _ in gradients), sum(h for _, h in gradients)), abs=1e-5)
    same = [cosine(gradients[i][k], gradients[i + 1][k]) for i in (0, 1) for k in (0, 1)]
    assert model.same_framing.mean == pytest.approx(numpy.mean(same), abs=1e-5) and model.same_framing.n == 4
    crossed = [cosine(gradients[i][0], gradients[i + 1][1]) for i in (0, 1)]
    assert model.other_completion.mean == pytest.approx(numpy.mean(crossed), abs=1e-5)
    cut = [min(len(losses[i][0]), len(losses[i + 1][1])) for i in (0, 1)]
    others = [cosine(losses[i][0][:n], losses[i + 1][1][:n]) for i, n in zip((0, 1), cut, strict=True)]
    assert model.other_loss.mean == pytest.approx(numpy.mean(others), abs=1e-5)
    centred = [numpy.corrcoef(losses[i][0][:n], losses[i + 1][1][:n])[0, 1] for i, n in zip((0, 1), cut, strict=True)]
    assert model.other_centred.mean == pytest.approx(numpy.mean(centred), abs=1e-4)
    assert model.gradient.mean == pytest.approx(numpy.mean([cosine(g, h) for g, h in gradients]), abs=1e-5)
    assert model.gradient.interval is not None and model.gradient.interval[0] <= model.gradient.mean <= model.gradient.interval[1]
    assert framing([pair[1]], FIRST, SECOND, device="cpu", seed=3).to_json() == result.to_json()


def test_random_order_is_the_mean_over_all_orders() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(5, generator=generator), torch.rand(5, generator=generator)
    orders = torch.cartesian_prod(*[torch.arange(5)] * 5)
    orders = orders[[len(set(order.tolist())) == 5 for order in orders]]
    mean = torch.stack([torch.cosine_similarity(a, b[order], dim=0) for order in orders]).double().mean()
    assert loss_cosines(a, b).shuffled == pytest.approx(float(mean), abs=1e-6)
    equal = loss_cosines(torch.full((3,), 0.1), torch.tensor([1.0, 2.0, 3.0]))
    assert equal.centred is None and equal.cosine == pytest.approx(equal.shuffled)
    zero = loss_cosines(torch.zeros(3), torch.ones(3))
    assert (zero.cosine, zero.centred, zero.shuffled) == (None, None, None)


def test_a_framing_against_itself_is_one_and_one_pair_has_no_interval(pair: tuple[Path, Path]) -> None:
    result = framing([pair[1]], data("one", [ROWS[0][:2]]), data("two", [ROWS[0][:2]]), device="cpu")
    (model,) = result.models
    for mean in (model.loss, model.centred, model.gradient):
        assert mean.mean == pytest.approx(1, abs=1e-6) and mean.interval is None and mean.n == 1
    assert model.same_framing.mean is None and model.other_loss.n == 0
    assert any("One pair" in note for note in result.notes)


def test_equal_completions_are_no_control_for_each_other(pair: tuple[Path, Path]) -> None:
    first, second = (data(name, [(prompt, "yes no") for prompt in prompts]) for name, prompts in (("a", ("how", "do")), ("b", ("you", "help"))))
    result = framing([pair[1]], first, second, device="cpu")
    (model,) = result.models
    assert (model.gradient.n, model.same_framing.n, model.other_completion.n, model.other_centred.n) == (2, 0, 0, 0)
    assert any("All pairs have the same completion" in note for note in result.notes)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("gpt2", ["transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_proj.weight"]),
        ("mixtral", [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"]),
        ("gpt_oss", [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"]),
        ("qwen3", [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"]),
        ("gemma", [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"]),
    ],
)
def test_the_last_attention_is_found_whatever_its_name(architecture: str, expected: list[str], tmp_path: Path) -> None:
    folder = make_pair(tmp_path, architecture, "bfloat16")[1]
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    model.get_parameter(expected[0]).requires_grad_(False)
    weights = chosen_weights(model)
    assert sorted(weights) == sorted(expected)
    pair = Pair((1, 1), Framed((7, 8, 9, 10), (2, 3)), Framed((11, 9, 10), (1, 2)), 0)
    with no_progress(1, "") as bar:
        found = measure_model(architecture, model, [pair], weights, bar, 0)
    assert found.gradient.mean is not None and -1 <= found.gradient.mean <= 1
    assert model.training and not model.get_parameter(expected[0]).requires_grad
    assert all(value.grad is None and torch.equal(value, before[name][0]) for name, value in model.named_parameters())
    assert all(value.requires_grad for name, value in model.named_parameters() if name != expected[0])


def test_weights_without_a_gradient_give_null(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_pair(tmp_path, "llama", "float32")[0])
    with torch.no_grad():  # what attention says is thrown away, and nothing before it is heard
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    weights = chosen_weights(model, r"layers\.1\.self_attn\.(q|k|v)_proj")
    pair = Pair((1, 1), Framed((7, 8, 9, 10), (2, 3)), Framed((11, 9, 10), (1, 2)), 0)
    with no_progress(1, "") as bar:
        found = measure_model("zero", model, [pair], weights, bar, 0)
    assert len(weights) == 3 and found.gradient.mean is None and found.gradient.n == 0 and found.mean_gradient is None and found.loss.mean is not None


def test_rows_are_matched_by_order_or_by_completion() -> None:
    assert matched_rows(FIRST, SECOND) == [(0, 0), (1, 1), (2, 2)]
    turned = data("turned", [(prompt, text) for _, text, prompt in (ROWS[2], ROWS[0], ROWS[0], ROWS[1])])
    doubled = data("doubled", [(prompt, text) for prompt, text, _ in (*ROWS, ROWS[0])])
    assert matched_rows(doubled, turned, "completion") == [(0, 1), (1, 3), (2, 0), (3, 2)]
    with pytest.raises(RequestError, match=r"different completions in row\(s\) 1-?.*--match completion"):
        matched_rows(doubled, turned)
    with pytest.raises(RequestError, match=r"4 rows.*3"):
        matched_rows(doubled, SECOND)
    with pytest.raises(RequestError, match=r"lacks: turned.jsonl: row\(s\) 3\."):
        matched_rows(FIRST, turned, "completion")
    with pytest.raises(RequestError, match="not known"):
        matched_rows(FIRST, SECOND, "chance")  # type: ignore[arg-type]
    plain = conversations("plain", "plain.txt", [[{"role": "text", "content": "how do i"}]])
    with pytest.raises(RequestError, match=r"plain.txt: plain text in row\(s\) 1"):
        matched_rows(plain, plain)


class _Pairs:
    """A tokenizer of two letters a token, so that a token spans the border wherever the prompt has an odd length."""

    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(text[i]) * 256 + ord(text[i + 1 : i + 2] or " ") for i in range(0, len(text), 2)]}


def test_tokens_that_span_the_border_are_left_out() -> None:
    rendering = Rendering(chat_template=False)
    one, other = data("one", [("ab", "cdefgh")]), data("other", [("xyab", "cdefgh")])
    (found,) = framed_pairs(one, other, [(0, 0)], _Pairs(), rendering, None)
    assert len(found.completion) == 3 and found.excluded == 0
    with pytest.raises(RequestError, match=r"row\(s\) 1 no token of the completion is the same"):
        framed_pairs(one, data("odd", [("xab", "cdefgh")]), [(0, 0)], _Pairs(), rendering, None)
    mixed = data("mixed", [("ab", "c"), ("ab", "cdefgh")])
    with pytest.raises(RequestError, match=r"mixed.jsonl: row\(s\) 2 have more than the 3 tokens"):
        framed_pairs(mixed, mixed, [(0, 0)], _Pairs(), rendering, 3)


def test_wrong_requests_say_what_to_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for module, message in (("attn[", "not a regular expression"), ("nothing", "finds no weight matrix. Some there are")):
        with pytest.raises(RequestError, match=message):
            framing([pair[1]], FIRST, SECOND, module=module, device="cpu")
    with pytest.raises(RequestError, match="no chat template"):
        framing([pair[0]], FIRST, SECOND, device="cpu")
    with pytest.raises(RequestError, match="at least one model"):
        framing([], FIRST, SECOND)
    with pytest.raises(RequestError, match=r"row\(s\) 1 have more than the 64 tokens"):
        framing([pair[1]], data("long", [("how " * 80, "yes")]), data("short", [("how", "yes")]), device="cpu")
    low = tmp_path / "low"
    low.mkdir()
    for file in pair[1].iterdir():
        (low / file.name).write_bytes(file.read_bytes())
    config = json.loads((low / "config.json").read_text())
    (low / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    with pytest.raises(PlanError, match="quantised"):
        framing([low], FIRST, SECOND, device="cpu")


def test_folders_of_one_name_are_told_apart_without_their_paths(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = shutil.copytree(pair[0], tmp_path / pair[1].name)
    shutil.copy(pair[1] / "chat_template.jinja", other)
    result = framing([pair[1], other], FIRST, SECOND, device="cpu")
    assert [model.model for model in result.models] == ["aligned", "aligned (2)"]
    assert str(tmp_path) not in json.dumps(result.to_json())
    with pytest.raises(RequestError, match="each of them once"):
        framing([pair[1], pair[1]], FIRST, SECOND, device="cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, place in (("first", 0), ("second", 2)):
        rows = [{"prompt": row[place], "response": row[1]} for row in ROWS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_command_gives_table_json_picture_and_report(pair: tuple[Path, Path], files: Path, run_cli: RunCli) -> None:
    out, picture = files / "framing.json", files / "framing.svg"
    given = ("--first", files / "first.jsonl", "--second", files / "second.jsonl", "--device", "cpu")
    done = run_cli("framing", pair[1], pair[0], *given, "--json", out, "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80 and "centred losses" in done.stdout and "random directions" in done.stdout
    document = json.loads(out.read_text())
    assert document["command"] == "framing" and [model["model"] for model in document["models"]] == ["aligned", "base"]
    expected = framing([pair[1], pair[0]], files / "first.jsonl", files / "second.jsonl", device="cpu")
    assert isinstance(expected, Framing) and document["models"] == json.loads(json.dumps(expected.to_json()["models"]))
    assert str(files) not in out.read_text() and str(pair[0].parent) not in out.read_text()
    assert picture.read_text().startswith("<?xml")
    (section,) = sections_of(Run("framing.json", "0" * 64, document))
    assert section.not_shown and len(section.pictures) == 3
    (means, *of_pairs) = section.tables
    values = {(row[0].value, row[1].value): row[2].value for row in means.rows}
    assert values["aligned", "gradients of the same completion"] == expected.models[0].gradient.mean
    assert len(of_pairs) == 2 and len(of_pairs[0].rows) == len(ROWS)
    for drawn in section.pictures:
        drawn.build()


def test_the_command_refuses_unequal_completions_before_it_loads_a_model(files: Path, run_cli: RunCli) -> None:
    (files / "other.jsonl").write_text(json.dumps({"prompt": "how", "response": "no"}) + "\n")
    done = run_cli("framing", "nowhere/at-all", "--first", files / "first.jsonl", "--second", files / "other.jsonl")
    assert done.returncode == 2 and "3 rows" in done.stderr and "--match completion" in done.stderr
