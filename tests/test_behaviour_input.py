"""What `behaviour` is given to read: which tokens count, and everything that is refused before weights are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CHAT_TEMPLATE, WORDS, make_pair, tokenizer

import lox_merge
from lox_merge.diagnostics.behaviour import run
from lox_merge.diagnostics.behaviour.texts import Prefix, load_prefixes, prepare
from lox_merge.errors import LoxMergeError, PlanError, RequestError
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import conversations
from lox_merge.safety.outline import Outline

# As Qwen3's: an empty thought before the last answer, and a line break after the end of a turn.
THINKING = (
    "{% for message in messages %}<|{{ message['role'] }}|> {% if loop.last and message['role'] == 'assistant' %}<s> help </s> {% endif %}"
    "{{ message['content'] | trim }} <|end|> yes {% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def asked(*replies: str, name: str = "asked") -> Any:
    return conversations(name, f"{name}.jsonl", [[turn("user", "how do i"), turn("assistant", reply)] for reply in replies])


def read(data: Any, rendering: Rendering | None = None, template: str = CHAT_TEMPLATE) -> list[tuple[str, str]]:
    """What is given and what is scored of every text, in words."""
    words = tokenizer()
    words.chat_template = template
    found = prepare([data], [], rendering or Rendering(), {"one": Outline(words, 96, 64, 2, 32)}, words, 96)
    return [
        (" ".join(WORDS[token] for token in text.tokens[: text.start]), " ".join(WORDS[token] for token in text.scored)) for text in found.sets[0]
    ]


def test_only_the_words_of_the_last_response_are_scored() -> None:
    assert read(asked("sorry i cannot")) == [("<|user|> how do i <|end|> <|assistant|>", "sorry i cannot")]
    several = conversations(
        "x", "x", [[turn("user", "how"), turn("assistant", "no"), turn("user", "do"), turn("assistant", "yes"), turn("user", "i")]]
    )
    assert read(several) == [("<|user|> how <|end|> <|assistant|> no <|end|> <|user|> do <|end|> <|assistant|>", "yes")]
    given = "<|user|> how do i <|end|> yes <|assistant|> <s> help </s>"
    assert read(asked(" sorry i "), template=THINKING) == [(given, "sorry i")]
    assert read(asked(" sorry"), Rendering(chat_template=False)) == [("how do i", "sorry")]
    with_system = Rendering(system="help you")
    assert read(asked("no"), with_system)[0][0].startswith("<|system|> help you".replace("<|system|>", "<unk>"))


def test_of_a_plain_text_all_but_the_first_token_is_scored() -> None:
    text = conversations("x", "x", [[turn("text", "sorry i cannot")]])
    assert read(text, template="") == [("sorry", "i cannot")]


def test_what_cannot_be_read_whole_is_refused_by_its_rows() -> None:
    words = tokenizer()
    words.chat_template = CHAT_TEMPLATE
    outlines = {"base": Outline(words, 96, 12, 2, 32), "aligned": Outline(words, 96, None, 2, 32)}
    data = asked("no", "no " * 7, " ", "yes " * 8)
    with pytest.raises(PlanError) as caught:
        prepare([data], [Prefix("how " * 20)], Rendering(), outlines, words, 96)
    empty, long, prefix = caught.value.problems
    assert "row(s) 3" in empty and "asked.jsonl" in empty
    assert "row(s) 2, 4" in long and "12 that base can see" in long and "14 tokens" in long
    assert "beginnings" in prefix and "1" in prefix
    with pytest.raises(PlanError, match=r"row\(s\) 1: tokens beyond the 10"):
        prepare([asked("sorry")], [], Rendering(), outlines, words, 10)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_pair(tmp_path_factory.mktemp("pair"), "llama", initializer_range=0.3)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any request for a model fails: what is tested has to be seen before."""
    monkeypatch.setattr(run.ModelSet, "get", lambda *_: pytest.fail("weights were loaded"))


def with_tokens(folder: Path, copy: Path, words: dict[str, str]) -> Path:
    """The checkpoint with other names for some tokens."""
    shutil.copytree(folder, copy)
    text = (copy / "tokenizer.json").read_text()
    for old, new in words.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    (copy / "tokenizer.json").write_text(text)
    return copy


@pytest.mark.usefixtures("no_weights")
def test_requests_that_make_no_sense(pair: tuple[Path, Path], tmp_path: Path) -> None:
    refused: list[tuple[str, dict[str, Any]]] = [
        ("nothing to read", {}),
        ("limit of 0", {"pairs": [asked("no")], "limit": 0}),
        ("same name", {"pairs": [asked("no"), asked("yes")]}),
        ("holds no texts", {"pairs": [conversations("none", "none", [])]}),
        ("prompt to go on from is empty", {"next_tokens": [" "]}),
        ("0 most probable", {"next_tokens": ["how"], "top": 0}),
        ("no token of a response", {"pairs": [asked("no", " ")]}),
        ("that base can see", {"pairs": [asked("no " * 70)]}),
        ("that base can see", {"next_tokens": ["how " * 70]}),
        ("not a file", {"pairs": [tmp_path / "absent.jsonl"]}),
    ]
    for message, options in refused:
        with pytest.raises(RequestError, match=message):
            lox_merge.behaviour(*pair, device="cpu", **options)
    with pytest.raises(RequestError, match="'aligned' is taken"):
        lox_merge.behaviour(*pair, {"aligned": pair[1]}, pairs=[asked("no")], device="cpu")
    with pytest.raises(RequestError, match="no chat template"):
        lox_merge.behaviour(pair[1], pair[0], pairs=[asked("no")], device="cpu")
    with pytest.raises(PlanError, match="absent"):
        lox_merge.behaviour(*pair, [tmp_path / "absent"], pairs=[asked("no")], device="cpu")


@pytest.mark.usefixtures("no_weights")
def test_other_vocabularies_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = with_tokens(pair[1], tmp_path / "other", {"sorry": "regret"})
    for shared in (False, True):
        with pytest.raises(RequestError, match="different vocabularies") as caught:
            lox_merge.behaviour(pair[0], other, pairs=[asked("no")], device="cpu", shared_vocabulary=shared)
        assert "--shared-vocabulary" not in str(caught.value)
    larger = make_pair(tmp_path, "llama", aligned_vocabulary=104)
    with pytest.raises(RequestError, match="--shared-vocabulary"):
        lox_merge.behaviour(*larger, pairs=[asked("no")], device="cpu")


def test_the_shared_tokens_of_a_larger_vocabulary(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "llama", "float32", aligned_vocabulary=104, initializer_range=0.3)
    ways = [
        lox_merge.behaviour(*pair, pairs=[asked("sorry i", "no")], next_tokens=["how"], device="cpu", shared_vocabulary=True, one_by_one=way)
        for way in (False, True)
    ]
    assert ways[0].sets[0].shifts == ways[1].sets[0].shifts
    assert ways[0].settings["vocabularies"] == {"base": 96, "aligned": 104} and ways[0].settings["vocabulary"] == 96
    assert any("first 96, renormalised" in note for note in ways[0].notes)


def test_one_text_has_no_interval(pair: tuple[Path, Path]) -> None:
    found = lox_merge.behaviour(*pair, [pair[0]], pairs=[asked("sorry i cannot")], device="cpu").to_json()["sets"][0]
    shift = found["kl_from_base"]["aligned"]
    assert all(position["interval"] is None for position in shift["positions"])
    assert all(share["interval"] is None and share["per_text_interval"] is None for share in shift["shares"])
    assert found["log_probabilities"]["base"]["interval"] is None
    (reversion,) = found["reversion"].values()
    assert reversion["interval"] is None and reversion["median_interval"] is None and reversion["moved_interval"] is None
    assert reversion["index"] == 1.0  # the base model itself


def test_equal_models_have_nothing_between_them(pair: tuple[Path, Path]) -> None:
    (found,) = lox_merge.behaviour(pair[1], pair[1], [pair[1]], pairs=[asked("sorry i", "no")], next_tokens=["how"], device="cpu").sets
    shift = found.shifts["aligned"]
    assert shift.budget == 0 and shift.largest is None
    assert all(share.share is None and share.interval is None and share.per_text is None for share in shift.shares)
    (reversion,) = found.reversions.values()
    assert reversion.index is None and reversion.median is None and reversion.undefined == 2 and reversion.identical
    result = lox_merge.behaviour(pair[1], pair[1], [pair[1]], next_tokens=["how"], device="cpu")
    assert result.next_tokens[0].distances == ((0.0,) * 3,) * 3
    assert result.next_tokens[0].between["aligned (2)"].index is None


def test_limit_takes_the_first_texts(pair: tuple[Path, Path]) -> None:
    data = asked("sorry i", "no", "yes")
    found = lox_merge.behaviour(*pair, pairs=[data], limit=2, device="cpu")
    assert found.sets[0].tokens == [2, 1] and found.settings["limit"] == 2
    assert found.sets[0].data.sha256 != data.sha256


def test_files_of_beginnings(tmp_path: Path) -> None:
    def beginnings(name: str, text: str) -> list[Prefix]:
        (tmp_path / name).write_text(text)
        return load_prefixes(tmp_path / name)

    assert beginnings("a.csv", "prompt,prefill\nhow,yes\ndo,\n") == [Prefix("how", "yes"), Prefix("do")]
    assert beginnings("a.jsonl", '{"text": "sorry i"}\n') == [Prefix("sorry i", plain=True)]
    assert beginnings("a.txt", "how\ndo\n") == [Prefix("how"), Prefix("do")]
    for name, text, message in (
        ("b.csv", "prompt\n", "no beginnings"),
        ("b.jsonl", '{"other": "x"}\n', "no column of prompts"),
        ("c.jsonl", '{"prompt": "x"}\n{"prompt": " "}\n', r"row\(s\) 2"),
        ("d.jsonl", '{"prompt": "x", "prefill": 3}\n', r"row\(s\) 1"),
    ):
        with pytest.raises(LoxMergeError, match=message):
            beginnings(name, text)
    with pytest.raises(RequestError, match="not a file"):
        load_prefixes(tmp_path / "absent.csv")
