"""Where in a model a tensor is, by its name: the layer, and the kind of module that it belongs to."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

_LAYER = re.compile(r"^(?:(.*?)\.)?(\d+)\.(.*)$")
_ENDINGS = ("weight", "bias")


def layer_of(name: str) -> tuple[str, int] | None:
    """('model.layers', 3) of model.layers.3.mlp.up_proj.weight; None where no number stands alone between dots."""
    found = _LAYER.match(name)
    return (found[1] or "", int(found[2])) if found else None


def layer_name(layer: tuple[str, int] | None) -> str | None:
    """'model.layers.3'."""
    return None if layer is None else f"{layer[0]}.{layer[1]}".lstrip(".")


def module_kinds(names: Sequence[str]) -> dict[str, str]:
    """Kind of module by tensor name: the module's own name ('q_proj'), with as much before it as tells kinds apart.

    GPT-2 has 'attn.c_proj' and 'mlp.c_proj'; experts are 'experts.w1'; kinds that several stacks of layers have begin with the stack.
    """
    paths = {name: _module(name) for name in names}
    by_last = defaultdict(set)
    for path in paths.values():
        by_last[path[-1:]].add(path)
    short = {name: path[-1:] if len(by_last[path[-1:]]) == 1 and "experts" not in path[:-1] else path[-2:] for name, path in paths.items()}
    stacks = defaultdict(set)
    for name, path in short.items():
        stacks[path].add((layer_of(name) or ("", 0))[0])
    return {name: ".".join([*_stack(name, stacks[path]), *path]) for name, path in short.items()}


def _module(name: str) -> tuple[str, ...]:
    """The path of a module within its layer, without numbers."""
    found = _LAYER.match(name)
    words = [word for word in (found[3] if found else name).split(".") if not word.isdigit()]
    if len(words) > 1 and words[-1] in _ENDINGS:
        words.pop()
    return tuple(words)


def _stack(name: str, stacks: set[str]) -> list[str]:
    """What to put before a kind that several stacks have: the first word that differs."""
    layer = layer_of(name)
    if len(stacks) == 1 or layer is None:
        return []
    parted = [stack.split(".") for stack in stacks]
    own = layer[0].split(".")
    place = next((i for i in range(len(own)) if len({tuple(words[i : i + 1]) for words in parted}) > 1), 0)
    return [own[place]]
