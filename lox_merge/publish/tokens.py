"""Access tokens in bytes: by the public prefixes of their issuers, and those that this machine uses, by their values."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

# What follows a prefix. Long enough each that no word of a vocabulary is meant; bounded, so that no file makes a search take for ever.
_TOKENS = {
    prefix: re.compile(rest)
    for prefix, rest in {
        b"hf_": rb"[A-Za-z0-9]{30,200}",  # Hugging Face
        b"api_org_": rb"[A-Za-z0-9]{30,200}",
        b"sk-": rb"(?=[A-Za-z0-9_-]{20})[A-Za-z0-9_-]{0,200}?[A-Za-z0-9]{16}",  # OpenAI, Anthropic, OpenRouter and alike
        **dict.fromkeys((b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_"), rb"[A-Za-z0-9]{30,255}"),  # GitHub
        b"github_pat_": rb"[A-Za-z0-9_]{40,255}",
        b"glpat-": rb"[A-Za-z0-9_-]{20,255}",  # GitLab
        b"npm_": rb"[A-Za-z0-9]{36}(?![A-Za-z0-9])",
        b"pypi-": rb"AgE[A-Za-z0-9_-]{50,255}",
        **dict.fromkeys((b"AKIA", b"ASIA"), rb"[0-9A-Z]{16}(?![A-Za-z0-9])"),  # AWS
        b"AIza": rb"[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",  # Google
        **dict.fromkeys((b"xoxb-", b"xoxp-", b"xoxa-", b"xoxs-"), rb"[A-Za-z0-9-]{24,255}"),  # Slack
        b"nvapi-": rb"[A-Za-z0-9_-]{40,255}",  # NVIDIA
        b"gsk_": rb"[A-Za-z0-9]{40,255}",  # Groq
        b"-----BEGIN ": rb"(?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY-----",
    }.items()
}
# Inside a longer word a prefix is none (task-, shelf_), but behind an escape of JSON, of an address or of a terminal it is.
_WORD = re.compile(rb"[A-Za-z0-9_]\Z")
_ESCAPE = re.compile(rb"(?:\\[bfnrtv]|\\u[0-9A-Fa-f]{4}|\\x[0-9A-Fa-f]{2}|%[0-9A-Fa-f]{2}|\x1b\[[0-9;]{0,8}m)\Z")
_LONGEST_ESCAPE = 12
LONGEST = 300
_KEYS = ("_API_KEY", "_TOKEN", "_SECRET", "_SECRET_KEY", "_ACCESS_KEY")
# Special tokens of a tokenizer, names of models and plain words stand in such variables too (PAD_TOKEN), and in every model's files.
_OF_A_KEY = re.compile(r"(?=.*[A-Za-z])(?=.*[0-9])[A-Za-z0-9_.~+/=:-]{16,}")
_FEWEST_CHARACTERS = 8
_SHORTEST_OF_THE_HUB = 8


def tokens_by_prefix(data: bytes) -> Iterator[tuple[int, str]]:
    """(position, what it is called in a message) of whatever looks like an issuer's token. Never the token itself."""
    for prefix, rest in _TOKENS.items():
        start = data.find(prefix)  # two hundred times as fast as one expression for all of them
        while start >= 0:
            before = data[max(0, start - _LONGEST_ESCAPE) : start]
            if rest.match(data, start + len(prefix)) and (not _WORD.search(before) or _ESCAPE.search(before)):
                yield start, f"an access token or key ({prefix.decode().strip()}…)"
            start = data.find(prefix, start + 1)


def tokens_in_use() -> dict[bytes, str]:
    """Value to what it is called in a message: the Hub token in use, and what looks like a key among the environment variables."""
    from huggingface_hub import get_token

    found = {
        value.encode(): f"an access token: the value of the environment variable {name}"
        for name, value in os.environ.items()
        if name.upper().endswith(_KEYS) and _OF_A_KEY.fullmatch(value) and len(set(value)) >= _FEWEST_CHARACTERS
    }
    token = get_token()
    return found | ({token.encode(): "an access token: the one that is in use for the Hub"} if token and len(token) >= _SHORTEST_OF_THE_HUB else {})
