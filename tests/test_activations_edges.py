"""What cannot be compared is refused before weights are loaded, what is undefined is null; the command line and the report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import make_adapter, merge
from safetensors.torch import save_file
from tiny_models import make_pair, read_tensors, tokenizer

import lox_merge
from lox_merge.errors import LoxMergeError, NumericalError, PlanError, RequestError
from lox_merge.publish.report.activations import activations_sections
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import Conversations, conversations
from lox_merge.safety.loading import load_model
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.types import Prompt

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("pair"), "llama", change=0.3)


def domain(*turns: tuple[str, str], name: str = "first") -> Conversations:
    turns = turns or (("how do i", "no sorry i cannot"), ("do you help", "yes"), ("i cannot", "yes i do help"))
    return conversations(name, f"{name}.jsonl", [[{"role": "user", "content": one}, {"role": "assistant", "content": other}] for one, other in turns])


def measured(pair: Pair, *models: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {"pairs": [domain()], "device": "cpu", "layers": [0, -1], "permutations": 5}
    return lox_merge.activations(*pair, models, **settings | options)


def test_one_response_has_no_interval(pair: Pair) -> None:
    found = measured(pair, pairs=[domain(("how do i", "no sorry"))])
    for layer in found.domains[0].layers:
        assert layer.separation.interval is None and layer.cross_validated.value is None
        assert layer.separation.value == pytest.approx(layer.norm) == pytest.approx(layer.swapped)
    assert any("one response only" in note for note in found.notes)


def test_models_that_do_not_differ(pair: Pair) -> None:
    same = measured((pair[1], pair[1]), rendering=Rendering())
    for layer in same.domains[0].layers:
        assert layer.norm == 0 and layer.separation.value is None
        assert all(found.position.value is None and found.off_line is None for found in layer.models.values())
    assert same.domains[0].residual.shares == () and any("no direction" in note for note in same.notes)
    again = measured(pair, pair[1])
    assert again.models == ("base", "aligned", "aligned (2)")
    found = again.domains[0].layers[-1].models["aligned (2)"]
    assert found.position.value == 1 and found.position.interval == (1, 1) and found.off_line == pytest.approx(0, abs=1e-9)
    assert any("aligned (2) has the same projections as aligned" in note for note in again.notes)
    json.dumps(same.to_json(), allow_nan=False)


def test_an_adapter_is_a_model(pair: Pair, tmp_path: Path) -> None:
    adapter = make_adapter(pair[1], tmp_path / "adapter")
    whole = tmp_path / "whole"
    merge(pair[1], adapter, whole)
    for file in pair[1].glob("*token*"):
        shutil.copy(file, whole)
    found = measured(pair, adapter, whole).domains[0].layers[-1].models
    assert found["adapter"].position.value == pytest.approx(found["whole"].position.value, abs=0.05)
    assert found["adapter"].position.value != 1


def test_sums_of_bfloat16_states_are_wider(pair: Pair) -> None:
    """bf16 models, float64 sums: a hundred equal texts have the direction of one, and separate by its norm."""
    one, many = (measured(pair, pairs=[domain(*[("how do i", "no sorry")] * count)]).domains[0].layers[-1] for count in (1, 100))
    assert many.norm == pytest.approx(one.norm, rel=1e-6)
    assert many.separation.value == pytest.approx(one.norm, rel=1e-6)
    assert many.separation.interval == pytest.approx((one.norm, one.norm), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [3]}, "layer 3 does not exist"),
        ({"layers": [-4]}, "layer -4 does not exist"),
        ({"layers": []}, "no layer"),
        ({"pairs": []}, "nothing to read"),
        ({"pairs": [domain(), domain()]}, "same name"),
        ({"pairs": [domain(("how", "   "))]}, "no token of a response"),
        ({"pairs": [domain(("how " * 70, "no"))]}, "more than the 64"),
        ({"prompts": {"one": prompt_set([Prompt("0", "how")], "x")}}, "nothing to be compared with"),
        ({"prompts": {name: prompt_set([Prompt("0", "how " * count)], "x") for name, count in (("one", 1), ("two", 80))}}, "two: prompt"),
        ({"etas": [1.5]}, "--eta"),
        ({"tokens": 0}, "0 tokens leave"),
        ({"vector": "first"}, "not known"),
        ({"permutations": -1}, "permutations"),
        ({"limit": 0}, "limit"),
        ({"rendering": Rendering(chat_template=False, system="x")}, "system"),
    ],
)
def test_what_cannot_be_read_is_refused(pair: Pair, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        measured(pair, **options)


def test_models_that_cannot_be_compared(pair: Pair, tmp_path: Path) -> None:
    wide, _ = make_pair(tmp_path / "wide", "llama", hidden=64)
    with pytest.raises(RequestError, match=r"2 layers of width 32, base \(2\) 2 of width 64"):
        measured(pair, wide)
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    words = tokenizer()
    words.add_tokens(["new"])
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    vocabulary["how"], vocabulary["do"] = vocabulary["do"], vocabulary["how"]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(RequestError, match="different vocabularies"):
        measured(pair, other)
    with pytest.raises(PlanError, match="nowhere"):
        measured(pair, tmp_path / "nowhere")


def test_states_that_are_not_finite(pair: Pair, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(pair[0], broken)
    tensors = read_tensors(broken)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    before = load_model(pair[1], device="cpu")
    with pytest.raises(NumericalError, match="not finite"):
        measured(pair, broken)
    with pytest.raises(LoxMergeError):
        lox_merge.activations(load_model(broken, device="cpu"), before, pairs=[domain()])
    assert all(torch.equal(before.model.state_dict()[name], tensor) for name, tensor in read_tensors(pair[1]).items())


def test_the_command_and_its_report(pair: Pair, tmp_path: Path, run_cli: Callable[..., Any]) -> None:
    pairs, more = tmp_path / "refused.jsonl", tmp_path / "harmless.jsonl"
    for file, response in ((pairs, "no sorry i cannot"), (more, "yes i help")):
        file.write_text("\n".join(json.dumps({"prompt": text, "response": response}) for text in ("how do i", "do you", "i cannot")))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("how do i\nhelp\nyou cannot\ni do\n")
    options = ["--pairs", pairs, "--pairs", more, "--prompts", f"one={prompts}", "--prompts", prompts, "--permutations", 5, "--device", "cpu"]
    out, plot, page = tmp_path / "found.json", tmp_path / "found.svg", tmp_path / "report.html"
    done = run_cli("activations", *pair, pair[1], *options, "--eta", "0.5,0.9", "--json", out, "--plot", plot, COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 150 and "cross-validated" in done.stdout and plot.stat().st_size > 1000
    document = json.loads(out.read_text())
    assert document["command"] == "activations" and document["models"] == ["base", "aligned", "aligned (2)"]
    assert str(tmp_path) not in out.read_text()
    (section,) = activations_sections(document, "found.json")
    assert len({picture.name for picture in section.pictures}) == len(section.pictures) > 8
    table = section.tables[0]
    layers = [layer for one in document["domains"] for layer in one["layers"]]
    assert [row[2].value for row in table.rows] == [layer["separation"]["value"] for layer in layers]
    assert [row[5].value for row in table.rows] == [layer["cross_validated"]["value"] for layer in layers]
    assert run_cli("report", out, "-o", page).returncode == 0
    assert "no harmless" not in page.read_text()
    wrong = run_cli("activations", *pair, "--pairs", pairs, "--layers", "0,x")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr and "--layers" in wrong.stderr
