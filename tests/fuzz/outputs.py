"""Hostile files that this program wrote once: factors, manifests (to verify, to publish, to go on from), working states."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz.cases import Target
from fuzz.checkpoints import harden_case
from fuzz.hostile import json_bytes, with_hostile_texts, written
from fuzz.materials import Materials, remove, split_header, with_header
from lox_merge import Recipe, harden
from lox_merge.errors import LoxMergeError
from lox_merge.jobs.decompose import decompose
from lox_merge.jobs.factors import METADATA_KEY, Factors
from lox_merge.jobs.verify import verify
from lox_merge.publish.card import CardSettings, build_card
from lox_merge.publish.licence import Licence
from lox_merge.publish.output import open_output

MANIFEST = "lox_merge.json"


def factors(materials: Materials) -> Target:
    file, out = materials.place("factors.safetensors"), materials.place("factors_out")
    header, data = split_header(materials.factors)
    document = json.loads(header["__metadata__"][METADATA_KEY])

    def inner(changed: bytes) -> bytes:
        text = changed.decode("utf-8", "replace")
        return with_header(json.dumps(header | {"__metadata__": {METADATA_KEY: text}}).encode(), data)

    cases = st.one_of(json_bytes(document).map(inner), json_bytes(header).map(lambda changed: with_header(changed, data)))

    def feed(case: bytes) -> None:
        file.write_bytes(case)
        try:
            with Factors.open(file) as opened:
                _ = opened.recipe, opened.titles
                for name, part in opened.matrices:
                    opened.subspace(name, part)
        finally:
            harden_case(materials.base, materials.aligned, out, factors=file)
            decompose(materials.base, materials.aligned, file, recipe=Recipe(rank=3), device="cpu")

    return Target("factors", cases, feed, materials.folder, materials.factors.read_bytes(), dear=2)


def manifests(materials: Materials) -> Target:
    folder = materials.copy(materials.hardened, "manifests")
    document = json.loads((folder / MANIFEST).read_text())
    hub = json.loads(json.dumps(document))
    hub["sources"]["base"] |= {"kind": "hub", "name": "org/base", "revision": None, "commit": "0" * 40}

    def feed(case: bytes) -> None:
        (folder / MANIFEST).write_bytes(case)
        failures = []
        for use in (_card, _verify, _again):
            try:
                use(folder, materials)
            except LoxMergeError as error:
                failures.append(error)
        if len(failures) == 3:
            raise failures[0]

    return Target(
        "manifests",
        st.one_of(json_bytes(document), json_bytes(hub), with_hostile_texts(document).map(written)),
        feed,
        materials.folder,
        written(document),
        dear=3,
    )


def _card(folder: Path, _: Materials) -> None:
    build_card(open_output(folder), "me/model", CardSettings(licence=Licence("mit")))


def _verify(folder: Path, materials: Materials) -> None:
    verify(folder, base=materials.base, aligned=materials.aligned, sample=1)


def _again(folder: Path, materials: Materials) -> None:
    """The same job on the same output: it looks at the manifest to see that there is nothing to do."""
    harden(materials.base, materials.aligned, folder, recipe=Recipe(rank=2), device="cpu")


def working_states(materials: Materials) -> Target:
    """`.lox_merge/` of an unfinished output, from which the same command goes on."""
    template, out = _unfinished(materials), materials.place("unfinished_out")
    state = template / ".lox_merge"
    records = sorted(path.name for path in state.glob("*.json"))
    cases = st.one_of(*(st.tuples(st.just(name), json_bytes(json.loads((state / name).read_text()))) for name in records))

    def feed(case: tuple[str, bytes]) -> None:
        remove([out])
        shutil.copytree(template, out)
        (out / ".lox_merge" / case[0]).write_bytes(case[1])
        harden(materials.base, materials.aligned, out, recipe=Recipe(rank=2), device="cpu")

    return Target("working states", cases, feed, materials.folder, ("job.json", (state / "job.json").read_bytes()), dear=3)


def _unfinished(materials: Materials) -> Path:
    """As a process leaves it that was killed after its first shard."""
    child = os.fork()
    out = materials.place("unfinished")
    if child == 0:
        from lox_merge.jobs import journal

        before = journal.Journal.record

        def record(self: Any, file: str, values: Any) -> None:
            before(self, file, values)
            os._exit(0)

        journal.Journal.record = record  # type: ignore[method-assign]
        harden(materials.base, materials.aligned, out, recipe=Recipe(rank=2), device="cpu")
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    return out
