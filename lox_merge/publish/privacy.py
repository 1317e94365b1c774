"""Nothing of the machine or its user goes out: folders of this machine and access tokens are looked for before anything is published."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from lox_merge.errors import RequestError

# Tokens by their public prefixes: Hugging Face, OpenAI and alike, GitHub, AWS.
_TOKENS = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16})\b")
_TEXT = (".json", ".md", ".py", ".txt", ".yaml", ".yml", ".jinja", ".toml", ".cfg", ".svg")
# A vocabulary holds any string whatever, those of paths included; nobody's settings are in it.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "model.safetensors.index.json")
_LARGEST = 10 * 2**20
# An absolute path of two parts or more; whether it is one of this machine is then looked up.
_PATHS = re.compile(r"(?<![\w:/.<~])/(?:[^\s/\"'`<>|:,;()\[\]{}]+/)+[^\s/\"'`<>|:,;()\[\]{}]+")
_EVERYWHERE = ("usr", "bin", "sbin", "etc", "dev", "proc", "sys", "lib", "lib64")


def check_text(text: str, where: str, folders: Iterable[Path] = (), *, remedy: str) -> None:
    """Raises RequestError where `text` holds an access token, or a path that is one of this machine's.

    folders: further ones that count, beside home and working folder, also where what is in them is gone. The message names the line
    and the path, never a secret.
    """
    secrets = {token for token in _tokens_in_use() if len(token) >= 8}
    # A folder such as /data is on many machines and tells nothing.
    places = sorted({str(folder) for folder in (*folders, *_own_folders()) if len(folder.parts) > 2}, key=len, reverse=True)
    for number, line in enumerate(text.splitlines(), 1):
        if _TOKENS.search(line) or any(secret in line for secret in secrets):
            raise RequestError(f"{where}, line {number}, holds an access token. Nothing was published. {remedy}")
        found = next((place for place in places if re.search(rf"{re.escape(place)}(?=[/\\\s\"',:;)\]]|$)", line)), None) or _path_here(line)
        if found:
            raise RequestError(f"{where}, line {number}, names a path of this machine ({found}). Nothing was published. {remedy}")


def _path_here(line: str) -> str | None:
    """An absolute path in the line that exists on this machine and not on every one."""
    for path in _PATHS.findall(line):
        with suppress(OSError):
            if path.split("/")[1] not in _EVERYWHERE and Path(path).exists():
                return str(path)
    return None


def check_files(files: Mapping[str, bytes | Path], folder: Path) -> None:
    """`check_text` on every small text file that is about to be published. folder: the output."""
    for name, content in files.items():
        path = Path(name)
        if path.name in _VOCABULARIES or path.suffix not in _TEXT:
            continue
        if isinstance(content, Path):
            if content.stat().st_size > _LARGEST:
                continue
            content = content.read_bytes()
        remedy = "Correct it in the model that it was copied from, and harden again." if name != "README.md" else "Correct it, or write it anew."
        check_text(content.decode("utf-8", errors="replace"), name, [folder.resolve(), folder.resolve().parent], remedy=remedy)


def _own_folders() -> list[Path]:
    found = [Path.cwd()]
    with suppress(RuntimeError):  # a user without a home folder
        found.append(Path.home())
    return found


def _tokens_in_use() -> list[str]:
    """The Hub token in use, and keys of the environment."""
    from huggingface_hub import get_token

    keys = [value for name, value in os.environ.items() if name.endswith(("_API_KEY", "_TOKEN"))]
    return [token for token in (get_token(), *keys) if token]
