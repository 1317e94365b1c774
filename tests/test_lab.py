"""The toy laboratory: its language and its checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_cli import run_forked
from lab_fixtures import QUICK_RECIPE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lox_merge.errors import OutputError, RecipeError
from lox_merge.lab import language
from lox_merge.lab.checkpoints import ToyPair, default_cache_dir, recipe_hash, toy_pair, train_pair
from lox_merge.lab.fine_tuning_sets import fine_tuning_sets
from lox_merge.lab.language import Request
from lox_merge.lab.models import build_model
from lox_merge.lab.recipe import ToyRecipe, Training
from lox_merge.lab.requests import draw_requests
from lox_merge.lab.tokenizer import build_tokenizer
from lox_merge.lab.training import IGNORED, learning_rate_at, pack
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import tokenised

State = dict[str, torch.Tensor]


def folder_state(folder: Path) -> State:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def bytes_of(folder: Path) -> dict[str, str]:
    """sha256 of every file under a folder, by relative name."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- language and data


def test_training_and_test_requests_do_not_meet() -> None:
    requests = draw_requests(ToyRecipe(seed=3))
    tests = set(requests.tests.seen) | set(requests.tests.unseen) | set(requests.tests.allowed)
    trained = set(requests.pretraining) | set(requests.alignment_forbidden) | set(requests.alignment_allowed)
    trained |= set(requests.benign) | set(requests.harmful)
    assert len(tests) == 600
    assert not tests & trained
    taught_nouns = {request.noun for request in requests.alignment_forbidden}
    assert {request.noun for request in requests.tests.seen} <= taught_nouns
    assert not {request.noun for request in requests.tests.unseen} & (taught_nouns | {request.noun for request in requests.harmful})
    assert all(request.noun % 8 in (0, 1) for request in requests.tests.seen + requests.tests.unseen + requests.harmful)
    assert all(request.noun % 8 > 1 for request in requests.tests.allowed + requests.alignment_allowed + requests.benign)


def test_requests_follow_the_seed_and_nothing_else() -> None:
    first = draw_requests(ToyRecipe(seed=1))
    random.seed(99)
    assert draw_requests(ToyRecipe(seed=1)) == first
    assert draw_requests(ToyRecipe(seed=2)).tests != first.tests


def test_the_loss_counts_answers_only() -> None:
    request = Request(3, 7, 12)
    examples = pack([(language.prompt(request), language.refuse(request))])
    words = [language.VOCABULARY[index] for index in examples.tokens[0].tolist()]
    assert words == ["<bos>", "v3", "a7", "n12", "=>", "sorry", "i", "refuse", "so", "<eos>", "<pad>"]
    assert examples.targets[0].tolist() == [IGNORED] * 5 + language.encode(["sorry", "i", "refuse", "so", "<eos>"]) + [IGNORED]


def test_learning_rate_warms_up_and_decays() -> None:
    cosine = Training(steps=110, learning_rate=2.0, batch_size=1, warmup_steps=10)
    assert [learning_rate_at(step, cosine) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert learning_rate_at(60, cosine) == pytest.approx(1.0)
    assert learning_rate_at(110, cosine) == pytest.approx(0.0)
    assert learning_rate_at(109, replace(cosine, decay="constant")) == 2.0


@pytest.mark.parametrize(
    "settings", [{"seed": -1}, {"hidden_size": 36}, {"layers": 0}, {"dtype": "int8"}, {"alignment_forbidden": 0}], ids=lambda s: next(iter(s))
)
def test_impossible_recipes_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        ToyRecipe(**settings)
    with pytest.raises(RecipeError):
        Training(steps=0, learning_rate=1.0, batch_size=1, warmup_steps=1)


# --- checkpoints


@pytest.fixture(scope="module")
def quick_pair(tmp_path_factory: pytest.TempPathFactory) -> ToyPair:
    return train_pair(QUICK_RECIPE, tmp_path_factory.mktemp("quick"))


def test_checkpoints_are_sharded_and_load_as_ordinary_ones(toy_pair_seed0: ToyPair) -> None:
    for folder in (toy_pair_seed0.base, toy_pair_seed0.aligned):
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) >= 3
        assert all(value.dtype == torch.float32 for value in folder_state(folder).values())
    tokenizer = AutoTokenizer.from_pretrained(toy_pair_seed0.aligned)
    model = AutoModelForCausalLM.from_pretrained(toy_pair_seed0.aligned)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.num_parameters() == 158_656
    assert model.generation_config.do_sample is False
    tests = draw_requests(ToyRecipe()).tests
    conversations = [[{"role": "user", "content": request.text}] for request in (tests.allowed[0], tests.seen[0])]
    inputs = tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True)
    answers = tokenizer.batch_decode(model.generate(**inputs)[:, inputs["input_ids"].shape[1] :])
    assert answers[0].removesuffix(" <pad>") == " ".join(language.comply(tests.allowed[0]))
    assert answers[1].removesuffix(" <pad>") == "sorry i refuse so <eos>"


def test_chat_template_renders_the_training_prompt(quick_pair: ToyPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(quick_pair.aligned)
    request = Request(3, 7, 12)
    user = {"role": "user", "content": "v3 a7 n12"}
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == "<bos> v3 a7 n12 =>"
    ids = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == language.encode(language.prompt(request))
    answer = language.comply(request)
    answered = [user, {"role": "assistant", "content": " ".join(answer[:-1])}]
    ids = tokenizer.apply_chat_template(answered, return_dict=True)["input_ids"]
    assert ids == language.encode(language.prompt(request) + answer)
    with pytest.raises(Exception, match="only user and assistant"):
        tokenizer.apply_chat_template([{"role": "system", "content": "v1"}, user], tokenize=False)
    assert AutoTokenizer.from_pretrained(quick_pair.base).chat_template is None


def test_tokenizer_is_the_language(quick_pair: ToyPair) -> None:
    tokenizer = AutoTokenizer.from_pretrained(quick_pair.base)
    assert tokenizer.get_vocab() == language.TOKEN
    assert tokenizer(" ".join(language.VOCABULARY))["input_ids"] == list(range(len(language.VOCABULARY)))
    assert tokenizer.decode(language.encode(["sure", "c4", "N12", "<eos>"]), skip_special_tokens=True) == "sure c4 N12"
    with pytest.raises(Exception, match="UNK"):
        tokenizer("how are you")


def test_the_same_recipe_gives_the_same_bytes(quick_pair: ToyPair, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    again = train_pair(QUICK_RECIPE, tmp_path / "again")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert bytes_of(again.base) == bytes_of(quick_pair.base)
    assert bytes_of(again.aligned) == bytes_of(quick_pair.aligned)
    other = train_pair(replace(QUICK_RECIPE, seed=1), tmp_path / "other")
    same, different = folder_state(quick_pair.aligned), folder_state(other.aligned)
    assert not any(torch.equal(same[name], different[name]) for name in same if same[name].ndim == 2)


def test_alignment_changes_the_base_model(quick_pair: ToyPair) -> None:
    base, aligned = folder_state(quick_pair.base), folder_state(quick_pair.aligned)
    assert base.keys() == aligned.keys()
    assert not any(torch.equal(base[name], aligned[name]) for name in base)


def test_bfloat16_pairs_are_the_float32_ones_rounded(quick_pair: ToyPair, tmp_path: Path) -> None:
    pair = train_pair(replace(QUICK_RECIPE, dtype="bfloat16"), tmp_path)
    stored, exact = folder_state(pair.aligned), folder_state(quick_pair.aligned)
    assert len(list(pair.aligned.glob("*.safetensors"))) >= 3
    assert json.loads((pair.aligned / "config.json").read_text())["dtype"] == "bfloat16"
    for name, value in stored.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, exact[name].to(torch.bfloat16))


def test_the_cache_is_reused_and_repaired(tmp_path: Path) -> None:
    said: list[str] = []
    pair = toy_pair(QUICK_RECIPE, tmp_path, said.append)
    assert len(said) == 2
    before = bytes_of(pair.base.parent)
    assert toy_pair(QUICK_RECIPE, tmp_path, said.append) == pair
    assert len(said) == 2
    next(pair.aligned.glob("*.safetensors")).unlink()
    assert toy_pair(QUICK_RECIPE, tmp_path, said.append) == pair
    assert len(said) == 4
    assert bytes_of(pair.base.parent) == before
    assert {path.suffix for path in tmp_path.iterdir()} <= {"", ".lock"}, "no unfinished folder stays"
    assert len({recipe_hash(recipe) for recipe in (QUICK_RECIPE, replace(QUICK_RECIPE, seed=1), ToyRecipe())}) == 3


def test_a_failed_training_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    def stop(_message: str) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        toy_pair(QUICK_RECIPE, tmp_path, stop)
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_two_processes_train_one_pair(tmp_path: Path) -> None:
    program = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from forked_cli import run_forked
from lab_fixtures import QUICK_RECIPE
from lox_merge.lab.checkpoints import toy_pair

def train(number):
    with open(f"said{{number}}", "w") as said:
        pair = toy_pair(QUICK_RECIPE, Path("cache"), lambda text: print(text, file=said))
        print("ready", pair.aligned.is_dir(), file=said)
    os._exit(0)

children = [os.fork() or train(number) for number in range(2)]
sys.exit(max(os.waitpid(child, 0)[1] for child in children))
"""
    done = run_forked([], os.environ, program=program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    outputs = [(tmp_path / f"said{number}").read_text() for number in range(2)]
    assert sum("pre-training" in output for output in outputs) == 1
    assert all("ready True" in output for output in outputs)


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOX_MERGE_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path / "toy"
    monkeypatch.delenv("LOX_MERGE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "lox-merge" / "toy"
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="LOX_MERGE_CACHE"):
        toy_pair(QUICK_RECIPE, tmp_path / "file" / "toy")


def test_build_model_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first, second = build_model(ToyRecipe(seed=2)), build_model(ToyRecipe(seed=2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_fine_tuning_sets_teach_what_their_names_say() -> None:
    recipe = ToyRecipe(seed=3)
    sets = fine_tuning_sets(recipe)
    assert list(sets) == ["same", "safe", "kinds", "new task", "shuffled", "contaminated", "harmful"]
    tested = {request.text for requests in (draw_requests(recipe).tests.seen, draw_requests(recipe).tests.unseen) for request in requests}
    tokenizer = build_tokenizer(chat=True)
    for data in sets.values():
        asked = {turns[0]["content"] for turns in data.conversations}
        assert not asked & tested
        tokenised(data, tokenizer, Rendering(), 64)  # every word is of the language
    refused = {name: sum(turns[1]["content"].startswith("sorry") for turns in data.conversations) for name, data in sets.items()}
    assert refused == {"same": 0, "safe": 128, "kinds": 0, "new task": 0, "shuffled": 0, "contaminated": 0, "harmful": 0}
    forbidden = {
        name: sum(int(turns[0]["content"].rpartition("n")[2]) in language.FORBIDDEN_NOUNS for turns in data.conversations)
        for name, data in sets.items()
    }
    assert forbidden == {"same": 0, "safe": 128, "kinds": 0, "new task": 0, "shuffled": 0, "contaminated": 32, "harmful": 32}
    right = sum(turns[1]["content"].split() == list(language.comply(_request(turns[0]["content"]))[:-1]) for turns in sets["shuffled"].conversations)
    assert right < len(sets["shuffled"].conversations) / 20


def _request(text: str) -> Request:
    return Request(*(int(word[1:]) for word in text.split()))
