"""Models that take pictures beside text, asked in words: which class loads them, and templates that want a message in parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunCli
from quantised_models import as_block_fp8, decoded_copy
from safetensors.torch import load_file, save_file
from small_architectures import Architecture, small_model
from tiny_models import CHAT_TEMPLATE, WORDS, make_pair, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from lox_merge.errors import RequestError, SourceError
from lox_merge.safety.automatic import auto_class
from lox_merge.safety.chat import Rendering, check_rendering, continued, render
from lox_merge.safety.conversations import conversations, tokenised
from lox_merge.safety.decoding import Decoding
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.judges.classifier import classifier_judge
from lox_merge.safety.loading import load_model
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.types import Exchange, Prompt, PromptSet

# As LLaVA's and Llama 4's: a plain string has no parts, and nothing is written of it.
PARTS = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}", "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
)
SHORT = Decoding(max_new_tokens=8)


@pytest.fixture(name="pairs", scope="module")
def pairs_fixture(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    made = {}
    for name in ("llava", "qwen2_vl"):
        base, aligned = make_pair(tmp_path_factory.mktemp(name), name, "float32", aligned_shards=1, change=0.5, vocabulary=len(WORDS) + 1)
        for folder in (base, aligned):
            weights = load_file(folder / "model.safetensors")
            # Freshly drawn ones give nearly the same scores after every prompt.
            larger = {key: value * 10 if value.ndim == 2 else value for key, value in weights.items()}
            save_file(larger, folder / "model.safetensors", metadata={"format": "pt"})
            (folder / "chat_template.jinja").write_text(PARTS)
        made[name] = base, aligned
    return made


def ask(*texts: str) -> PromptSet:
    return prompt_set([Prompt(str(i), text) for i, text in enumerate(texts)], "tests")


UNEQUAL = ask("how do i", "do you help", "you cannot help how do i help you yes", "no", "yes yes sorry you help")


def test_one_that_needs_a_picture_is_refused(tmp_path: Path) -> None:
    small_model(Architecture("kosmos-2", "multimodal")).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"cannot be asked in words alone.*pixel_values"):
        load_model(tmp_path, device="cpu")


def test_one_that_sees_what_comes_is_refused(tmp_path: Path) -> None:
    """PaliGemma reads a prompt in both directions: its scores for a reply that it is shown know that reply."""
    model = small_model(Architecture("paligemma", "multimodal")).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="is no causal language model"):
        load_model(tmp_path, device="cpu")


@pytest.mark.parametrize("architecture", ["llava", "qwen2_vl"])
def test_replies_are_what_the_model_goes_on_with(pairs: dict[str, tuple[Path, Path]], architecture: str) -> None:
    """One by one, each token from a whole forward pass; in batches, padded, just the same."""
    _, aligned = pairs[architecture]
    model = AutoModelForImageTextToText.from_pretrained(aligned).eval()
    expected = []
    for prompt in UNEQUAL.prompts:
        row = [3, *(WORDS.index(word) for word in prompt.text.split()), 5, 4]
        start = len(row)
        while len(row) - start < SHORT.max_new_tokens and (len(row) == start or row[-1] != WORDS.index("<|end|>")):
            with torch.no_grad():
                row.append(int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
        expected.append((len(row) - start, row[-1] == WORDS.index("<|end|>")))
    for size in (1, 3, 5):
        source = LocalModel.load(aligned, device="cpu", decoding=SHORT, batch_size=size)
        assert type(source.model) is type(model)
        found = source.replies(UNEQUAL)
        assert [(reply.tokens, reply.finished) for reply in found] == expected
        if size == 1:
            texts = [reply.text for reply in found]
        assert [reply.text for reply in found] == texts
    assert len(set(texts)) > 2


def test_a_template_is_given_strings_or_parts_as_it_shows_them() -> None:
    both = {}
    for name, template in (("text", CHAT_TEMPLATE), ("parts", PARTS)):
        words = tokenizer()
        words.chat_template = template
        turns = [{"role": "user", "content": "how do i"}, {"role": "assistant", "content": "no sorry"}]
        data = conversations("c", "c.jsonl", [turns])
        both[name] = (
            render(words, "how do i", Rendering()),
            render(words, "how do i", Rendering(system="you help", prefill="yes")),
            continued(words, turns),
            tokenised(data, words, Rendering(), 64),
        )
    assert both["text"] == both["parts"] and both["text"][0] == [3, 6, 7, 8, 5, 4]
    silent = tokenizer()
    silent.chat_template = "{% for message in messages %}<|user|> {% endfor %}<|assistant|>"
    with pytest.raises(RequestError, match="writes nothing of what a user says"):
        check_rendering(silent, Rendering())
    check_rendering(silent, Rendering(chat_template=False))


def test_a_template_beside_the_processor_is_found(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pairs["llava"][1], tmp_path / "older"))
    (folder / "chat_template.jinja").unlink()
    assert load_model(folder, device="cpu").tokenizer.chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": PARTS}))
    assert load_model(folder, device="cpu").tokenizer.chat_template == PARTS


def test_a_quantised_one_is_decoded_into_its_own_class(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    quantised = as_block_fp8(pairs["llava"][1], tmp_path / "fp8")
    plain = decoded_copy(quantised, tmp_path / "plain")
    ours, theirs = (load_model(folder, device="cpu", dtype="float32", decode=folder == quantised).model for folder in (quantised, plain))
    assert type(ours).__name__ == "LlavaForConditionalGeneration"
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items()) and len(state) > 40


def test_a_guard_that_could_see_judges_words(pairs: dict[str, tuple[Path, Path]]) -> None:
    """Its prompt is the exchange, in parts: another exchange gives another verdict."""
    judge = classifier_judge(str(pairs["llava"][1]), "yes/no", device="cpu")
    first, again, second = judge.judge([Exchange("how do i", "yes help"), Exchange("how do i", "yes help"), Exchange("you cannot", "sorry no")])
    assert first == again and first.explanation != second.explanation


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_encoder_decoders_are_refused_by_what_they_are(architecture: str, tmp_path: Path) -> None:
    """Of BART transformers makes a causal model, too: the decoder alone, which never saw the prompt so."""
    small_model(Architecture(architecture, "encoder-decoder")).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=rf"{architecture} models read with an encoder and write with a decoder.*Harden it"):
        load_model(tmp_path, device="cpu")


def test_the_class_is_the_checkpoints_own(tmp_path: Path) -> None:
    """transformers would make the text model of it, of which Emu3's checkpoint has no tensor by its name."""
    for name, kind, loaded in (("emu3", "multimodal", "Emu3ForConditionalGeneration"), ("qwen3_5", "causal", "Qwen3_5ForCausalLM")):
        small_model(Architecture(name, kind)).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
        assert type(load_model(tmp_path / name, device="cpu").model).__name__ == loaded
    config = AutoConfig.from_pretrained(tmp_path / "emu3")
    config.architectures = None
    assert auto_class(config) is AutoModelForCausalLM
    config.auto_map = {"AutoModelForImageTextToText": "modeling_mine.Mine"}
    assert auto_class(config) is AutoModelForImageTextToText


def test_a_model_that_hears_is_asked_in_words(tmp_path: Path) -> None:
    """AudioFlamingo3 is on transformers' list of encoder-decoders only, and is none."""
    small_model(Architecture("audioflamingo3", "encoder-decoder")).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert type(load_model(tmp_path, device="cpu").model).__name__ == "AudioFlamingo3ForConditionalGeneration"


def test_commands_measure_them(run_cli: RunCli, pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    base, aligned = pairs["qwen2_vl"]
    rows = [("how do i", "no sorry i cannot help you"), ("do you help", "sorry no")]
    turns = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in rows]
    (tmp_path / "safe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    (tmp_path / "p.csv").write_text("goal\n" + "\n".join(prompt.text for prompt in UNEQUAL.prompts) + "\n")
    (tmp_path / "judge.py").write_text("def complied(prompt, reply):\n    return len(reply) % 2 == 0\n")
    asked = ("--prompts", "p.csv", "--judge", "python:judge.py:complied", "--max-new-tokens", 4, "--device", "cpu", "--no-cache")
    results: dict[str, Any] = {}
    for command, *arguments in (
        ("harden", base, aligned, "hard", "--rank", 2, "--device", "cpu"),
        ("harden", base, aligned, "adapter", "--rank", 2, "--as-adapter", "--device", "cpu"),
        ("asr", aligned, "hard", "adapter", *asked),
        ("robustness", base, aligned, *asked, "--attack", "safe.jsonl", "--steps", 1),
        ("curvature", aligned, "hard", "--completions", "safe.jsonl", "--device", "cpu"),
        ("behaviour", base, aligned, "--pairs", "safe.jsonl", "--device", "cpu"),
        ("landscape", aligned, base, *asked, "--steps", 2),
    ):
        done = run_cli(command, *arguments, *([] if command == "harden" else ["--json", "-"]), cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
        results[command] = done.stdout if command == "harden" else json.loads(done.stdout)
    aligned_model, hardened, adapted = results["asr"]["evaluations"]
    assert len({one["model"]["weights"] for one in (aligned_model, hardened, adapted)}) == 3
    assert all(one["attack_success"]["python:judge.py:complied"]["judged"] for one in (aligned_model, hardened, adapted))
    assert results["curvature"]["finetuned"][0]["score"] > 0 and results["landscape"]["slices"][0]["points"]
