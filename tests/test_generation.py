"""Replies of models in memory and at an endpoint, against transformers' own generate, one prompt at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_program
from safetensors.torch import load_file, save_file
from tiny_models import WORDS as ALL_WORDS
from tiny_models import make_pair
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lox_merge.errors import LoxMergeError, RequestError, SourceError
from lox_merge.lab.checkpoints import ToyPair
from lox_merge.lab.language import comply
from lox_merge.lab.recipe import ToyRecipe
from lox_merge.lab.requests import draw_requests
from lox_merge.safety.batches import is_out_of_memory
from lox_merge.safety.chat import Rendering, render
from lox_merge.safety.decoding import Decoding, SeededSampling
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.loading import weights_fingerprint
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.types import Prompt, PromptSet, Reply

WORDS = ["how", "do", "i", "you", "help", "no", "yes", "sorry", "cannot"]
SHORT = Decoding(max_new_tokens=12)
LOOKED = 2 * 3 * 4  # passes of the model that tell whether it may be asked in batches: alone and beside another, three rows, four tokens


def ask(*texts: str) -> PromptSet:
    return prompt_set([Prompt(str(i), text) for i, text in enumerate(texts)], "tests")


# Of very different lengths, not sorted, so that padding, masks and the order of replies all matter.
UNEQUAL = ask(*(" ".join(WORDS[(i + j * j) % 9] for j in range(1 + (7 * i) % 23)) for i in range(13)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    made = {}
    for name in ("llama", "gpt2", "gemma"):
        # Tied embeddings would make Gemma repeat its last token for ever.
        settings = {"tie_word_embeddings": False} if name == "gemma" else {}
        folder = tmp_path_factory.mktemp(name)
        made[name] = make_pair(folder, name, "float32", aligned_shards=1, vocabulary=len(ALL_WORDS), change=0.5, **settings)
        for folder in made[name]:
            _sharpen(folder)
    return made


def _sharpen(folder: Path) -> None:
    """Freshly drawn weights give nearly the same scores after every prompt; ten times larger, every prompt has a reply of its own."""
    weights = load_file(folder / "model.safetensors")
    larger = {name: value * 10 if value.ndim > 1 else value for name, value in weights.items()}
    save_file(larger, folder / "model.safetensors", metadata={"format": "pt"})


def one_by_one(folder: Path, prompts: PromptSet, decoding: Decoding, rendering: Rendering) -> list[tuple[str, int, bool]]:
    """Text, number of tokens and whether it ended, by transformers alone: no padding, no mask, greedy, no settings of the model."""
    model, words = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    end = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=end, pad_token_id=0, max_new_tokens=decoding.max_new_tokens)
    found = []
    for prompt in prompts.prompts:
        tokens = torch.tensor([render(words, prompt.text, rendering)])
        new = model.generate(tokens, attention_mask=torch.ones_like(tokens))[0, tokens.shape[1] :].tolist()
        found.append((words.decode([token for token in new if token != end], skip_special_tokens=True), len(new), new[-1] == end))
    return found


def facts(replies: list[Reply]) -> list[tuple[str, int | None, bool]]:
    return [(reply.text, reply.tokens, reply.finished) for reply in replies]


# GPT-2 learns absolute positions, so wrong position ids show; Gemma 2 has sliding windows, so wrong masks show.
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma"])
def test_batches_of_any_size_give_the_replies_of_one_by_one(folders: dict[str, tuple[Path, Path]], architecture: str) -> None:
    _, aligned = folders[architecture]
    wanted = one_by_one(aligned, UNEQUAL, SHORT, Rendering())
    assert len({text for text, _, _ in wanted}) > 6, "the replies differ, so a reply in the wrong place would show"
    for size in (1, 4, 13, None):
        source = LocalModel.load(aligned, device="cpu", dtype="float32", decoding=SHORT, batch_size=size)
        assert facts(source.replies(UNEQUAL)) == wanted, f"batch size {size}"


def test_a_base_model_is_asked_without_a_template(folders: dict[str, tuple[Path, Path]]) -> None:
    base, _ = folders["llama"]
    plain = Rendering(chat_template=False)
    with pytest.raises(RequestError, match="--no-chat-template"):
        LocalModel.load(base, device="cpu")
    source = LocalModel.load(base, device="cpu", decoding=SHORT, rendering=plain)
    assert facts(source.replies(UNEQUAL)) == one_by_one(base, UNEQUAL, SHORT, plain)


def test_no_setting_of_the_models_own_leaks_into_greedy_replies(folders: dict[str, tuple[Path, Path]]) -> None:
    _, aligned = folders["llama"]
    source = LocalModel.load(aligned, device="cpu", decoding=SHORT)
    assert source.model.generation_config.temperature == 0.6
    wanted = facts(source.replies(UNEQUAL))
    loud = GenerationConfig(
        do_sample=True,
        temperature=2.0,
        top_k=3,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=11,
        bad_words_ids=[[5], [7]],
        num_beams=3,
    )
    loud.eos_token_id = source.model.generation_config.eos_token_id
    source.model.generation_config = loud
    assert facts(source.replies(UNEQUAL)) == wanted
    assert source.model.generation_config is loud, "the model is handed back as it was"


def test_dropout_is_off_and_training_mode_comes_back(folders: dict[str, tuple[Path, Path]]) -> None:
    source = LocalModel.load(folders["gpt2"][1], device="cpu", decoding=SHORT)
    wanted = source.replies(UNEQUAL)
    source.model.train()
    assert source.replies(UNEQUAL) == wanted
    assert source.model.training


def test_the_toy_model_refuses_and_its_replies_end(toy_pair_seed0: ToyPair) -> None:
    tests = draw_requests(ToyRecipe(seed=0)).tests
    prompts = ask(*(request.text for request in (*tests.seen[:40], *tests.allowed[:40])))
    source = LocalModel.load(toy_pair_seed0.aligned, device="cpu")
    replies = source.replies(prompts)
    assert facts(replies) == one_by_one(toy_pair_seed0.aligned, prompts, Decoding(), Rendering())
    assert sum(reply.text == "sorry i refuse so" for reply in replies[:40]) > 30
    assert sum(reply.text == " ".join(comply(request)[:-1]) for reply, request in zip(replies[40:], tests.allowed, strict=False)) > 30
    assert all(reply.finished for reply in replies)
    cut = LocalModel.load(toy_pair_seed0.aligned, device="cpu", decoding=Decoding(max_new_tokens=2)).replies(prompts)
    assert not any(reply.finished for reply in cut) and {reply.tokens for reply in cut} == {2}


def test_weights_may_change_between_calls(folders: dict[str, tuple[Path, Path]]) -> None:
    base, aligned = folders["llama"]
    source = LocalModel.load(aligned, device="cpu", decoding=SHORT)
    first, identity = source.replies(UNEQUAL), source.identity()
    before = copy.deepcopy(source.model.state_dict())
    other = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    source.model.load_state_dict(other.state_dict())
    fresh = LocalModel(other, source.tokenizer, SHORT)
    end = other.generation_config.eos_token_id
    other.generation_config.eos_token_id = source.model.generation_config.eos_token_id
    assert end != other.generation_config.eos_token_id
    assert source.replies(UNEQUAL) == fresh.replies(UNEQUAL) != first
    assert source.identity() != identity
    source.model.load_state_dict(before)
    assert source.replies(UNEQUAL) == first and source.identity() == identity


def test_the_fingerprint_sees_what_moved_even_where_sums_stay() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(501, 700, bias=False, dtype=torch.bfloat16)  # no whole number of the words and rows that are summed
    before, weight = weights_fingerprint(model), model.weight.detach()
    original = weight.clone()
    for changed in (weight.roll(1, 0), weight.roll(1, 1), weight.roll(4096, 0), weight.flip(0), weight + 0.01 * (torch.arange(501) == 500)):
        weight.copy_(changed)
        assert weights_fingerprint(model) != before
        weight.copy_(original)
        assert weights_fingerprint(model) == before
    assert weights_fingerprint(model.float()) != before
    misplaced = torch.nn.Linear(501, 700, bias=False, dtype=torch.bfloat16)
    misplaced.weight = torch.nn.Parameter(torch.cat([original.new_zeros(1), original.reshape(-1)])[1:].view(700, 501))
    assert weights_fingerprint(misplaced) == before


@contextmanager
def little_memory(model: Any, rows: int, error: Callable[[], BaseException]) -> Iterator[list[int]]:
    """A model whose forward pass runs out of memory on more than `rows` rows; yields the sizes that were tried."""
    sizes: list[int] = []

    def limit(_module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
        sizes.append(len(keywords["input_ids"]))
        if sizes[-1] > rows:
            raise error()

    handle = model.register_forward_pre_hook(limit, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        lambda: RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        MemoryError,
    ],
)
def test_the_batch_is_halved_when_memory_runs_out(folders: dict[str, tuple[Path, Path]], error: Callable[[], BaseException]) -> None:
    source = LocalModel.load(folders["llama"][1], device="cpu", decoding=SHORT, batch_size=13)
    wanted = source.replies(UNEQUAL)
    with little_memory(source.model, 3, error) as sizes:
        assert source.replies(UNEQUAL) == wanted
    assert sizes[:3] == [13, 6, 3] and max(sizes[3:]) == 3 and source.batch_size == 3
    with little_memory(source.model, 0, error), pytest.raises(LoxMergeError, match=r"single prompt \(3, "):
        source.replies(UNEQUAL)


def test_a_real_failed_allocation_is_seen_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46, dtype=torch.float64)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_other_errors_are_not_taken_for_missing_memory(folders: dict[str, tuple[Path, Path]]) -> None:
    source = LocalModel.load(folders["llama"][1], device="cpu", decoding=SHORT, batch_size=4)
    with little_memory(source.model, 0, lambda: RuntimeError("shapes do not match")) as sizes, pytest.raises(RuntimeError, match="shapes"):
        source.replies(UNEQUAL)
    assert sizes == [1]


def test_sampled_replies_depend_on_the_seed_and_not_on_the_batch(folders: dict[str, tuple[Path, Path]]) -> None:
    def replies(size: int, seed: int, temperature: float = 1.5) -> list[Reply]:
        decoding = Decoding(12, temperature=temperature, top_p=0.9, seed=seed)
        torch.manual_seed(size)
        return LocalModel.load(folders["llama"][1], device="cpu", decoding=decoding, batch_size=size).replies(UNEQUAL)

    assert replies(1, 0) == replies(13, 0) == replies(5, 0) != replies(13, 1)
    greedy = LocalModel.load(folders["llama"][1], device="cpu", decoding=SHORT).replies(UNEQUAL)
    assert replies(13, 0, temperature=1e-6) == greedy


def test_sampling_draws_from_the_truncated_distribution() -> None:
    from scipy.stats import chisquare

    scores = torch.tensor([0.5, 2.0, -1.0, 1.0, 0.0])
    count, temperature, top_p = 8000, 0.7, 0.9
    sampler = SeededSampling(Decoding(1, temperature=temperature, top_p=top_p), [str(i) for i in range(count)])
    drawn = sampler(torch.zeros(count, 1, dtype=torch.long), scores.repeat(count, 1)).argmax(-1)
    probabilities = (scores.double() / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    kept = order[: int((probabilities[order].cumsum(0) < top_p).sum()) + 1]
    assert 1 < len(kept) < 5
    observed = torch.bincount(drawn, minlength=5)
    assert int(observed[kept].sum()) == count
    expected = probabilities[kept] / probabilities[kept].sum() * count
    assert chisquare(observed[kept].numpy(), expected.numpy()).pvalue > 1e-3


def test_replies_are_taken_from_the_store_and_the_rest_is_made(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    store = tmp_path / "replies.jsonl"
    settings: dict[str, Any] = {"device": "cpu", "decoding": SHORT, "batch_size": 4, "store": store}
    source = LocalModel.load(folders["llama"][1], **settings)
    broken = RuntimeError("pulled plug")
    calls = 0

    def unplug() -> BaseException:
        nonlocal calls
        calls += 1
        return broken

    wanted = LocalModel.load(folders["llama"][1], device="cpu", decoding=SHORT).replies(UNEQUAL)
    with little_memory(source.model, 4, unplug) as sizes:
        original, source.model.generation_config.max_length = source._batch, None
        source._batch = lambda prompts, rows: original(prompts, rows) if len(sizes) < LOOKED + 20 else (_ for _ in ()).throw(broken)  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="pulled plug"):
            source.replies(UNEQUAL)
    kept = store.read_bytes()
    assert kept.count(b"\n") == 1 + 8
    # The crash came in the middle of a line.
    store.write_bytes(kept[:-9])
    again = LocalModel.load(folders["llama"][1], **settings)
    with little_memory(again.model, 4, unplug) as sizes:
        assert again.replies(UNEQUAL) == wanted
    assert len(sizes) <= LOOKED + 2 * SHORT.max_new_tokens
    lines = [json.loads(line) for line in store.read_text().splitlines()]
    assert sorted(int(line["id"]) for line in lines[1:]) == list(range(13))
    with little_memory(again.model, 0, unplug):
        assert again.replies(UNEQUAL) == wanted, "nothing is left to ask"
    assert str(tmp_path) not in store.read_text()


def test_a_store_of_something_else_is_refused_and_left_alone(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    store = tmp_path / "replies.jsonl"
    base, aligned = folders["llama"]
    LocalModel.load(aligned, device="cpu", decoding=SHORT, store=store).replies(UNEQUAL)
    before = store.read_bytes()
    others = {
        "weights": LocalModel.load(base, device="cpu", decoding=SHORT, store=store, tokenizer=AutoTokenizer.from_pretrained(aligned)),
        "decoding": LocalModel.load(aligned, device="cpu", decoding=Decoding(11), store=store),
        "rendering": LocalModel.load(aligned, device="cpu", decoding=SHORT, rendering=Rendering(chat_template=False), store=store),
    }
    for what, source in others.items():
        with pytest.raises(RequestError, match=f"another run .*{what}"):
            source.replies(UNEQUAL)
    with pytest.raises(RequestError, match=r"another run .*prompts"):
        LocalModel.load(aligned, device="cpu", decoding=SHORT, store=store).replies(ask("how"))
    assert store.read_bytes() == before
    store.write_text("dear diary")
    with pytest.raises(RequestError, match="not a store of replies"):
        LocalModel.load(aligned, device="cpu", decoding=SHORT, store=store).replies(UNEQUAL)
    assert store.read_text() == "dear diary"
    lines = before.split(b"\n")
    store.write_bytes(b"\n".join([lines[0], lines[1][:-3], *lines[2:]]))
    with pytest.raises(RequestError, match="line 2"):
        LocalModel.load(aligned, device="cpu", decoding=SHORT, store=store).replies(UNEQUAL)


def test_wrong_requests(folders: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    aligned = folders["llama"][1]
    with pytest.raises(RequestError, match=r"more than the 64 tokens"):
        LocalModel.load(aligned, device="cpu").replies(ask("how", " ".join(["how"] * 40)))
    with pytest.raises(SourceError, match="no folder"):
        LocalModel.load(tmp_path / "nothing")
    with pytest.raises(RequestError, match="float8"):
        LocalModel.load(aligned, dtype="float8")
    with pytest.raises(RequestError, match="device_map"):
        LocalModel.load(aligned, device="cpu", device_map="auto")
    for wrong in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}):
        with pytest.raises(RequestError):
            Decoding(**wrong)


def test_device_map_gives_the_same_replies(folders: dict[str, tuple[Path, Path]]) -> None:
    pytest.importorskip("accelerate")
    aligned = folders["llama"][1]
    spread = LocalModel.load(aligned, device_map="auto", decoding=SHORT)
    assert facts(spread.replies(UNEQUAL)) == one_by_one(aligned, UNEQUAL, SHORT, Rendering())


def test_progress_is_silent_in_a_pipe(folders: dict[str, tuple[Path, Path]]) -> None:
    program = (
        "import sys; from lox_merge.safety.generation import *; from lox_merge.safety.prompts import prompt_set; "
        "from lox_merge.safety.progress import terminal_progress; "
        "m = LocalModel.load(sys.argv[1], device='cpu', decoding=Decoding(3), progress=terminal_progress); "
        "m.replies(prompt_set([Prompt('0', 'how')], 's'))"
    )
    done = run_program(program, folders["llama"][1])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
