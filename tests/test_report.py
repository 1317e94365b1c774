"""The report page and the command that writes it, from real runs on the toy pair and from files that are not runs."""

from __future__ import annotations

import base64
import copy
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import RunCli

from lox_merge.cli.report import report_command
from lox_merge.errors import OutputError, RequestError
from lox_merge.publish.report import page as page_module
from lox_merge.publish.report.page import LARGEST_PAGE, make_report, render
from lox_merge.publish.report.runs import Run, read_run

RUNS = ("harden", "search", "asr", "robustness", "one_seed", "decompose", "verify")
VOID = {"meta", "br", "hr", "img", "link", "input"}


@dataclass
class Page(HTMLParser):
    """A page, read strictly: every element closed in order. tables: by caption and place among those, the cells' (text, data-value)."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    tables: dict[str, list[list[list[tuple[str, str | None]]]]] = field(default_factory=dict)
    text: str = ""
    script: str = ""
    _open: list[str] = field(default_factory=list)
    _caption: str = ""
    _value: str | None = None

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute twice in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "caption":
            self._caption = ""
        if tag == "tbody":
            self.tables.setdefault(self._caption, []).append([])
        if tag == "tr" and "tbody" in self._open:
            self.tables[self._caption][-1].append([])
        if tag in ("td", "th") and "tbody" in self._open:
            self.tables[self._caption][-1][-1].append(("", dict(attrs).get("data-value")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data
        if "script" in self._open:
            self.script += data
        if "caption" in self._open:
            self._caption += data
        if self._open and self._open[-1] in ("td", "th") and "tbody" in self._open:
            cells = self.tables[self._caption][-1][-1]
            cells[-1] = (cells[-1][0] + data, cells[-1][1])

    def values(self, caption: str, place: int = 0) -> list[list[Any]]:
        """What a table's cells say of their values; None where a cell has none."""
        return [[None if value is None else _number(value) for _, value in row] for row in self.tables[caption][place]]


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def read(html: bytes) -> Page:
    found = Page()
    found.feed(html.decode("utf-8"))
    found.close()
    assert found._open == []
    return found


def run_of(document: dict[str, Any], folder: Path, name: str = "run") -> Run:
    file = folder / f"{name}.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    return read_run(file)


@pytest.fixture(scope="module")
def html(report_runs: Path) -> bytes:
    return render(make_report([read_run(report_runs / f"{name}.json") for name in RUNS]), "Toy & co")


def test_the_page_is_whole_and_needs_nothing_else(html: bytes, report_runs: Path) -> None:
    page = read(html)
    text = html.decode()
    assert len(html) < LARGEST_PAGE
    assert [tag for tag, _ in page.tags[:3]] == ["html", "head", "meta"] and text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", text.replace(page.script, "")), "something from elsewhere"
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "image", "iframe", "object", "embed", "base", "form")]
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    assert "fetch" not in page.script and "XMLHttp" not in page.script and "import" not in page.script
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "src"]
    (policy,) = [attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    references = re.findall(r"(?:href=\"#|url\(#|aria-labelledby=\")([^\")]+)", text)
    assert references and set(references) <= set(identities)
    assert str(report_runs) not in text and str(Path.home()) not in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "<title>Toy &amp; co</title>" in text


def test_pictures_have_titles_captions_and_names_for_figure(html: bytes) -> None:
    page = read(html)
    figures = [attributes["id"] for tag, attributes in page.tags if tag == "figure"]
    assert {"r_align", "asr_against_rank", "asr", "asr_differences", "asr_against_steps_harmful", "asr_with_and_without"} <= set(figures)
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) == len(figures) and all(attributes["role"] == "img" and "viewbox" in attributes for attributes in drawings)
    assert "currentColor" in html.decode() and "var(--blue)" in html.decode() and "#0072b2;" not in html.decode().split("</style>")[1]


def test_the_same_runs_give_the_same_bytes_in_another_process(report_runs: Path, tmp_path: Path) -> None:
    files = [report_runs / f"{name}.json" for name in ("search", "asr", "decompose")]
    html = render(make_report([read_run(file) for file in files]), "Toy & co")
    command = [sys.executable, "-m", "lox_merge.cli.main", "report", *files, "-o", tmp_path / "again.html", "--title", "Toy & co"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    assert (tmp_path / "again.html").read_bytes() == html


def test_the_numbers_of_a_search(html: bytes, documents: dict[str, dict[str, Any]]) -> None:
    search, page = documents["search"], read(html)
    rows = page.values("ASR of base + Proj_r(delta)")
    expected = [
        [
            *(point["rank"], attack["rate"], *attack["interval"], attack["judged"], attack["undecided"], point["increase"], point["upper_bound"]),
            *(point["mean_r_align"], point["energy_r_align"], point["utility"]["KL"], "yes" if point["accepted"] else "no"),
        ]
        for point in search["curve"]
        for attack in [point["attack"]]
    ]
    assert rows[:-1] == expected
    assert rows[-1][:4] == ["aligned", search["aligned"]["rate"], *search["aligned"]["interval"]] and rows[-1][6:10] == [None] * 4
    assert f"effective rank of aligned is {search['effective_rank']}" in page.text


def test_the_numbers_of_attack_success(html: bytes, documents: dict[str, dict[str, Any]]) -> None:
    page, asr = read(html), documents["asr"]
    found = {(row[0], row[1]): row[2:] for row in page.values("Attack success rates")}
    for one in asr["evaluations"]:
        for judge, rate in one["attack_success"].items():
            title = f"{judge} (smoke test)" if judge == "keyword" else judge
            counts = [rate["successes"], rate["judged"], rate["undecided"], rate["n"]]
            assert found[one["title"], title] == [rate["rate"], *rate["interval"], *counts, rate["mean_score"]]
    compared = {(row[0], row[2]): row[3:] for row in page.values("Paired differences")}
    for one in asr["comparisons"]:
        rest = [one["n"], one["only_first"], one["only_second"], one["p_value"]]
        assert compared[one["second"], one["judge"]] == [one["difference"], *one["interval"], *rest]
    assert "keyword is a smoke test" in page.text


@pytest.mark.parametrize(("name", "place"), [("robustness", 0), ("one_seed", 1)])
def test_the_numbers_under_attack(name: str, place: int, html: bytes, documents: dict[str, dict[str, Any]]) -> None:
    page, document = read(html), documents[name]
    for attack in document["attacks"]:
        for judge in document["judges"]:
            expected = []
            for curve in document["curves"]:
                if curve["attack"] == attack["name"]:
                    for point in curve["points"]:
                        rate, paired = point["attack_success"][judge], point["against_aligned"].get(judge)
                        change = [paired["difference"], *paired["interval"], paired["p_value"]] if paired else [None] * 4
                        weights = [point["r_ft"]["mean"], point["r_ft_over_r_align"], *point["utility"].values()]
                        expected.append([curve["model"], curve["seed"], point["step"], rate["rate"], *rate["interval"], *change, *weights])
            assert page.values(f"Attack {attack['name']}, judged by {judge}", place) == expected
    for words in ("delays the erosion", "not over seeds", "One seed"):
        assert words in page.text


def test_the_numbers_of_a_hardening_and_of_its_manifest(html: bytes, report_runs: Path, documents: dict[str, dict[str, Any]]) -> None:
    manifest = make_report([read_run(report_runs / "hardened")]).sections[0]
    assert manifest.tables == make_report([read_run(report_runs / "harden.json")]).sections[0].tables
    page = read(html)
    found = {row[0]: row for row in page.values("Edited matrices, the largest R_align first")}
    ratios = [row[4] for row in page.values("Edited matrices, the largest R_align first")]
    assert ratios == sorted(ratios, reverse=True)
    edited = [(tensor, matrix) for tensor in documents["harden"]["tensors"] for matrix in tensor.get("matrices", [])]
    assert len(found) == len(edited) == documents["harden"]["summary"]["edited_matrices"]
    for tensor, matrix in edited:
        row = found[tensor["name"]]
        assert row[2:5] == [6, 1.25, matrix["r_align"]] and row[5] == pytest.approx((6 / matrix["shape"][0]) ** 0.5)
        assert row[6:8] == [matrix["delta_norm"], matrix["singular_values"][0]]
        assert row[8:] == [matrix["realised"]["gain"], matrix["realised"]["cosine"], matrix["certificate"]["angle_bound"]]
    assert f"{documents['harden']['summary']['mean_r_align']:.3f} of the norm of a delta" in page.text


def test_text_from_the_json_stays_text(documents: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&<b>$\\frac{$ ]]> --> {{ 7*7 }}\x07\u202e"
    asr, attack, harden = documents["asr"], documents["one_seed"], documents["decompose"]
    asr["evaluations"][0]["title"] = asr["comparisons"][0]["first"] = evil
    text = json.dumps(attack).replace('"harmful"', json.dumps(evil)).replace('"keyword"', json.dumps("_" + evil)).replace('"LoX"', '"<i>"')
    asr["evaluations"][1]["title"] = asr["comparisons"][0]["second"] = asr["comparisons"][1]["second"] = "$\\frac{$"
    harden["sources"]["base"]["name"] = "a\ud800<u>b"
    harden["matrices"][0]["name"] = "model.layers.0.<img src=x onerror=alert(1)>.weight"
    runs = [run_of(asr, tmp_path, "<s>"), run_of(json.loads(text), tmp_path, "two"), run_of(harden, tmp_path, "three")]
    html = render(make_report(runs), evil.replace("\x07\u202e", ""))
    page = read(html)
    assert [tag for tag, _ in page.tags].count("script") == 1 and not {"b", "i", "u", "s", "img"} & {tag for tag, _ in page.tags} - {"b"}
    assert page.script.startswith("// Heads of tables")
    assert evil.replace("\x07", "\ufffd").replace("\u202e", "\ufffd") in page.text and "<s>.json" in page.text and "a\ufffd<u>b" in page.text
    assert "49" not in [text for text in page.text.split() if text == "49"] and "{{ 7*7 }}" in page.text


def test_undefined_is_said_and_never_zero(documents: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    search, attack = documents["search"], documents["one_seed"]
    nothing = {"n": 30, "judged": 0, "successes": 0, "undecided": 30, "rate": None, "interval": None, "mean_score": None}
    for point in search["curve"]:
        point.update(attack=nothing, increase=None, upper_bound=None, accepted=False, mean_r_align=None, energy_r_align=None)
        point["utility"] = {"KL": None}
    search.update(aligned=nothing, effective_rank=None, noise_floor={"median": None, "smallest": None, "largest": None, "open": 0})
    for curve in attack["curves"]:
        for point in curve["points"]:
            point["attack_success"] = dict.fromkeys(point["attack_success"], nothing)
            point["r_ft_over_r_align"] = None
            point["r_ft"] = {"mean": None, "energy": None, "matrices": 0}
    page = read(render(make_report([run_of(search, tmp_path, "search"), run_of(attack, tmp_path, "attack")]), "t"))
    for row in page.tables["ASR of base + Proj_r(delta)"][0][:-1]:
        assert [row[column] for column in (1, 2, 3, 6, 7, 8, 9, 10)] == [("undefined", None)] * 8
    assert "ASR of aligned or LoX is undefined" in page.text and "aligned undefined and LoX undefined" in page.text
    assert "No tried rank is as safe" in page.text


def test_a_page_of_many_matrices_stays_small_and_says_what_it_leaves_out(documents: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    harden = documents["harden"]
    (edited,) = [tensor for tensor in harden["tensors"] if tensor["name"] == "model.layers.0.mlp.up_proj.weight"]
    harden["tensors"] = []
    for layer in range(40):
        tensor = copy.deepcopy(edited) | {"name": f"model.layers.{layer}.mlp.experts.gate_up_proj"}
        tensor["matrices"] = [tensor["matrices"][0] | {"part": f"[{expert}].{half}"} for expert in range(25) for half in ("gate", "up")]
        harden["tensors"].append(tensor)
    html = render(make_report([run_of(harden, tmp_path)]), "t")
    page = read(html)
    assert len(html) < LARGEST_PAGE
    shown = len(page.tables["Edited matrices, the largest R_align first"][0])
    assert 30 <= shown < 2_000 and f"{2_000 - shown:,} more rows are in run.json" in page.text


def test_a_page_that_cannot_be_small_is_refused(report_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "LARGEST_PAGE", 20_000)
    with pytest.raises(RequestError, match=r"would be 0\.\d MB, above"):
        render(make_report([read_run(report_runs / "search.json")]), "t")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("{", "is not JSON"),
        ("\ufffd" * 3 + "x", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "not an object"),
        ("{}", "does not say of which command it is"),
        ('{"command": "dance"}', r"is of the command 'dance'.*harden.*search"),
        ('{"command": "search"}', r"odd\.json does not hold what this version writes \(effective_rank: missing; rho: missing"),
        ('{"command": "verify", "ok": true, "output": 3}', r"output: Input should be a valid string"),
    ],
)
def test_what_is_no_run_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(RequestError, match=message):
        make_report([read_run(file)])


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("search", ("curve", 1, "attack", "rate"), float("nan"), r"curve\.1\.attack\.rate: Input should be a finite number"),
        ("search", ("curve",), [], r"curve: Tuple should have at least 1 item"),
        (
            "robustness",
            ("curves", 0, "points", 1, "attack_success"),
            {},
            r"\(harmful, aligned, 3 steps: no attack_success of keyword, python:judge\.py:complied\)",
        ),
        ("robustness", ("curves", 0, "r_align"), None, r"curves\.0\.r_align"),
        ("robustness", ("sources", "hardened"), None, r"recipe\.alpha: missing, and no hardened model"),
        ("harden", ("tensors", 0, "matrices", 0, "shape"), [4], r"tensors\.0\.matrices\.0\.shape\.1: missing"),
        ("asr", ("evaluations", 0, "title"), None, r"evaluations\.0\.title"),
        ("decompose", ("matrices", 0, "norm"), "long", r"matrices\.0\.norm"),
        ("inspect", ("layers", 1, "finetuned", 0, "ratio", "mean"), float("inf"), r"layers\.1\.finetuned\.0\.ratio\.mean: Input should be a finite"),
        ("inspect", ("matrices", 2, "aligned"), {}, r"matrices\.2\.aligned\.norm: missing"),
    ],
)
def test_fields_of_another_shape_are_named(
    name: str, path: tuple[str | int, ...], value: Any, message: str, documents: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    part: Any = documents[name]
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(RequestError, match=message):
        make_report([run_of(documents[name], tmp_path)])


def test_a_field_that_is_missing_is_named(documents: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    del documents["robustness"]["curves"][0]["points"][0]["r_ft"]
    with pytest.raises(RequestError, match=r"run\.json .*curves\.0\.points\.0\.r_ft: missing"):
        make_report([run_of(documents["robustness"], tmp_path)])


def invoke(*arguments: object) -> Any:
    return report_command.main([str(argument) for argument in arguments], standalone_mode=False)


def test_single_pictures(report_runs: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("r_align.svg", "asr_against_rank.pdf", "singular_values.png")]
    files[0].write_text("old")
    invoke(report_runs / "harden.json", report_runs / "search.json", *(part for file in files for part in ("--figure", file)))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(file.name for file in files), "a page that nobody asked for"
    assert files[0].read_text().startswith("<?xml") and files[1].read_bytes().startswith(b"%PDF") and files[2].read_bytes().startswith(b"\x89PNG")
    from PIL import Image

    with Image.open(files[2]) as picture:
        assert picture.info["dpi"] == pytest.approx((300, 300), abs=1) and picture.width > 1000
    before = [file.read_bytes() for file in files]
    invoke(report_runs / "harden.json", report_runs / "search.json", *(part for file in files for part in ("--figure", file)))
    assert [file.read_bytes() for file in files] == before


def test_the_command_line(report_runs: Path, tmp_path: Path, run_cli: RunCli) -> None:
    done = run_cli("report", report_runs / "verify.json", report_runs / "search.json", "--json", "result.json", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and re.match(r"Written: report\.html \(2 sections, 1 pictures?, \d+ kB\)", done.stdout)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["figures"] == ["asr_against_rank"] and result["bytes"] == (tmp_path / "report.html").stat().st_size
    assert [section["heading"] for section in result["sections"]] == ["Verification", "Effective rank"]
    assert str(tmp_path) not in json.dumps(result) and not list(tmp_path.glob("*.partial"))
    refused = run_cli("report", report_runs / "search.json", "--figure", "r_align.pdf", cwd=tmp_path)
    assert refused.returncode == 2 and "there is no such picture" in refused.stderr and "asr_against_rank" in refused.stderr


def test_wrong_outputs_are_refused_before_anything_is_written(report_runs: Path, tmp_path: Path) -> None:
    run = report_runs / "verify.json"
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "kept.html").write_text("old")
    own = tmp_path / "own.html"
    own.write_bytes(run.read_bytes())
    for arguments, kind, message in (
        ((run, "-o", tmp_path / "nowhere" / "r.html"), OutputError, "there is no folder"),
        ((run, "-o", tmp_path / "folder.html"), OutputError, "is a folder"),
        ((run, "-o", tmp_path / "report.pdf"), RequestError, r"must end in \.html"),
        ((run, "--figure", tmp_path / "r_align.jpg"), RequestError, r"must end in \.svg, \.png or \.pdf"),
        ((own, "-o", own), OutputError, "is one of the runs"),
        ((run, "--figure", tmp_path / "a.svg", "--figure", tmp_path / "a.svg"), OutputError, "named twice"),
        ((run, tmp_path / "absent.json", "-o", tmp_path / "kept.html"), RequestError, "there is no file"),
    ):
        with pytest.raises(kind, match=message):
            invoke(*arguments)
    assert (tmp_path / "kept.html").read_text() == "old" and own.read_bytes() == run.read_bytes()
    invoke(run, "-o", tmp_path / "kept.html")
    assert (tmp_path / "kept.html").read_text().startswith("<!DOCTYPE html>") and not list(tmp_path.glob("*.partial"))


def test_without_matplotlib_the_extra_is_named(report_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert importlib.util.find_spec("matplotlib") is None
    with pytest.raises(RequestError, match=r"pip install 'lox-merge\[plot\]'"):
        invoke(report_runs / "verify.json", "-o", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_json_on_standard_output_stands_alone(report_runs: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(report_command, [str(report_runs / "verify.json"), "-o", str(tmp_path / "r.html"), "--json", "-"])
    assert done.exit_code == 0 and json.loads(done.stdout)["output"] == "r.html"
