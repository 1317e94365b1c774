"""Prompts from files and data sets, and how they reach the model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import CHAT_TEMPLATE, tokenizer
from tokenizers.processors import TemplateProcessing

from lox_merge.errors import RequestError
from lox_merge.lab.tokenizer import build_tokenizer
from lox_merge.safety.chat import Rendering, check_rendering, render
from lox_merge.safety.prompts import load_prompts, prompt_set
from lox_merge.safety.types import Prompt, PromptSet

ADVBENCH = 'goal,target\n"v1 a2 n3, then v2","sure"\nv4 a5 n6,sure\n"v7\na8",sure\n'


def texts(prompts: PromptSet) -> list[str]:
    return [prompt.text for prompt in prompts.prompts]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_takes_the_goal_column_with_commas_and_line_breaks(tmp_path: Path) -> None:
    prompts = load_prompts(str(write(tmp_path, "harmful.csv", "\ufeff" + ADVBENCH)))
    assert texts(prompts) == ["v1 a2 n3, then v2", "v4 a5 n6", "v7\na8"]
    assert [prompt.identity for prompt in prompts.prompts] == ["0", "1", "2"]
    assert prompts.source == "harmful.csv"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b.jsonl", "b.json", "c.txt"])
def test_every_format_gives_the_same_texts(tmp_path: Path, name: str) -> None:
    wanted = ["v1 a2 n3", "v4 « a5 » n6"]
    values: list[Any] = [{"Prompt": text, "other": 1} for text in wanted] if name[0] == "a" else list(wanted)
    if name.endswith(".txt"):
        content = "v1 a2 n3\r\n\r\n  \nv4 « a5 » n6\n"
    elif name.endswith(".jsonl"):
        content = "\n".join(json.dumps(value) for value in values) + "\n\n"
    else:
        content = json.dumps(values)
    assert texts(load_prompts(write(tmp_path, name, content))) == wanted


def test_the_hash_is_of_the_prompts_alone_and_of_each_of_their_parts(tmp_path: Path) -> None:
    first = load_prompts(write(tmp_path, "x.csv", ADVBENCH))
    again = load_prompts(write(tmp_path, "y.jsonl", "\n".join(json.dumps({"goal": text}) for text in texts(first))))
    assert first.sha256 == again.sha256
    document = '[["0","v1 a2 n3, then v2",null],["1","v4 a5 n6",null],["2","v7\\na8",null]]'
    assert first.sha256 == hashlib.sha256(document.encode()).hexdigest()
    one = Prompt("0", "a", None)
    changed = [replace(one, identity="1"), replace(one, text="b"), replace(one, category="c")]
    assert len({prompt_set([prompt], "s").sha256 for prompt in [one, *changed]}) == 4
    assert prompt_set([one], "elsewhere").sha256 == prompt_set([one], "s").sha256


def test_limit_takes_the_first_and_a_seed_a_sample_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path, "many.txt", "\n".join(f"p{i}" for i in range(200)))
    whole = load_prompts(path)
    assert load_prompts(path, limit=5).prompts == whole.prompts[:5]
    sample = load_prompts(path, limit=50, seed=1)
    assert load_prompts(path, limit=50, seed=1) == sample != load_prompts(path, limit=50, seed=2)
    positions = [int(prompt.identity) for prompt in sample.prompts]
    assert positions == sorted(set(positions)) and len(positions) == 50 and positions != list(range(50))
    assert all(prompt in whole.prompts for prompt in sample.prompts)
    assert load_prompts(path, limit=1000, seed=1) == whole
    with pytest.raises(RequestError, match="limit of 0"):
        load_prompts(path, limit=0)


def test_categories_and_ids_are_kept(tmp_path: Path) -> None:
    prompts = load_prompts(write(tmp_path, "x.csv", "id,Category,question\nfirst,c1,v1\nsecond,,v2\n"))
    assert [(p.identity, p.category) for p in prompts.prompts] == [("first", "c1"), ("second", None)]
    with pytest.raises(RequestError, match=r"column id repeats itself in row\(s\) 3"):
        load_prompts(write(tmp_path, "y.csv", "id,question\na,v1\nb,v2\na,v3\n"))


def test_another_column_by_name_and_the_list_of_those_there(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", ADVBENCH)
    assert texts(load_prompts(path, column="target")) == ["sure", "sure", "sure"]
    with pytest.raises(RequestError, match=r"no column 'prompt'.*goal, target"):
        load_prompts(path, column="prompt")
    with pytest.raises(RequestError, match=r"none of the columns goal.*It has: words, target"):
        load_prompts(write(tmp_path, "y.csv", "words,target\na,b\n"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'goal\nx\n""\ny\n\'\n \n', r"goal is empty in row\(s\) 2, 5\."),
        ("b.csv", "goal\n", "holds no prompts"),
        ("c.txt", "\n \n", "holds no prompts"),
        ("d.jsonl", '{"goal": "x"}\n{"goal": 3}\n', r"does not hold text in row\(s\) 2"),
        ("e.jsonl", '{"goal": "x"}\n{"goal\n', "line 2 is not JSON"),
        ("f.json", '{"goal": "x"}', "does not hold a JSON list"),
        ("g.json", '["x", ""]', r"text is empty in row\(s\) 2"),
        ("h.json", '[{"goal": "x"}, "y"]', r"not an object in row\(s\) 2"),
        ("i.csv", "goal,target\nfirst, second, third\n", r"more fields than column names in row\(s\) 1"),
        ("j.csv", 'goal\n"open\n', "not a table"),
        ("k.jsonl", '{"goal": "x"}\n{"other": "y"}\n', r"goal is empty in row\(s\) 2"),
    ],
)
def test_wrong_files_are_refused_by_row(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_prompts(write(tmp_path, name, content))


def test_one_prompt_is_enough(tmp_path: Path) -> None:
    assert len(load_prompts(write(tmp_path, "one.txt", "v1"))) == 1


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no file .*missing\.csv"):
        load_prompts(tmp_path / "missing.csv")
    (tmp_path / "latin.txt").write_bytes("dé".encode("latin-1"))
    with pytest.raises(RequestError, match="UTF-8"):
        load_prompts(tmp_path / "latin.txt")
    with pytest.raises(RequestError, match="no split"):
        load_prompts(write(tmp_path, "x.txt", "v1"), split="train")
    with pytest.raises(RequestError, match="no column"):
        load_prompts(tmp_path / "x.txt", column="goal")


def test_a_data_set_is_read_by_split_and_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself reads it; it takes a relative folder of that name where a Hub data set would be fetched."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    for folder in ("toys/both", "toys/one"):
        (tmp_path / folder).mkdir(parents=True)
    write(tmp_path, "toys/both/train.csv", "prompt,category,other\nv1 a1 n1,c1,x\nv2 a2 n2,c2,y\n")
    write(tmp_path, "toys/both/test.csv", "prompt,category,other\nv3 a3 n3,c3,z\n")
    write(tmp_path, "toys/one/train.csv", "prompt\nv4\n")
    prompts = load_prompts("toys/both", split="train", cache_dir=tmp_path / "cache")
    assert [(p.text, p.category) for p in prompts.prompts] == [("v1 a1 n1", "c1"), ("v2 a2 n2", "c2")]
    assert prompts.source == "toys/both, split train, column prompt"
    assert texts(load_prompts("toys/both", split="test", column="other", cache_dir=tmp_path / "cache")) == ["z"]
    with pytest.raises(RequestError, match=r"has the splits .*test.*Choose one with --split"):
        load_prompts("toys/both", cache_dir=tmp_path / "cache")
    with pytest.raises(RequestError, match=r"no column 'goal'.*prompt, category, other"):
        load_prompts("toys/both", split="train", column="goal", cache_dir=tmp_path / "cache")
    with pytest.raises(RequestError, match="cannot be read"):
        load_prompts("toys/both", split="nothing", cache_dir=tmp_path / "cache")
    assert texts(load_prompts("toys/one", cache_dir=tmp_path / "cache")) == ["v4"]


def test_a_hub_data_set_that_cannot_be_reached_says_so() -> None:
    pytest.importorskip("datasets")
    with pytest.raises(RequestError, match=r"data set nobody-xyz/nothing@v1 cannot be read"):
        load_prompts("nobody-xyz/nothing@v1", split="train")


def with_bos() -> transformers.PreTrainedTokenizerFast:
    """As Llama's: the tokenizer itself puts <s> before every text, and so does its template."""
    words = tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    words.chat_template = "{{ bos_token + ' ' }}" + CHAT_TEMPLATE
    return words


def test_the_template_renders_once_without_a_second_bos() -> None:
    words = with_bos()
    assert words("how")["input_ids"] == [1, 6]
    assert words.convert_ids_to_tokens(render(words, "how do", Rendering())) == ["<s>", "<|user|>", "how", "do", "<|end|>", "<|assistant|>"]
    assert (
        render(words, "how do", Rendering())
        == words.apply_chat_template([{"role": "user", "content": "how do"}], add_generation_prompt=True)["input_ids"]
    )
    assert words.convert_ids_to_tokens(render(words, "how do", Rendering(chat_template=False))) == ["<s>", "how", "do"]


def test_a_tokenizer_that_closes_texts_does_not_close_prompts() -> None:
    words = with_bos()
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    assert render(words, "how do", Rendering(chat_template=False)) == [1, 6, 7]


def test_system_and_prefill() -> None:
    words = tokenizer()
    words.chat_template = (
        "{% set heads = {'user': '<|user|>', 'assistant': '<|assistant|>', 'system': 'help'} %}"
        "{% for message in messages %}{{ heads[message.role] }} {{ message.content }} <|end|> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    full = Rendering(system="you help", prefill="yes i")
    check_rendering(words, full)
    rendered = words.convert_ids_to_tokens(render(words, "how do", full))
    assert rendered == ["help", "you", "help", "<|end|>", "<|user|>", "how", "do", "<|end|>", "<|assistant|>", "yes", "i"]
    raw = render(words, "how do", Rendering(chat_template=False, prefill=" yes"))
    assert words.convert_ids_to_tokens(raw) == ["how", "do", "yes"]


def test_the_toy_template_takes_a_prefill_as_the_model_was_trained() -> None:
    words = build_tokenizer(chat=True)
    assert words.convert_ids_to_tokens(render(words, "v1 a2 n3", Rendering(prefill="sure"))) == ["<bos>", "v1", "a2", "n3", "=>", "sure"]


def test_renderings_that_cannot_be_are_refused_before_any_work() -> None:
    bare, chat = tokenizer(), build_tokenizer(chat=True)
    with pytest.raises(RequestError, match="--no-chat-template"):
        check_rendering(bare, Rendering())
    check_rendering(bare, Rendering(chat_template=False))
    with pytest.raises(RequestError, match="--system"):
        check_rendering(bare, Rendering(chat_template=False, system="x"))
    with pytest.raises(RequestError, match="only user and assistant messages"):
        check_rendering(chat, Rendering(system="x"))
    chat.chat_template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(RequestError, match="drops system messages"):
        check_rendering(chat, Rendering(system="x"))


def test_text_outside_the_tokenizer_is_an_error_with_the_prompt() -> None:
    chat = build_tokenizer(chat=True)
    with pytest.raises(RequestError, match="unknownword"):
        render(chat, "unknownword", Rendering())
    with pytest.raises(RequestError, match="no tokens"):
        render(tokenizer(), " ", Rendering(chat_template=False))
