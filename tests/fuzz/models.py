"""Hostile models that are to answer: configuration, tokenizer, chat template, generation settings, through transformers itself."""

from __future__ import annotations

import json

from hypothesis import strategies as st

from fuzz.cases import Target
from fuzz.hostile import json_bytes
from fuzz.materials import Materials
from lox_merge.safety.decoding import Decoding
from lox_merge.safety.generation import LocalModel
from lox_merge.safety.types import Prompt, PromptSet

TEMPLATES = (
    *("{{ messages }}", "{% for m in messages %}", "{{ 1 // 0 }}", "{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}"),
    *("{{ raise_exception('no') }}", "{{ range(10**12) | list }}", "{{ 'x' * 10**5 }}", "{% for i in range(10**6) %}x{% endfor %}", ""),
)


def models(materials: Materials) -> Target:
    folder = materials.copy(materials.aligned, "models")
    names = ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json")
    sound = {name: (folder / name).read_bytes() for name in (*names, "chat_template.jinja")}
    spoilt = [st.tuples(st.just(name), json_bytes(json.loads(sound[name]))) for name in names]
    cases = st.one_of(*spoilt, st.tuples(st.just("chat_template.jinja"), st.sampled_from(TEMPLATES).map(str.encode)))
    asked = PromptSet((Prompt("0", "how do"),), "0" * 64, "prompts")

    def feed(case: tuple[str, bytes]) -> None:
        for name, data in sound.items():
            (folder / name).write_bytes(case[1] if name == case[0] else data)
        LocalModel.load(folder, device="cpu", decoding=Decoding(max_new_tokens=2)).replies(asked)

    return Target("models", cases, feed, materials.folder, (names[0], sound[names[0]]), dear=4)
