"""What is looked for before anything is published: access tokens and places of this machine, in every file that would go out."""

from __future__ import annotations

import json
import random
import shutil
import string
from pathlib import Path

import pytest
import torch
from hub_clients import LoopbackHub
from publishers import Publisher
from push_fixtures import refused, stored
from safetensors.torch import load_file, save_file

from lox_merge import Recipe, harden
from lox_merge.errors import RequestError
from lox_merge.publish import privacy
from lox_merge.publish.privacy import check_files, check_text

HUB = "hf_" + "aB3" * 11 + "x"
KEY = "8f3a0c9e71b24d5e9a06"
NAMES = [
    *("run.sh", "train.jsonl", "notes.ipynb", "page.html", "conf.ini", "Modelfile", "secret", "settings.JSON", "tokenizer_config.json"),
    *("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "qwen.tiktoken", "model.safetensors.index.json", "data.bin.txt"),
]
TOKENS = [
    *(HUB, "api_org_" + "x" * 34, "sk-" + "a1" * 24, "sk-proj-ab_cd-" + "Z9" * 40, "sk-ant-api03-" + "q-W_e4r5t6y7u8i9o0p1" * 4),
    *("ghp_" + "a" * 36, "github_pat_" + "A" * 22 + "_" + "b" * 59, "glpat-" + "a" * 20, "npm_" + "a" * 36, "ASIA" + "A" * 16, "AKIA" + "7" * 16),
    *("AIza" + "b" * 35, "xoxb-" + "1" * 12 + "-" + "a" * 24, "nvapi-" + "a" * 64, "gsk_" + "a" * 52, "-----BEGIN OPENSSH PRIVATE KEY-----"),
]
NO_TOKENS = [
    *("half_" + "a" * 40, "task-" + "a" * 40, "hf_transfer and hf_hub_download", "sk-learn-like-class", "ASIA", "ASIA" + "A" * 17, "npm_" + "a" * 37),
    *("sk-" + "-" * 40, "ghp_", "glpat-", "AKIA" + "a" * 16, "BEGIN PRIVATE KEY", "x" * 60),
]


def test_every_file_is_looked_through(tmp_path: Path) -> None:
    for name in NAMES:
        for content in (f"a\n# HF_TOKEN={HUB}\n".encode(), f"a\n{HUB}".encode("utf-16"), b"\x00\xff\n" + json.dumps({"x": f"y\n{HUB}"}).encode()):
            (tmp_path / "file").write_bytes(content)
            for given in (content, tmp_path / "file"):
                with pytest.raises(RequestError, match=r"line 2, holds an access token or key \(hf_…\)") as caught:
                    check_files({name: given}, tmp_path)
                assert name in str(caught.value) and HUB not in str(caught.value)
    check_files(dict.fromkeys(NAMES, b"nothing of interest"), tmp_path)


@pytest.mark.parametrize("token", TOKENS, ids=lambda token: token[:8])
def test_tokens_of_many_issuers_are_known(token: str) -> None:
    for text in (token, f"x = '{token}'", json.dumps({"text": f"line\n{token}\n"}), f"https://me:{token}@host/", f"key%3D{token}"):
        with pytest.raises(RequestError, match="holds an access token") as caught:
            check_text(text, "a text", remedy="Correct it.")
        assert token not in str(caught.value) or token.startswith("-----")


@pytest.mark.parametrize("text", NO_TOKENS, ids=lambda text: text[:8])
def test_what_only_begins_like_a_token_passes(text: str) -> None:
    check_text(f"a {text}, and more", "a text", remedy="Correct it.")
    check_files({"tokenizer.json": json.dumps({"vocab": {text: 1}}).encode()}, Path("out"))


def test_vocabularies_hold_what_they_like_but_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", KEY)
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_letters + string.digits + "-_/+", k=draw.randint(1, 30))) for _ in range(30_000)]
    vocabulary = json.dumps({"vocab": {word: number for number, word in enumerate([*words, str(tmp_path), KEY, "hf_", "sk-", "AKIA"])}}).encode()
    check_files({"tokenizer.json": vocabulary, "vocab.json": vocabulary, "merges.txt": "\n".join(words).encode()}, tmp_path)
    with pytest.raises(RequestError, match="names a path of this machine"):
        check_files({"words.json": vocabulary.replace(KEY.encode(), b"")}, tmp_path)


def test_large_files_are_looked_through_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token or a path at every place around the end of a piece, found once and with its line."""
    monkeypatch.setattr(privacy, "_BLOCK", 2**14)
    file = tmp_path / "data.jsonl"
    for secret, reason in ((HUB, "holds an access token"), (str(tmp_path), "names a path of this machine")):
        for end in (2**14, 2**15, 2**15 + 2**14):
            for before in range(end - len(secret) - 2, end + 3, 3):
                text = ("a short line\n" * end)[: before - 1] + " " + secret
                file.write_text(text + "\n" + "more\n" * 5_000)
                with pytest.raises(RequestError, match=rf"data.jsonl, line {text.count(chr(10)) + 1}, {reason}"):
                    check_files({"data.jsonl": file}, tmp_path)
    # A word that the end of a piece cuts in two is no token by its second half.
    for edge in (2**14, 2**14 - privacy._OVERLAP):
        for before in range(edge - 100, edge):
            file.write_text(" " * before + "ASIA" + "A" * 40 + " task" + HUB + " " * 2**15)
            check_files({"data.jsonl": file}, tmp_path)


def test_headers_of_weights_are_looked_through_and_tensors_are_not(tmp_path: Path) -> None:
    file, numbers = tmp_path / "model.safetensors", torch.frombuffer(bytearray(HUB.encode() * 8), dtype=torch.uint8)
    save_file({"w": numbers}, file, metadata={"format": "pt"})
    check_files({"model.safetensors": file}, tmp_path)
    for metadata in ({"trainer": HUB}, {"trainer": f"{tmp_path}/run"}):
        save_file({"w": numbers}, file, metadata=metadata)
        with pytest.raises(RequestError, match=r"model.safetensors, line 1, (holds|names)"):
            check_files({"model.safetensors": file}, tmp_path)


def test_only_what_looks_like_a_key_counts_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = ["<|assistant|>", "lox-merge", "true", "a b c d e f g h i j k l 1 2", "<|reserved_special_token_0|>"]
    ordinary += ["a1" * 20, "abcdefghijklmnopqrst", "7" * 30]
    for value in ordinary:
        monkeypatch.setenv("PAD_TOKEN", value)
        monkeypatch.setenv("SERVICE_API_KEY", value)
        check_text(f"The tokenizer pads with {value}.", "a text", remedy="Correct it.")
    for name in ("WANDB_API_KEY", "SERVICE_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, KEY)
        with pytest.raises(RequestError, match=rf"line 2, .* environment variable {name}") as caught:
            check_text(f"one\nkey: {KEY}", "a text", remedy="Correct it.")
        assert KEY not in str(caught.value)
        monkeypatch.delenv(name)


def test_a_token_anywhere_beside_the_weights_is_not_published(
    hub: LoopbackHub, publisher: Publisher, made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """By `harden --push` before it begins, and by `push`: in a side file of any name, in a vocabulary, and in the header of a shard."""
    shard = "model-00001-of-00003.safetensors"
    for name in ("run.sh", "vocab.json", shard):
        aligned = shutil.copytree(made[1], tmp_path / name / "aligned")
        if name == shard:
            save_file(load_file(aligned / shard), aligned / shard, metadata={"format": "pt", "note": HUB})
        else:
            (aligned / name).write_text(f"export HF_TOKEN={HUB}\n")
        out = tmp_path / name / "out"
        words = (f"{name}, line 1, holds an access token", "Nothing was published")
        refused(publisher.run("harden", made[0], aligned, out, "--push", "owner/secrets", "--license", "mit"), *words)
        assert not out.exists()
        harden(made[0], aligned, out, recipe=Recipe(rank=1))
        refused(publisher.push(out, "owner/secrets", "--public"), *words)
    assert "owner/secrets" not in hub.repositories
    shutil.copy(made[0] / "config.json", tmp_path / "run.sh" / "aligned" / "run.sh")
    (tmp_path / "run.sh" / "aligned" / ".env").write_text(HUB)
    arguments = ("harden", made[0], tmp_path / "run.sh" / "aligned", tmp_path / "clean", "--push", "owner/clean", "--license", "mit")
    done = publisher.run(*arguments, PAD_TOKEN="<|assistant|>", SERVICE_TOKEN="lox-merge")
    assert done.returncode == 0, done.stderr
    assert ".env" not in stored(hub, "owner/clean") and not any(HUB.encode() in data for data in stored(hub, "owner/clean").values())
