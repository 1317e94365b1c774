"""Hostile checkpoints: headers, index files, config.json, adapters. Each goes the whole way through `harden`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from tiny_models import INDEX

from fuzz.cases import Target
from fuzz.hostile import json_bytes, spoilt, tampered, written
from fuzz.materials import WEIGHTS, Materials, looks_like_a_model, remove, split_header, with_header
from lox_merge import Recipe, harden
from lox_merge.errors import LoxMergeError


class LoadsAfterFailure(AssertionError):
    """A command failed and left a folder that transformers would load."""


class NotSafetensors(AssertionError):
    """A file was accepted, or written, that the safetensors library refuses."""


def harden_case(base: Path, aligned: Path, out: Path, *, requantise: bool = False, dtype: str | None = None, **settings: Any) -> None:
    """Hardens; a failure must leave no model behind, and what is written must load."""
    remove([out])
    recipe = Recipe(rank=2, skip_non_finite=True, requantise=requantise, dtype=dtype)
    try:
        harden(base, aligned, out, recipe=recipe, order_is_right=True, device="cpu", **settings)
    except LoxMergeError:
        if looks_like_a_model(out):
            raise LoadsAfterFailure(out) from None
        raise
    for file in out.glob("*.safetensors"):
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except SafetensorError as error:
            raise NotSafetensors(str(error)) from error


def headers(materials: Materials) -> Target:
    folder, out = materials.copy(materials.single, "headers"), materials.place("headers_out")
    header, data = split_header(folder / WEIGHTS)
    lengths = st.one_of(st.none(), st.none(), st.none(), st.sampled_from((0, 1, 2**63, 2**64 - 1, 100_000_001, len(data))))
    bodies = st.sampled_from((data, data, data, data[:-1], data + b"\0", b"", data * 2))
    plain = st.builds(with_header, json_bytes(header), bodies, lengths)
    offsets = st.builds(lambda changed: with_header(written(changed), data), moved_offsets(header, len(data)))

    def feed(case: bytes) -> None:
        (folder / WEIGHTS).write_bytes(case)
        harden_case(materials.base, folder, out)

    return Target("headers", st.one_of(plain, offsets), feed, materials.folder, (materials.single / WEIGHTS).read_bytes())


@st.composite
def moved_offsets(draw: Any, header: dict[str, Any], size: int) -> dict[str, Any]:
    """Byte ranges and shapes moved against each other: overlaps, holes, sizes that only fit together."""
    names = [name for name in header if name != "__metadata__"]
    changed = json.loads(json.dumps(header))
    for _ in range(draw(st.integers(1, 3))):
        entry = changed[draw(st.sampled_from(names))]
        how = draw(st.integers(0, 4))
        if how == 0:
            entry["data_offsets"] = [draw(st.integers(-1, size + 1)), draw(st.integers(-1, size + 1))]
        elif how == 1:
            entry["shape"] = draw(st.permutations([*entry["shape"], 1]))
        elif how == 2:
            entry["shape"] = draw(st.sampled_from(([0, 2**63], [2**32, 2**32], [1] * 70 + entry["shape"], [], [0], [True], [2.0], [0] * 100)))
            entry["data_offsets"] = [entry["data_offsets"][0]] * 2 if 0 in entry["shape"] else entry["data_offsets"]
        elif how == 3:
            entry["dtype"] = draw(st.sampled_from(("F16", "I16", "U16", "BOOL", "F4", "F64", "C64", "bf16", "BF16 ")))
        else:
            one, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
            changed[one], changed[other] = changed[other], changed[one]
    return changed


def indexes(materials: Materials) -> Target:
    folder, out = materials.copy(materials.aligned, "indexes"), materials.place("indexes_out")
    index = json.loads((folder / INDEX).read_text())
    files = st.sampled_from((*sorted(set(index["weight_map"].values())), "config.json", "tokenizer.json", INDEX, ".", "../base/model.safetensors"))
    swapped = st.dictionaries(st.sampled_from(list(index["weight_map"])), files, min_size=1).map(
        lambda places: written(index | {"weight_map": index["weight_map"] | places})
    )

    def feed(case: bytes) -> None:
        (folder / INDEX).write_bytes(case)
        harden_case(materials.base, folder, out)

    return Target("indexes", st.one_of(json_bytes(index), swapped), feed, materials.folder, written(index))


def configs(materials: Materials) -> Target:
    """config.json and tokenizer_config.json of aligned; for an adapter, of its base, where the model's classes are looked up."""
    folder, out = materials.copy(materials.aligned, "configs"), materials.place("configs_out")
    base = materials.copy(materials.base, "configs_base")
    document = json.loads((folder / "config.json").read_text())
    more = {
        "quantization_config": {"quant_method": "gptq"},
        "text_config": {"hidden_size": 16, "num_local_experts": 4},
        "auto_map": {"AutoConfig": "x.X"},
    }
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    sound = (folder / "config.json").read_bytes(), (folder / "tokenizer_config.json").read_bytes()

    def feed(case: Any) -> None:
        kind, data = case
        (folder / "config.json").write_bytes(sound[0])
        (folder / "tokenizer_config.json").write_bytes(sound[1])
        if kind == "base":
            (base / "config.json").write_bytes(data)
            harden_case(base, materials.adapter, out, base_is_right=True)
            return
        (folder / ("tokenizer_config.json" if kind == "tokenizer" else "config.json")).write_bytes(data)
        harden_case(materials.base, folder, out)

    documents = {"config": document, "more": document | more, "tokenizer": tokenizer, "base": document}
    cases = st.one_of(*(st.tuples(st.just(kind), json_bytes(found)) for kind, found in documents.items()))
    return Target("configs", cases, feed, materials.folder, ("config", sound[0]), dear=2)


def adapters(materials: Materials) -> Target:
    folder, out = materials.copy(materials.adapter, "adapters"), materials.place("adapters_out")
    config = json.loads((folder / "adapter_config.json").read_text())
    header, data = split_header(folder / "adapter_model.safetensors")
    sound = (folder / "adapter_config.json").read_bytes(), (folder / "adapter_model.safetensors").read_bytes()
    more = config | {"alpha_pattern": {"(a+)+$": 2}, "target_parameters": ["experts.down_proj"], "layer_replication": None}
    weights = st.builds(
        lambda changed: with_header(changed, data),
        st.one_of(json_bytes(header), spoilt(header).map(written), moved_offsets(header, len(data)).map(written)),
    )
    cases = st.one_of(*(st.tuples(st.just(0), json_bytes(found)) for found in (config, more)), st.tuples(st.just(1), weights.flatmap(tampered)))

    def feed(case: tuple[int, bytes]) -> None:
        for position, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
            (folder / name).write_bytes(case[1] if position == case[0] else sound[position])
        harden_case(materials.base, folder, out, base_is_right=True)

    return Target("adapters", cases, feed, materials.folder, (0, sound[0]), dear=2)
