"""`lox-merge curvature` as a function and as a command, on real checkpoint folders; its section of a report."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import TARGETS, make_adapter, merge
from conftest import RunCli
from curvature_reference import explicit_gradients, flat
from finetuned import finetune
from tiny_models import make_pair, read_tensors, tokenizer

import lox_merge
from lox_merge import CurvatureSettings
from lox_merge.errors import LoxMergeWarning, PlanError, RequestError
from lox_merge.publish.report.registry import sections_of
from lox_merge.publish.report.runs import Run
from lox_merge.safety.chat import Rendering
from lox_merge.safety.conversations import load_conversations, tokenised
from lox_merge.safety.loading import load_model

WORDS = ("how", "do", "i", "you", "help", "no", "yes", "sorry", "cannot")


def write_data(file: Path, count: int, answer: Callable[[int], str]) -> Path:
    rows = [{"prompt": f"how do i {WORDS[place % 9]} {WORDS[place // 3 % 9]}", "response": answer(place)} for place in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("curvature")
    _, aligned = make_pair(folder, "llama", "float32")
    return {
        "aligned": aligned,
        "tuned": finetune(aligned, folder / "tuned"),
        "safe": write_data(folder / "safe.jsonl", 12, lambda place: f"sorry i cannot {WORDS[place % 5]}"),
        "data": write_data(folder / "data.jsonl", 32, lambda place: f"yes you do {WORDS[place % 7]}"),
        "other": write_data(folder / "other.jsonl", 32, lambda place: f"no {WORDS[place % 9]} help"),
    }


SETTINGS = CurvatureSettings(learning_rate=0.01, batches=4, steps=(1, 10))


@pytest.fixture(scope="module")
def result(files: dict[str, Path]) -> lox_merge.Curvature:
    return lox_merge.curvature(
        files["aligned"], files["safe"], finetuned=[files["tuned"]], data=[files["data"], files["other"]], settings=SETTINGS, device="cpu"
    )


def test_figures_are_those_of_the_explicit_fisher_matrix(files: dict[str, Path], result: lox_merge.Curvature) -> None:
    loaded = load_model(files["aligned"], device="cpu")
    examples = tokenised(load_conversations(files["safe"]), loaded.tokenizer, Rendering(), 512)
    model = loaded.model.double()
    explicit = explicit_gradients(model, examples)
    tuned = read_tensors(files["tuned"])
    (overlap,) = result.finetuned
    total = 0.0
    for record, entry in zip(result.parameters, overlap["parameters"], strict=True):
        gradients = flat(explicit, (record["name"],))
        assert record["trace"] == pytest.approx(float(gradients.square().sum()) / 12, rel=1e-4)
        values = torch.linalg.eigvalsh(gradients @ gradients.T / 12).flip(0)
        assert record["smallest"] == pytest.approx(float(values[record["d"] - 1]), rel=1e-3)
        assert float(values[: record["d"]].sum()) >= 0.9 * record["trace"] * (1 - 1e-4)
        change = (tuned[record["name"]].double() - model.get_parameter(record["name"])).detach().flatten()
        assert entry["score"] == pytest.approx(float((gradients @ change).square().mean()), rel=1e-3)
        assert entry["expected"] == pytest.approx(float(change @ change) * record["trace"] / record["parameters"], rel=1e-3)
        total += entry["score"]
    assert overlap["score"] == pytest.approx(total) and overlap["name"] == "tuned" and not overlap["left_out"]
    everything = flat(explicit, tuple(record["name"] for record in result.parameters))
    change = torch.cat([(tuned[record["name"]].double() - model.get_parameter(record["name"])).detach().flatten() for record in result.parameters])
    assert overlap["joint"] == pytest.approx(float((everything @ change).square().mean()), rel=1e-3)
    assert overlap["predicted_loss"] == overlap["joint"] / 2


def test_data_sets_are_ranked_by_coupling(result: lox_merge.Curvature) -> None:
    couplings = {record["rank"]: record["coupling"]["value"] for record in result.data}
    assert couplings[1] > couplings[2] and [record["name"] for record in result.data] == ["data", "other"]
    for record in result.data:
        assert record["batches"] == 4 and record["examples_used"] == 32
        low, high = record["coupling"]["interval"]
        assert 0 < low < high and [point["time"] for point in record["predictions"]] == [0.01, 0.1]
        assert record["expected_overlap_share"] == pytest.approx(math.sqrt(result.fisher["d"] / result.fisher["parameters"]))
        assert [layer["layer"] for layer in record["layers"]] == [0, 1]
    json.dumps(result.to_json(), allow_nan=False)


def test_models_in_memory_adapters_and_tensors_give_the_same_overlap(files: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(files["aligned"], tmp_path / "adapter", **TARGETS["llama"])
    merge(files["aligned"], adapter, tmp_path / "merged")
    tokenizer().save_pretrained(tmp_path / "merged")
    aligned, merged = load_model(files["aligned"], device="cpu"), load_model(tmp_path / "merged", device="cpu")
    before = {name: value.clone() for name, value in aligned.model.state_dict().items()}
    changes = {name: value - aligned.model.get_parameter(name).detach() for name, value in merged.model.state_dict().items() if "rotary" not in name}
    from_files = lox_merge.curvature(files["aligned"], files["safe"], finetuned={"a": adapter, "m": tmp_path / "merged"}, device="cpu")
    in_memory = lox_merge.curvature(aligned, files["safe"], finetuned={"m": merged.model, "l": merged, "t": changes, "f": tmp_path / "merged"})
    scores = [model["joint"] for model in (*from_files.finetuned, *in_memory.finetuned)]
    assert scores == pytest.approx([scores[0]] * 6, rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in aligned.model.state_dict().items())


def test_overlap_of_a_part_of_the_parameters_is_beside_chance_over_that_part(files: dict[str, Path]) -> None:
    loaded, names = load_model(files["aligned"], device="cpu"), ("model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    generator = torch.Generator().manual_seed(4)
    change = {name: torch.randn(loaded.model.get_parameter(name).shape, generator=generator) for name in names}
    found = lox_merge.curvature(loaded, files["safe"], finetuned={"part": change})
    traces = {record["name"]: record["trace"] for record in found.parameters}
    squares = {name: float(value.double().square().sum()) for name, value in change.items()}
    sizes = {name: value.numel() for name, value in change.items()}
    (overlap,) = found.finetuned
    assert overlap["norm"] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-6)
    assert overlap["expected"] == pytest.approx(sum(squares[name] * traces[name] / sizes[name] for name in names), rel=1e-6)
    chance = sum(squares.values()) * sum(traces[name] for name in names) / sum(sizes.values())
    assert overlap["joint_expected"] == pytest.approx(chance, rel=1e-6)
    assert overlap["joint_ratio"] == pytest.approx(overlap["joint"] / chance, rel=1e-6) and overlap["predicted_loss"] == overlap["joint"] / 2


def test_overlap_scores_take_one_pass_more_however_many_models(files: dict[str, Path]) -> None:
    """And nothing of the model is changed, by second derivatives neither."""
    loaded = load_model(files["aligned"], device="cpu")
    seen: list[int] = []
    loaded.model.register_forward_hook(lambda *_: seen.append(1))

    def forwards(**options: Any) -> int:
        seen.clear()
        lox_merge.curvature(loaded, files["safe"], batch_size=100, settings=SETTINGS, **options)
        return len(seen)

    alone = forwards()
    assert forwards(finetuned=[files["tuned"]]) == forwards(finetuned={"one": files["tuned"], "two": files["tuned"], "three": {}}) == alone + 1
    forwards(finetuned=[files["tuned"]], data=[files["data"]])
    stored = read_tensors(files["aligned"])
    assert all(torch.equal(value, stored[name]) for name, value in loaded.model.state_dict().items())
    assert not loaded.model.training and all(parameter.requires_grad and parameter.grad is None for parameter in loaded.model.parameters())


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "qwen3"])
def test_other_layouts_are_read_from_their_files(architecture: str, tmp_path: Path, files: dict[str, Path]) -> None:
    _, aligned = make_pair(tmp_path, architecture, "float32")
    tuned = finetune(aligned, tmp_path / "tuned")
    found = lox_merge.curvature(aligned, files["safe"], finetuned=[tuned], device="cpu")
    memory = lox_merge.curvature(aligned, files["safe"], finetuned=[load_model(tuned, device="cpu")], device="cpu")
    assert found.finetuned[0]["joint"] == pytest.approx(memory.finetuned[0]["joint"], rel=1e-6)
    assert len(found.finetuned[0]["parameters"]) == len(found.parameters)


def test_a_small_memory_gives_the_same_figures(files: dict[str, Path], result: lox_merge.Curvature) -> None:
    settings = CurvatureSettings(learning_rate=0.01, batches=4, steps=(1, 10), memory=400_000)
    small = lox_merge.curvature(files["aligned"], files["safe"], data=[files["data"]], settings=settings, device="cpu", batch_size=3)
    assert small.document["passes"] > 1 and small.fisher["trace"] == pytest.approx(result.fisher["trace"], rel=1e-5)
    assert small.data[0]["coupling"]["value"] == pytest.approx(result.data[0]["coupling"]["value"], rel=1e-3)


def test_the_fused_attention_comes_back_and_half_precision_is_said(files: dict[str, Path]) -> None:
    loaded = load_model(files["aligned"], device="cpu", dtype="bfloat16")
    kind = loaded.model.config._attn_implementation
    settings = CurvatureSettings(layers=(1,), only=("mlp",), batches=1)
    with pytest.warns(LoxMergeWarning, match=r"bfloat16|no interval") as said:
        found = lox_merge.curvature(loaded, files["safe"], data=[files["data"]], settings=settings)
    assert loaded.model.config._attn_implementation == kind and len(found.parameters) == 3
    assert found.data[0]["coupling"]["interval"] is None and len(found.document["warnings"]) == 2
    # Of processors without AVX-512, which take long for these types: nothing that the result has to say.
    slow = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") and platform.machine() == "x86_64"
    assert any("hundred times" in str(warning.message) for warning in said) == slow
    assert any("eager in place of" in note for note in found.document["notes"])


def test_wrong_requests_are_found_before_a_model_is_loaded(files: dict[str, Path], tmp_path: Path) -> None:
    _, wider = make_pair(tmp_path / "wider", "llama", "float32", hidden=48)
    with pytest.raises(PlanError, match="differs in shape"):
        lox_merge.curvature(files["aligned"], files["safe"], finetuned=[wider])
    _, deeper = make_pair(tmp_path / "deeper", "llama", "float32", layers=3)
    with pytest.raises(PlanError, match=r"has no model\.layers\.2"):
        lox_merge.curvature(deeper, files["safe"], finetuned=[files["tuned"]])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RequestError, match="no examples"):
        lox_merge.curvature(files["aligned"], tmp_path / "empty.jsonl")
    with pytest.raises(RequestError, match="no layer 7; it has 0 to 1 layers"):
        lox_merge.curvature(files["aligned"], files["safe"], settings=CurvatureSettings(layers=(0, 7)))
    with pytest.raises(RequestError, match="names no parameter"):
        lox_merge.curvature(files["aligned"], files["safe"], settings=CurvatureSettings(only=("mpl",)))
    for wrong in ({"energy": 0.0}, {"reduction": "max"}, {"steps": ()}, {"only": ("(",)}, {"learning_rate": math.nan}, {"limit": 0}):
        with pytest.raises(RequestError):
            CurvatureSettings(**wrong)
    aligned = load_model(files["aligned"], device="cpu")
    with pytest.raises(RequestError, match="has no model"):
        lox_merge.curvature(aligned, files["safe"], finetuned=[torch.nn.Linear(2, 2)])
    with pytest.raises(RequestError, match="no parameter of LlamaForCausalLM"):
        lox_merge.curvature(aligned, files["safe"], finetuned=[{"wrong": torch.zeros(1)}])


def test_the_command_writes_what_the_report_reads(run_cli: RunCli, files: dict[str, Path], tmp_path: Path) -> None:
    common = ["curvature", files["aligned"], files["tuned"], "--completions", files["safe"], "--device", "cpu"]
    settings = ["--data", files["data"], "--learning-rate", "0.01", "--projected", "64", "--projection-seeds", "2", "--batches", "2", "--layers", "1"]
    done = run_cli(*common, *settings, "--json", "run.json", "--plot", "p.svg", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for words in ("Fisher matrix by layer", "Overlap scores", "Data sets by risk", "projected", "eager in place of sdpa"):
        assert words in done.stdout
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["command"] == "curvature" and str(tmp_path) not in json.dumps(document)
    assert len(document["finetuned"][0]["parameters"][0]["projected"]["plain"]) == 2
    page = run_cli("report", "run.json", "-o", "page.html", cwd=tmp_path)
    assert page.returncode == 0, page.stderr
    assert "Curvature of safe behaviour" in (tmp_path / "page.html").read_text()


def test_wrong_commands_end_with_2_and_one_sentence(run_cli: RunCli, files: dict[str, Path], tmp_path: Path) -> None:
    for arguments, words in (
        (["--completions", tmp_path / "absent.jsonl"], "is not a file"),
        (["--completions", files["safe"], "--layers", "one"], "not a list of whole numbers"),
        (["--completions", files["safe"], "--energy", "2"], "above 0 and at most 1"),
    ):
        done = run_cli("curvature", files["aligned"], *arguments)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_the_section_shows_every_figure_and_says_what_it_does_not(result: lox_merge.Curvature) -> None:
    document: dict[str, Any] = {"command": "curvature", **result.to_json()}
    (section,) = sections_of(Run("run.json", "0" * 64, document))
    assert {picture.name for picture in section.pictures} == {
        *("predicted_loss", "couplings", "overlap_by_layer", "overlap_tuned", "fisher_spectra", "layer_spectra")
    }
    for picture in section.pictures:
        assert picture.build().axes
    ranks = [row[1].value for row in section.tables[0].rows]
    assert ranks == [1, 2] and any("Adam" in text for text in section.not_shown)
    assert len(section.tables[3].rows) == len(result.parameters)


def test_completions_without_gradients_give_null_and_no_pictures(files: dict[str, Path]) -> None:
    aligned = load_model(files["aligned"], device="cpu")
    with torch.no_grad():
        aligned.model.lm_head.weight.zero_()
    settings = CurvatureSettings(exclude=("lm_head",), batches=2)
    found = lox_merge.curvature(aligned, files["safe"], finetuned=[files["tuned"]], data=[files["data"]], settings=settings)
    assert found.fisher["d"] is None and found.data[0]["coupling"] is None and found.data[0]["rank"] is None
    assert found.finetuned[0]["ratio"] is None
    (section,) = sections_of(Run("run.json", "0" * 64, {"command": "curvature", **found.to_json()}))
    assert not section.pictures and "nothing can be said" in section.summary
    from lox_merge.cli.show_curvature import print_curvature

    print_curvature(found)
