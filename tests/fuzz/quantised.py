"""Hostile quantised checkpoints: the settings in config.json, the headers of codes and scales, and the scales themselves."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st
from quantised_models import as_block_fp8, as_packed

from fuzz.cases import Target
from fuzz.checkpoints import harden_case, moved_offsets
from fuzz.hostile import json_bytes, spoilt, written
from fuzz.materials import WEIGHTS, Materials, split_header, with_header
from lox_merge import inspect
from lox_merge.diagnostics.settings import InspectSettings
from lox_merge.safety.decoding import Decoding
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.types import Prompt, PromptSet


def quantised(materials: Materials) -> Target:
    """Of two forms. A case goes through an edit that keeps the form, or writes a plain model, or an inspection, or is asked as a model."""
    folders, sound, cases = [], [], []
    for place, store in enumerate((as_block_fp8, as_packed)):
        folder = store(materials.single, materials.place(f"quantised_{store.__name__}"))
        header, data = split_header(folder / WEIGHTS)
        config = json.loads((folder / "config.json").read_text())
        settings = spoilt(config["quantization_config"], places=4).map(lambda found, config=config: written(config | {"quantization_config": found}))
        spans = moved_offsets(header, len(data))
        headers = st.one_of(json_bytes(header), st.one_of(spoilt(header), spans).map(written))
        weights = headers.map(lambda found, data=data: with_header(found, data))
        scales = _spoilt_scales(header, data)
        kinds = {"config.json": st.one_of(json_bytes(config), settings, settings), WEIGHTS: st.one_of(weights, scales)}
        ways = st.sampled_from(("form", "plain", "inspect", "ask"))
        cases += [st.tuples(st.just(place), ways, st.just(file), found) for file, found in kinds.items()]
        folders.append(folder)
        sound.append({file: (folder / file).read_bytes() for file in kinds})
    out = materials.place("quantised_out")
    asked = PromptSet((Prompt("0", "how do"),), "0" * 64, "prompts")

    def feed(case: tuple[int, str, str, bytes]) -> None:
        place, way, file, data = case
        folder = folders[place]
        for name, whole in sound[place].items():
            (folder / name).write_bytes(data if name == file else whole)
        if way == "inspect":
            inspect(materials.base, folder, settings=InspectSettings(rank=2, skip_non_finite=True), order_is_right=True, device="cpu")
        elif way == "ask":
            LocalModel.load(folder, device="cpu", decode=True, decoding=Decoding(max_new_tokens=2)).replies(asked)
        else:
            harden_case(materials.base, folder, out, requantise=way == "form", dtype=None if way == "form" else "float32")

    first = (0, "form", "config.json", sound[0]["config.json"])
    return Target("quantised", st.one_of(*cases), feed, materials.folder, first, dear=3)


@st.composite
def _spoilt_scales(draw: Any, header: dict[str, Any], data: bytes) -> bytes:
    """Some bytes of scales, or of the shape beside packed words, replaced: NaN, infinities, negative and enormous numbers."""
    spans = [entry["data_offsets"] for name, entry in header.items() if name.endswith(("_scale_inv", "_scale", "_shape"))]
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        first, last = draw(st.sampled_from(spans))
        at = draw(st.integers(first, last - 1))
        piece = draw(st.sampled_from((b"\xff", b"\x7f", b"\x80", b"\x00" * 4, b"\xc0\x7f", b"\x80\xff", b"\xff" * 8)))[: last - at]
        changed[at : at + len(piece)] = piece
    return with_header(written(header), bytes(changed))
