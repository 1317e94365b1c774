"""Judges on this machine: keyword lists, local models, functions, inspect_ai scorers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_judges import sequence_classifier, writing_guard

from lox_merge.errors import RequestError, SourceError
from lox_merge.safety.cache import verdict_key
from lox_merge.safety.judges import keyword
from lox_merge.safety.judges.factory import JudgeOptions, make_judge
from lox_merge.safety.reasoning import without_reasoning
from lox_merge.safety.types import Exchange, Judge, Verdict

ASKED = Exchange("v1 a1 n1", "sure c1")
REFUSED = Exchange("v2 a2 n2", "sorry i refuse so")


def successes(judge: Judge, *exchanges: Exchange) -> list[bool | None]:
    return [verdict.success for verdict in judge.judge(exchanges)]


# Keyword lists


def test_keyword_judge_finds_published_phrases_anywhere_and_labels_itself() -> None:
    judge = make_judge("keyword")
    replies = ["I'm sorry, no.", "Well, I cannot.", "I\u2019m sorry", "Gladly: one, two.", "i'm sorry", "", " \n"]
    assert successes(judge, *(Exchange("p", reply) for reply in replies)) == [False, False, False, True, True, None, None]
    assert judge.identity()["label"] == "smoke test"


def test_keyword_lists_are_told_apart() -> None:
    only_zou = Exchange("p", "I would advise another way")
    assert successes(make_judge("keyword:zou2023"), only_zou) == [False]
    assert successes(make_judge("keyword:qi2023"), only_zou) == [True]
    assert make_judge("keyword:zou2023").identity() != make_judge("keyword:qi2023").identity()
    assert (len(keyword.ZOU_2023), len(keyword.QI_2023)) == (10, 29)
    with pytest.raises(RequestError, match="no refusal list 'mine'"):
        make_judge("keyword:mine")


# Reasoning


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<think>why</think>\nanswer", "answer"),
        ("<THINK>a\nb</THINK> answer <think>c</think>", "answer"),
        ("why not</think>answer", "answer"),
        ("<think>never ends", ""),
        (" <reasoning>never ends", ""),
        ("answer <think> goes on", "answer <think> goes on"),
        ("<think></think>", ""),
        ("a < b > c", "a < b > c"),
    ],
)
def test_reasoning_is_taken_out(reply: str, answer: str) -> None:
    assert without_reasoning(reply) == answer


# Local models

TURN = "{{ message['content'] + ' ' }}{% endfor %}"
REFUSES = "{% for message in messages %}{% if message['role'] != 'user' %}{{ raise_exception('no assistants') }}{% endif %}" + TURN


def test_sequence_classifier_agrees_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = sequence_classifier(tmp_path / "harm")
    judge = make_judge(f"classifier:{folder}#harmful", JudgeOptions(device="cpu"))
    exchanges = [Exchange(f"v{i} a{i} n{i}", f"sure c{i % 8} V{i}") for i in range(12)]
    verdicts = judge.judge(exchanges)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for exchange, verdict in zip(exchanges, verdicts, strict=True):
        with torch.no_grad():
            probabilities = model(**tokenizer(exchange.prompt, exchange.reply, return_tensors="pt")).logits.softmax(-1)[0]
        assert verdict.score == pytest.approx(float(probabilities[1]), abs=1e-5)
        assert verdict.success is bool(probabilities[1] > probabilities[0])
    assert {verdict.success for verdict in verdicts} == {True, False}
    other = make_judge(f"classifier:{folder}#harmless", JudgeOptions(device="cpu"))
    assert [verdict.success for verdict in other.judge(exchanges)] == [not verdict.success for verdict in verdicts]
    (long,) = judge.judge([Exchange("v1 " * 300, "sure")])
    assert long.success is None and "more than" in long.explanation
    assert judge.judge([]) == []
    assert str(tmp_path) not in json.dumps(judge.identity()) + judge.name


def test_classifier_identity_follows_its_weights(tmp_path: Path) -> None:
    first = make_judge(f"classifier:{sequence_classifier(tmp_path / 'a' / 'harm', seed=0)}#harmful", JudgeOptions(device="cpu"))
    second = make_judge(f"classifier:{sequence_classifier(tmp_path / 'b' / 'harm', seed=1)}#harmful", JudgeOptions(device="cpu"))
    assert first.name == second.name
    assert verdict_key(first, ASKED) != verdict_key(second, ASKED)


def test_wrong_classifiers_are_refused(tmp_path: Path) -> None:
    folder = sequence_classifier(tmp_path / "harm")
    for text, message in (
        (f"classifier:{folder}", "names no label"),
        (f"classifier:{folder}#bad", "it has harmless, harmful"),
        (f"classifier:{tmp_path / 'nothing'}#x", "no folder"),
        (f"classifier:{tmp_path}#x", "no config.json"),
        (f"classifier:{sequence_classifier(tmp_path / 'reward', labels=('score',))}#score", "one output"),
        (f"classifier:{writing_guard(tmp_path / 'guard', 'c1')}#c1", "two wordings"),
        (f"classifier:{tmp_path / 'guard'}#c1/C1", "two wordings"),
        (f"classifier:{tmp_path / 'guard'}#c1/ ", "two wordings"),
        (f"classifier:{writing_guard(tmp_path / 'asks', 'c1', template=REFUSES)}#c1/c2", "cannot show an exchange: TemplateError: no assistants"),
        (f"classifier:{writing_guard(tmp_path / 'plain', 'c1', template=False)}#c1/c2", "no chat template"),
    ):
        with pytest.raises(RequestError, match=message):
            make_judge(text, JudgeOptions(device="cpu"))


def test_a_classifier_without_its_head_does_not_judge_by_chance(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = sequence_classifier(tmp_path / "harm") / "model.safetensors"
    tensors = load_file(weights)
    del tensors["score.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    judge = make_judge(f"classifier:{weights.parent}#harmful", JudgeOptions(device="cpu"))
    with pytest.raises(SourceError, match=r"lacks weights: score\.weight"):
        judge.judge([ASKED])


@pytest.mark.parametrize("label", ["c1/C2", " C1 / c2 "])
@pytest.mark.parametrize(("writes", "expected"), [("c1", True), ("c2", False), ("c3", None)])
def test_guard_model_writes_its_verdict(tmp_path: Path, writes: str, expected: bool | None, label: str) -> None:
    judge = make_judge(f"classifier:{writing_guard(tmp_path / 'guard', writes)}#{label}", JudgeOptions(device="cpu"))
    verdicts = judge.judge([Exchange("v1", "sure V1"), REFUSED])
    assert [verdict.success for verdict in verdicts] == [expected, expected]
    assert writes in verdicts[0].explanation


def test_a_guard_whose_template_fails_with_a_reply_is_undecided_there(tmp_path: Path) -> None:
    template = "{% for message in messages %}{% if 'a9' in message['content'] %}{{ raise_exception('no a9') }}{% endif %}"
    judge = make_judge(f"classifier:{writing_guard(tmp_path / 'guard', 'c1', template=template + TURN)}#c1/c2", JudgeOptions(device="cpu"))
    bad, good = judge.judge([Exchange("v1", "sure a9"), Exchange("v1", "sure")])
    assert bad.success is None and "chat template failed: TemplateError: no a9" in bad.explanation and good.success is True


def test_a_classifier_takes_its_padding_from_its_tokenizer(tmp_path: Path) -> None:
    exchanges = [Exchange("v1", "sure c1"), Exchange("v1 a2 n3", "sorry")]
    expected = make_judge(f"classifier:{sequence_classifier(tmp_path / 'harm')}#harmful", JudgeOptions(device="cpu")).judge(exchanges)
    config = json.loads((tmp_path / "harm" / "config.json").read_text())
    (tmp_path / "harm" / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    found = make_judge(f"classifier:{tmp_path / 'harm'}#harmful", JudgeOptions(device="cpu")).judge(exchanges)
    assert [verdict.score for verdict in found] == pytest.approx([verdict.score for verdict in expected])


# Functions and inspect_ai scorers

FUNCTIONS = """
import numpy
from inspect_ai.scorer import Score, accuracy, scorer

from lox_merge.safety.types import Verdict

def refused(prompt, reply):
    return not reply.startswith("sorry")

def undecided(prompt, reply):
    return None

def score(prompt, reply):
    return 0.75 if reply.startswith("sure") else 0.25

def whole(prompt, reply):
    return Verdict(True, 4.0, "because")

def broken(prompt, reply):
    raise KeyError(reply)

def nonsense(prompt, reply):
    return "yes"

number = 3

@scorer(metrics=[accuracy()])
def graded():
    async def grade(state, target):
        reply = state.output.completion
        if reply == "crash":
            raise RuntimeError("no grade")
        if reply == "exit":
            raise SystemExit(3)
        if reply == "no score":
            return "yes"
        if reply == "array":
            return Score(value=numpy.array([True, False]))
        values = {"sure c1": "C", "sorry i refuse so": "I", "number": 0.75, "nothing": None}
        assert state.input_text.startswith("v")
        return None if reply == "nothing" else Score(value=values.get(reply, "N"), explanation="graded")
    return grade
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("functions") / "functions.py"
    file.write_text(FUNCTIONS, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("refused", [Verdict(True), Verdict(False)]),
        ("undecided", [Verdict(None, None, "the judge returned None (undecided)")] * 2),
        ("score", [Verdict(True, 0.75), Verdict(False, 0.25)]),
        ("whole", [Verdict(True, 4.0, "because")] * 2),
    ],
)
def test_python_judge_reads_what_a_function_returns(functions: Path, function: str, expected: list[Verdict]) -> None:
    assert make_judge(f"python:{functions}:{function}").judge([ASKED, REFUSED]) == expected


def test_errors_and_nonsense_of_a_function_are_undecided_with_the_reason(functions: Path) -> None:
    (verdict,) = make_judge(f"python:{functions}:broken").judge([ASKED])
    assert verdict == Verdict(None, None, "the judge failed: KeyError: 'sure c1'")
    (verdict,) = make_judge(f"python:{functions}:nonsense").judge([ASKED])
    assert verdict.success is None and "'yes'" in verdict.explanation


ODD_RESULTS = {
    "numpy.float64(0.7)": Verdict(True, 0.7),
    "numpy.float32(0.25)": Verdict(False, 0.25),
    "numpy.bool_(False)": Verdict(False),
    "torch.tensor(1.0)": Verdict(True, 1.0),
    "Verdict(numpy.bool_(True), numpy.float32(0.5), 5)": Verdict(True, 0.5, "5"),
    "10**400": None,
    "float('nan')": None,
    "torch.ones(2)": None,
    "Verdict(True, 'x')": None,
    "Verdict(True, 10**400)": None,
    "Verdict(None, None, 'half \\ud800')": None,
    "Odd()": None,
    "failing(ValueError('caf\\udce9'))": None,
    "failing(Odd())": None,
    "failing(SystemExit(3))": None,
}


@pytest.mark.parametrize("result", ODD_RESULTS)
def test_python_judge_gives_plain_verdicts_whatever_a_function_returns(result: str, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "import numpy, torch\nfrom lox_merge.safety.types import Verdict\n"
        "class Odd(Exception):\n    def __str__(self):\n        raise RuntimeError\n    __repr__ = __str__\n"
        f"def failing(error):\n    raise error\ndef judge(prompt, reply):\n    return {result}\n"
    )
    (verdict,) = make_judge(f"python:{tmp_path / 'odd.py'}:judge").judge([ASKED])
    expected = ODD_RESULTS[result]
    assert verdict.success is None if expected is None else verdict == expected
    text = json.dumps([verdict.success, verdict.score, verdict.explanation], allow_nan=False, ensure_ascii=False)
    assert text.encode() and (verdict.success is not None or verdict.explanation)


def test_python_judge_by_module_name_and_threshold(functions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(functions.parent))
    assert successes(make_judge("python:functions:score", JudgeOptions(threshold=0.2)), ASKED, REFUSED) == [True, True]
    assert make_judge("python:functions:score").name == "python:functions:score"
    assert make_judge(f"python:{functions}:score").name == "python:functions.py:score"


def test_python_judges_that_cannot_be_found_are_named(functions: Path, tmp_path: Path) -> None:
    syntax = tmp_path / "syntax.py"
    syntax.write_text("def (", encoding="utf-8")
    for text, message in (
        ("python:functions", "not module:name"),
        ("python:no_such_module_here:judge", "can't be imported"),
        (f"python:{functions}:absent", "has no 'absent'"),
        (f"python:{functions}:number", "not a function"),
        (f"python:{tmp_path / 'none.py'}:judge", "no file"),
        (f"python:{syntax}:judge", "SyntaxError"),
    ):
        with pytest.raises(RequestError, match=message):
            make_judge(text)


def test_inspect_scorer_judges(functions: Path) -> None:
    judge = make_judge(f"inspect:{functions}:graded")
    replies = ["sure c1", "sorry i refuse so", "number", "else", "nothing", "exit", "no score", "array", "crash"]
    verdicts = judge.judge([Exchange("v1", reply) for reply in replies])
    assert [verdict.success for verdict in verdicts] == [True, False, True, None, None, None, None, None, None]
    assert [verdict.score for verdict in verdicts] == [None, None, 0.75, *[None] * 6]
    assert "SystemExit: 3" in verdicts[5].explanation and "AttributeError" in verdicts[6].explanation
    assert "no grade" in verdicts[-1].explanation
    assert str(functions.parent) not in json.dumps(judge.identity())


def test_registered_inspect_scorer_by_name() -> None:
    judge = make_judge("inspect:inspect_ai/includes")
    assert successes(judge, ASKED) == [True]  # an empty target is in every reply
    for text, message in (("inspect:inspect_ai/absent", "can't be made"), ("inspect:no_such_package_here/x", "can't be imported")):
        with pytest.raises(RequestError, match=message):
            make_judge(text)


def test_unknown_judges_are_refused_with_the_forms_there_are() -> None:
    with pytest.raises(RequestError, match="keyword, classifier:MODEL#LABEL"):
        make_judge("oracle")
    with pytest.raises(RequestError, match="needs a model"):
        make_judge("openai")
