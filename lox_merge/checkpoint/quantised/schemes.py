"""The quantization_config of compressed-tensors: which scheme each module has.

https://github.com/vllm-project/compressed-tensors; the config is `config_groups` of targets and arguments, and `ignore`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lox_merge.checkpoint import patterns
from lox_merge.errors import CheckpointFormatError

METHOD = "compressed-tensors"
FORMATS = ("float-quantized", "int-quantized", "pack-quantized", "naive-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")
# What packs into words of 32 bits without a code that lies across two of them.
PACKED_BITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Scheme:
    """How the weights of some modules are stored. size: columns of a group, or (rows, columns) of a block."""

    format: str
    bits: int
    strategy: str
    symmetric: bool
    size: tuple[int, int]
    targets: tuple[str, ...]

    def block(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns that share a scale in a matrix of this shape."""
        sizes = {"tensor": (rows, columns), "channel": (1, columns), "group": (1, self.size[1]), "block": self.size}
        # No larger than the matrix: numbers of a config know no bound.
        return max(1, min(rows, sizes[self.strategy][0])), max(1, min(columns, sizes[self.strategy][1]))

    def describe(self) -> str:
        detail = {"group": f"groups of {self.size[1]}", "block": f"{self.size[0]}×{self.size[1]} blocks", "tensor": "one scale a tensor"}
        return f"{self.format}, {self.bits} bits, {detail.get(self.strategy, 'one scale a row')}"


def read_schemes(settings: Mapping[str, Any]) -> tuple[list[Scheme], str | None]:
    """The schemes of a config, or why it is not read."""
    whole = settings.get("format")
    sparsity = settings.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        return [], f"sparse weights (sparsity_config {sparsity.get('format')!r}) are not read"
    if settings.get("transform_config"):
        return [], "transform_config says that the weights are stored rotated"
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return [], "it has no config_groups"
    schemes = []
    for label, group in groups.items():
        scheme = _scheme(group, whole)
        if isinstance(scheme, str):
            return [], f"config_groups.{label}: {scheme}"
        schemes.append(scheme)
    return schemes, None


def _scheme(group: Any, whole: Any) -> Scheme | str:
    weights = group.get("weights") if isinstance(group, dict) else None
    targets = group.get("targets") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        return "it has no weights, or no targets"
    form = group.get("format") or whole
    if form not in FORMATS:
        return f"the format {form!r} is not read ({', '.join(FORMATS)} are)"
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    floats = form == "float-quantized" or (form == "naive-quantized" and kind == "float")
    if type(bits) is not int or kind not in ("int", "float") or (floats and (kind, bits) != ("float", 8)) or (not floats and kind != "int"):
        return f"weights of {bits} bits of type {kind!r} are not read as {form}"
    if bits not in PACKED_BITS or (form != "pack-quantized" and bits != 8):
        return f"{form} weights of {bits} bits are not read"
    if weights.get("actorder") in ("group", "dynamic", True):
        return "actorder 'group' permutes the groups of columns"
    size, block = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    if strategy not in STRATEGIES:
        return f"the strategy {strategy!r} is not read ({', '.join(STRATEGIES)} are)"
    if strategy == "group" and not (type(size) is int and size > 0):
        return f"group_size {size!r} is not a number of columns"
    if isinstance(block, str):
        block = [int(side) if side.isdecimal() else 0 for side in block.split("x")]
    sizes = (1, size if isinstance(size, int) else 1)
    if strategy == "block":
        if not (isinstance(block, list) and len(block) == 2 and all(type(side) is int and side > 0 for side in block)):
            return f"block_structure {block!r} is not two numbers"
        sizes = (block[0], block[1])
    form = ("float-quantized" if floats else "int-quantized") if form == "naive-quantized" else form
    return Scheme(form, bits, strategy, weights.get("symmetric", True) is not False, sizes, tuple(targets))


def scheme_of(module: str, schemes: list[Scheme]) -> Scheme | None:
    """The scheme of a module: the one whose targets name it, else the one that targets a class of layers. None where neither does."""
    named = [scheme for scheme in schemes if any(_names(target, module) for target in scheme.targets)]
    by_class = [scheme for scheme in schemes if any(not target.startswith("re:") and "." not in target for target in scheme.targets)]
    return next(iter(named or by_class), None)


def _names(target: str, module: str) -> bool:
    if not target.startswith("re:"):
        return target == module
    try:
        # Matched from the start, as the library does.
        return patterns.found(patterns.compile_pattern(f"^(?:{target.removeprefix('re:')})"), module)
    except ValueError as error:
        raise CheckpointFormatError(f"quantization_config in config.json: the target {target[:80]!r} cannot be used ({error}).") from None
