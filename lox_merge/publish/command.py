"""The command that makes an output again, from the recipe in its manifest."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from lox_merge.jobs.recipe import Recipe

# Option of each setting of the recipe. Rank and alpha are always shown.
_REPEATED = {"include": "--include", "exclude": "--exclude"}
_PATTERNS = {"rank_pattern": "--rank-pattern", "alpha_pattern": "--alpha-pattern"}
_FLAGS = {"linear_only": "--linear-only", "requantise": "--requantise", "skip_non_finite": "--skip-non-finite"}
_FACTORS = "factors.safetensors"
_VALUES = {"dtype": "--dtype", "rounding": "--rounding", "tolerance": "--tolerance", "seed": "--seed", "fused": "--fused"}


def harden_command(manifest: Mapping[str, Any], out: str) -> str:
    """`lox-merge harden …` with sources as org/name@commit (a folder's own name for local ones) and every setting that is not the default.

    Where its triplets came from a file of factors, the line before makes that file.
    """
    recipe, default = manifest["job"]["recipe"], Recipe().to_json()
    pair = [_reference(manifest["sources"][role]) for role in ("base", "aligned")]
    words = ["lox-merge", "harden", *pair, out]
    words += ["--rank", str(recipe["rank"]), "--alpha", shortest(recipe["alpha"])]
    for key, option in _REPEATED.items():
        words += [word for pattern in recipe[key] for word in (option, pattern)]
    for key, option in _PATTERNS.items():
        words += [word for pattern, value in recipe[key] for word in (option, f"{pattern}={value}")]
    words += [option for key, option in _FLAGS.items() if recipe.get(key)]  # to_json leaves requantise out where it is false
    if recipe.get("requantise"):
        default["rounding"] = None  # harden itself has another default then
    words += [word for key, option in _VALUES.items() if recipe[key] != default[key] for word in (option, str(recipe[key]))]
    confirmed = [f"--{what}-is-right" for what in manifest.get("confirmed", ())]
    words += confirmed
    if form_of(manifest) == "adapter":
        words.append("--as-adapter")
    words += ["--device", manifest["job"]["device"]]
    factors = manifest["job"].get("factors")
    if factors is None:
        return shlex.join(words)
    settings = [word for key in ("rank", "tolerance", "seed") for word in (f"--{key}", str(factors[key]))]
    first = ["lox-merge", "decompose", *pair, _FACTORS, *settings, *confirmed]
    return "\n".join(shlex.join(line) for line in (first, [*words, "--factors", _FACTORS]))


def shortest(value: float) -> str:
    """The shortest text that is exactly this number again: '2', not '2.0', and all digits where there are many."""
    text = f"{value:g}"
    return text if float(text) == value else repr(value)


def verify_command(manifest: Mapping[str, Any], target: str) -> str:
    """`lox-merge verify …`: sources on the Hub are found by themselves, local ones have to be given."""
    words = ["lox-merge", "verify", target]
    for role in ("base", "aligned"):
        if manifest["sources"][role]["kind"] != "hub":
            words += [f"--{role}", str(manifest["sources"][role]["name"])]
    return shlex.join(words)


def form_of(manifest: Mapping[str, Any]) -> str:
    """'checkpoint', or 'adapter' for a PEFT adapter on top of aligned."""
    return str(manifest["output"].get("form", "checkpoint"))


def _reference(source: Mapping[str, Any]) -> str:
    return f"{source['name']}@{source['commit']}" if source["kind"] == "hub" else str(source["name"])
