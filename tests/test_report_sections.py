"""Sections and pictures of a report: what they say, and that what is drawn is what the JSON holds."""

from __future__ import annotations

import copy
from statistics import median
from typing import Any

import pytest
from matplotlib.figure import Figure

from lox_merge.diagnostics.results import Findings
from lox_merge.errors import RequestError
from lox_merge.publish.documents.demo import FullDemo
from lox_merge.publish.documents.robustness import Robustness
from lox_merge.publish.documents.search import Search
from lox_merge.publish.documents.shape import read_as
from lox_merge.publish.documents.tuning import Tuning
from lox_merge.publish.figures.heat_map import grid_of, heat_map, place_of
from lox_merge.publish.figures.inspection import draw_energy_kept, draw_overlaps, draw_ratio_by_layer
from lox_merge.publish.figures.robustness import draw_asr_against_steps, draw_degradation, draw_with_and_without
from lox_merge.publish.figures.search import draw_rank_curve
from lox_merge.publish.figures.spectra import draw_spectra
from lox_merge.publish.figures.style import house_style, legend_below
from lox_merge.publish.figures.svg import inline_svg
from lox_merge.publish.figures.tuning import draw_front
from lox_merge.publish.report.numbers import number
from lox_merge.publish.report.registry import sections_of
from lox_merge.publish.report.runs import Run
from lox_merge.publish.report.section import Section, Table

Documents = dict[str, dict[str, Any]]


def sections(document: dict[str, Any]) -> list[Section]:
    return sections_of(Run("run.json", "0" * 64, document))


def values(table: Table) -> list[tuple[Any, ...]]:
    return [tuple(cell.value for cell in row) for row in table.rows]


def axes_of(draw: Any, *arguments: Any) -> Any:
    with house_style():
        axes = Figure().subplots()
        draw(axes, *arguments)
    return axes


def lines(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """Labelled curves, as (place, value); those with error bars too."""
    found = {line.get_label(): line for line in axes.lines} | {bar.get_label(): bar.lines[0] for bar in axes.containers}
    return {name: [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)] for name, line in found.items() if name[0] != "_"}


@pytest.fixture
def inspection(documents: Documents) -> dict[str, Any]:
    """What `lox-merge inspect` wrote of a toy pair and two models made from it."""
    return documents["inspect"]


def test_the_curve_of_a_search_is_drawn_as_measured(documents: Documents) -> None:
    search = documents["search"]
    drawn = lines(axes_of(draw_rank_curve, read_as(Search, search, "search")))
    assert drawn["ASR, 95 % interval"] == [(point["rank"], point["attack"]["rate"]) for point in search["curve"]]
    assert drawn["mean R_align"] == [(point["rank"], point["mean_r_align"]) for point in search["curve"]]
    assert drawn["threshold, rho = 0.5"][0][1] == search["aligned"]["rate"] + 0.5
    (bar,) = axes_of(draw_rank_curve, read_as(Search, search, "search")).containers
    ends = [segment[:, 1].tolist() for segment in bar.lines[2][0].get_segments()]
    for (low, high), point in zip(ends, search["curve"], strict=True):
        assert [low, high] == pytest.approx(point["attack"]["interval"], abs=1e-12)


def test_curves_under_attack_are_drawn_as_measured(documents: Documents) -> None:
    judge = "python:judge.py:complied"
    one, several = (read_as(Robustness, documents[name], name) for name in ("one_seed", "robustness"))
    drawn = lines(axes_of(draw_asr_against_steps, one, "harmful", judge))
    assert list(drawn) == ["aligned", "LoX", "full-rank (control)", "random-subspace (control)", "gaussian (control)"] or set(drawn) >= {
        "aligned",
        "LoX",
    }
    for curve in one.curves:
        name = curve.model if curve.model in ("aligned", "LoX") else f"{curve.model} (control)"
        assert [value for _, value in drawn[name]] == [point.attack_success[judge].rate for point in curve.points]
        assert [place for place, _ in drawn[name]] == pytest.approx([0, 3], abs=0.1)
    medians = lines(axes_of(draw_asr_against_steps, several, "harmful", judge))
    for model in ("aligned", "LoX"):
        rates = [[point.attack_success[judge].rate for point in curve.points] for curve in several.of("harmful", model)]
        assert [value for _, value in medians[model]] == [median(rate or 0.0 for rate in found) for found in zip(*rates, strict=True)]


def test_the_papers_pictures_hold_every_model_attack_and_seed(documents: Documents) -> None:
    result, judge = read_as(Robustness, documents["robustness"], "run"), "python:judge.py:complied"
    marks = [
        line.get_data()
        for line in axes_of(draw_degradation, result, judge).lines
        if line.get_label().startswith("_child") and len(line.get_xdata()) == 1
    ]
    found = sorted((float(x[0]), float(y[0])) for x, y in marks)
    expected = []
    for curve in result.curves:
        first, last = (point.attack_success[judge].rate for point in (curve.points[0], curve.points[-1]))
        assert first is not None and last is not None
        expected.append((curve.points[-1].r_ft_over_r_align, last - first))
    assert found == sorted(expected) and len(found) == 20
    axes = axes_of(draw_with_and_without, result, judge)
    assert len(axes.texts) == len(result.attacks) * len(result.seeds)  # an arrow from aligned to LoX each


@pytest.mark.parametrize(
    ("difference", "interval", "p_value", "rates", "words"),
    [
        (-0.5, (-0.6, -0.4), 0.001, (0.9, 0.4), "exact McNemar p = 0.001): LoX held longer."),
        (0.5, (0.4, 0.6), 0.001, (0.4, 0.9), "LoX did worse."),
        (-0.1, (-0.3, 0.1), 0.3, (0.5, 0.4), "no clear difference."),
        (-0.1, (-0.3, 0.1), 0.04, (0.5, 0.4), "no clear difference."),
        (-0.1, (-0.23, -0.004), 0.12, (0.5, 0.4), "no clear difference, as the exact test finds none."),
    ],
)
def test_words_follow_the_interval(
    difference: float, interval: tuple[float, float], p_value: float, rates: tuple[float, float], words: str, documents: Documents
) -> None:
    document = documents["one_seed"]
    for curve in document["curves"]:
        rate = {"aligned": rates[0], "LoX": rates[1], "full-rank": rates[1], "gaussian": 0.99}.get(curve["model"], 0.99)
        for point in curve["points"]:
            for judge, found in point["attack_success"].items():
                found.update(rate=rate, interval=[max(0, rate - 0.05), min(1, rate + 0.05)])
                if curve["model"] != "aligned":
                    point["against_aligned"][judge].update(difference=difference, interval=list(interval), p_value=p_value)
    (section,) = sections(document)
    text = " ".join(section.words)
    assert words in text
    if rates[1] < rates[0]:
        assert "full-rank did about as well as LoX" in text and "gaussian did" not in text
    assert any("delays the erosion" in note for note in section.not_shown) and any("Controls have LoX's norm" in note for note in section.not_shown)
    document["curves"] = [curve for curve in document["curves"] if curve["model"] in ("aligned", "LoX")]
    assert any("No controls were run" in note for note in sections(document)[0].not_shown)


def test_seeds_are_compared_with_themselves(documents: Documents) -> None:
    document = documents["robustness"]
    attack, judge, seeds = document["attacks"][0]["name"], next(iter(document["judges"])), document["seeds"]
    assert len(seeds) == 2
    rates = {("aligned", seeds[0]): None, ("aligned", seeds[1]): 0.2, ("LoX", seeds[0]): 0.0, ("LoX", seeds[1]): 0.5}
    for curve in document["curves"]:
        if curve["attack"] == attack and (curve["model"], curve["seed"]) in rates:
            for point in curve["points"]:
                rate = rates[curve["model"], curve["seed"]]
                point["attack_success"][judge].update(rate=rate, interval=None if rate is None else [0.0, 1.0])
    text = " ".join(word for section in sections(document) for word in section.words)
    assert "LoX's is lower on 0 of 1 seed with a rate of both." in text


def test_words_of_paired_differences(documents: Documents) -> None:
    asr = documents["asr"]
    asr["comparisons"][0].update(difference=-0.2, interval=[-0.4, 0.05], p_value=0.2)
    assert "−20.0 percentage points (95 % interval −40.0 to +5.0, exact McNemar p = 0.2): no clear difference." in " ".join(sections(asr)[0].words)
    asr["comparisons"][0].update(difference=None, interval=None, p_value=None)
    assert "undefined, no reply of both was decided" in " ".join(sections(asr)[0].words)
    asr["evaluations"][1]["prompts"]["sha256"] = "f" * 64
    assert any("different prompts" in note for note in sections(asr)[0].not_shown)


def test_categories_and_utility_have_tables_of_their_own(documents: Documents) -> None:
    asr = documents["asr"]
    rate = asr["evaluations"][0]["attack_success"]["keyword"]
    asr["evaluations"][0].update(by_category={"keyword": {"fraud": rate}}, utility={"perplexity": 3.25, "KL": None})
    tables = {table.caption: values(table) for table in sections(asr)[0].tables}
    assert tables["Attack success by category of prompt"][0][:5] == ("aligned", "keyword", "fraud", rate["rate"], rate["interval"][0])
    assert tables["Utility"] == [("aligned", 3.25, None), ("hardened", None, None)]


def test_the_numbers_of_an_inspection(inspection: dict[str, Any]) -> None:
    (section,) = sections(inspection)
    groups, useful, style, matrices, left_out = section.tables
    rows = {row[:2]: row[2:] for row in values(groups)}
    for group in (inspection["whole"], inspection["linear"], *inspection["layers"], *inspection["kinds"]):
        changes = {"alignment": group["aligned"], **dict(zip(inspection["labels"], group["finetuned"], strict=True))}
        for label, part in changes.items():
            r, ratio = part["r"], part.get("ratio", {})
            band = r["band"] or [None, None]
            expected = (group["matrices"], part["relative_norm"], r["mean"], r["energy"], r["expected"], *band)
            angle = part.get("cosines", {}).get("safety_angle")
            assert rows[group["name"], label][:10] == (*expected, ratio.get("mean"), ratio.get("expected"), angle)
    own = {row[0]: row for row in values(matrices)}
    for matrix in inspection["matrices"]:
        part = matrix["aligned"]
        name = matrix["name"] + matrix["part"]
        assert own[name][2:8] == (matrix["k"], part["r"], part["r_expected"], part["norm"], part["relative_norm"], part["noise_floor_rank"])
        for place, table in enumerate((useful, style)):
            (row,) = [row for row in values(table) if row[0] == name]
            found = matrix["finetuned"][place]
            chance = found["ratio_random"] or {"expected": None, "band": None}
            assert row[1:7] == (found["r"], found["ratio"], chance["expected"], *(chance["band"] or (None, None)), found["cosines"]["safety_angle"])
    known = [row[2] for row in values(useful) if row[2] is not None]
    assert known == sorted(known) and values(left_out) == [(one["name"], one["reason"]) for one in inspection["left_out"]]
    linear = inspection["linear"]["aligned"]["r"]
    assert f"{linear['mean']:.3f}" in section.summary and f"{linear['expected']:.3f}" in section.summary
    names = [picture.name for picture in section.pictures]
    assert names[:3] == ["r_align", "ratio_useful", "ratio_style"]
    assert {"ratio_by_layer", "spectra_aligned", "energy_kept_aligned", "energy_kept_style", "mso"} <= set(names)


def test_an_inspection_is_drawn_beside_chance(inspection: dict[str, Any]) -> None:
    result, linear = read_as(Findings, inspection, "run"), inspection["linear"]
    energy = lines(axes_of(draw_energy_kept, result.linear.aligned))
    for name, words in (("top", "leading directions"), ("random", "random subspace"), ("random_k", "directions of Δ_align at random")):
        assert energy[words] == [(one["fraction"], one[name]["mean"]) for one in linear["aligned"]["energy_kept"]]
    overlaps = axes_of(draw_overlaps, result)
    drawn = lines(overlaps)
    assert drawn["alignment, useful"] == [(one["eta"], one["mean"]) for one in linear["finetuned"][0]["mso"]]
    assert drawn["useful, style"] == [(one["eta"], one["mean"]) for one in linear["pairs"][0]["mso"]]
    chance = [[float(y) for y in line.get_ydata()] for line in overlaps.lines if line.get_linestyle() == "--" and len(line.get_ydata())]
    assert [one["expected"] for one in linear["finetuned"][1]["mso"]] in chance
    ratios = lines(axes_of(draw_ratio_by_layer, result))
    assert [value for _, value in ratios["style"]] == [layer["finetuned"][1]["ratio"]["mean"] for layer in inspection["layers"]]
    assert [value for _, value in ratios["random (95 % band)"]] == [layer["finetuned"][0]["ratio"]["expected"] for layer in inspection["layers"]]


def test_words_of_an_inspection_compare_with_chance(inspection: dict[str, Any]) -> None:
    ratio = inspection["linear"]["finetuned"][0]["ratio"]
    for mean, words in ((0.2, "Below the band"), (1.0, "Within the band: no more than chance"), (1.9, "Above the band")):
        ratio.update(mean=mean, expected=1.0, band=[0.9, 1.1])
        assert (
            f"useful: R_ft/R_align is {mean:.3f}. A random subspace of the same rank gives 1.000 (95 % of draws 0.900 to 1.100). {words}"
            in " ".join(sections(inspection)[0].words)
        )
    ratio.update(mean=None, expected=None, band=None)
    inspection.update(reverting=["useful"], notes=["A note beside the figures."], warnings=["A warning."])
    words = sections(inspection)[0].words
    assert "useful: R_ft/R_align is undefined." in words and words[-2:] == ("A note beside the figures.", "A warning.")
    assert any("useful walks back along −Δ_align" in sentence for sentence in words)
    inspection["labels"] = ["useful"]
    with pytest.raises(RequestError, match="whole: 2 entries of finetuned for 1 labels"):
        sections(inspection)


def test_an_inspection_of_alignment_alone(inspection: dict[str, Any]) -> None:
    inspection["labels"] = []
    for part in (
        inspection["whole"],
        inspection["linear"],
        *inspection["layers"],
        *inspection["kinds"],
        *inspection["matrices"],
        *inspection["vectors"],
    ):
        part.update(finetuned=[], pairs=[])
    (section,) = sections(inspection)
    assert {picture.name for picture in section.pictures} == {"r_align", "r_by_layer", "spectra_aligned", "energy_kept_aligned"}
    assert all("<svg" in inline_svg(picture.build, picture.name, picture.title) for picture in section.pictures)


def test_the_sections_of_a_demo_and_of_several(documents: Documents) -> None:
    attacks = [{"command": "robustness", **documents["one_seed"]}, documents["one_seed"]]
    demo = {"command": "demo", "seed": 3, "seed_was_used_for_tuning": True, "parameters": 158656}
    demo |= {"base": documents["asr"]["evaluations"][0], "search": documents["search"], "attacks": attacks}
    found = sections(demo)
    assert [section.heading for section in found] == ["Demo", "Effective rank", "Under attack", "Under attack"]
    assert found[1:3] != [] and values(found[1].tables[0]) == values(sections(documents["search"])[0].tables[0])
    assert values(found[2].tables[0]) == values(sections(documents["one_seed"])[0].tables[0])
    assert any("tuned while looking at this seed" in note for note in found[0].not_shown) and "158,656" in found[0].summary
    spread = {"median": 0.4, "mean": 0.5, "lowest": 0.1, "highest": 1.0}
    over = {"ASR": {"aligned": {"before": spread, "harmful 20 steps": None}}}
    full = {"command": "demo --full", "seeds": [3, 8], "seeds_used_for_tuning": [3], "effective_ranks": [6, None], "over_seeds": over}
    (section,) = sections(full | {"runs": [demo]})
    assert values(section.tables[0]) == [("ASR", "aligned", "before", 0.4, 0.5, 0.1, 1.0), ("ASR", "aligned", "harmful 20 steps", *[None] * 4)]
    assert "6 and undefined" in section.summary and read_as(FullDemo, full | {"runs": [demo]}, "run").seeds == (3, 8)
    assert all("<svg" in inline_svg(picture.build, picture.name, picture.title) for picture in section.pictures)


def test_a_study_shows_its_front_and_every_trial(documents: Documents) -> None:
    attack, rate = documents["one_seed"], documents["asr"]["evaluations"][0]["attack_success"]["keyword"]
    recipe = {"rank": "6", "alpha": 1.25, "rank_pattern": [["mlp", "4"]], "alpha_pattern": [["mlp", 0.5]]}
    trials = [
        {"number": number, "recipe": recipe, "attack": rate | {"rate": value}, "divergence": divergence, "on_front": front, "seconds": 1.0}
        for number, value, divergence, front in ((0, 0.5, 0.25, True), (1, 0.75, 0.5, False), (2, 0.125, 0.75, True))
    ]
    study = {"command": "search --tune", "sources": attack["sources"], "attack": attack["attacks"][0], "training": attack["training"]}
    study |= {"prompts": attack["prompts"], "harmless": attack["prompts"], "judge": {"kind": "keyword"}, "aligned": rate}
    study |= {"front": [2, 0], "trials": trials, "failed": {"3": "not finite"}}
    study["sources"].pop("hardened")
    (section,) = sections(study)
    assert [row[0] for row in values(section.tables[0])] == [0, 2, 1, "aligned"]
    assert [(row[2], row[6]) for row in values(section.tables[0])][:3] == [(0.5, 0.25), (0.125, 0.75), (0.75, 0.5)]
    assert "trial 2 (rank and alpha 6, 1.25; mlp: 4, 0.5) and 0" in section.summary and any(
        "1 trial gave no figures: 3." in word for word in section.words
    )
    drawn = lines(axes_of(draw_front, read_as(Tuning, study, "study")))
    assert drawn["front, 95 % interval"] == [(0.75, 0.125), (0.25, 0.5)] and drawn["beaten by another"] == [(0.5, 0.75)]
    (nothing,) = sections(study | {"front": [], "trials": []})
    assert nothing.summary.endswith("gave figures.") and "<svg" in inline_svg(nothing.pictures[0].build, "front", "front")


def test_a_filtered_fine_tuning_stands_beside_a_random_subspace(documents: Documents) -> None:
    realised = documents["harden"]["tensors"][1]["matrices"][0]["realised"]
    own = {"part": "", "shape": [64, 64], "decision": "filtered", "finetuned_norm": 0.25, "rank": 6, "kept": 0.266, "kept_random": 0.306}
    tensor = {"name": "model.layers.0.self_attn.k_proj.weight", "action": "edited", "matrices": [own | {"energy_kept": 0.07, "realised": realised}]}
    summary = {"edited_tensors": 1, "edited_matrices": 1, "copied_tensors": 0, "mean_rank": 6.0, "mean_kept": 0.266, "mean_kept_random": 0.306}
    summary |= {"energy_kept": 0.07, "energy_kept_random": 0.09, "realised_gain": None}
    recipe = {"mode": "orthogonal", "fraction": 0.1, "rank": None, "basis": "top", "side": "left"}
    document = {"format": 1, "job": {"method": "project", "recipe": recipe}, "tensors": [tensor], "summary": summary, "warnings": []}
    document["sources"] = {role: {"kind": "folder", "name": role} for role in ("base", "aligned", "finetuned")}
    for found in (document, {"command": "project", **document}):
        (section,) = sections(found)
        assert values(section.tables[0])[0][3:] == (6, 0.25, 0.266, 0.306, 0.07, realised["gain"])
        assert "finetuned's update" in section.summary and "0.266 of the norm of an update; a random one of the same rank 0.306" in section.words[0]
        assert "undefined was written" in section.words[2] and any("--basis random" in note for note in section.not_shown)


def test_a_failed_verification_lists_its_problems(documents: Documents) -> None:
    problems = ["tensor a is not what the recipe gives", "shard b is missing"]
    (section,) = sections(documents["verify"] | {"ok": False, "problems": problems})
    assert "NOT what its manifest says: 2 problems" in section.summary
    assert [row[1].text for row in section.tables[0].rows] == problems
    (sound,) = sections(documents["verify"])
    assert "is what its manifest says" in sound.summary and "only hashes and structure were checked" in sound.words[0]


def test_the_numbers_of_a_decomposition(documents: Documents) -> None:
    document = documents["decompose"]
    (section,) = sections(document)
    found = {row[0]: row for row in values(section.tables[0])}
    for matrix in document["matrices"]:
        row = found[matrix["name"] + matrix["part"]]
        assert row[2:6] == (matrix["rank"], matrix["norm"], matrix["noise_edge"], matrix["certificate"]["angle_bound"])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", ("model.layers", 3, "mlp.up_proj")),
        ("transformer.h.11.attn.c_attn.weight", ("transformer.h", 11, "attn.c_attn")),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", ("encoder.block", 0, "layer.*.DenseReluDense.wi")),
        ("model.layers.1.mlp.experts.gate_up_proj[3].gate", ("model.layers", 1, "mlp.experts.gate_up_proj[*].gate")),
        ("model.layers.1.mlp.experts.7.w1.weight", ("model.layers", 1, "mlp.experts.*.w1")),
        ("3.weight", ("", 3, "weight")),
        ("lm_head.weight", None),
        ("layer12.dense.weight", None),
    ],
)
def test_where_a_tensor_stands(name: str, place: tuple[str, int, str] | None) -> None:
    assert place_of(name) == place


def test_heat_maps_average_experts_part_stacks_and_leave_undefined_open() -> None:
    grid = grid_of([("m.0.experts.0.w", 0.2), ("m.0.experts.1.w", 0.4), ("m.1.experts.0.w", None), ("m.1.q.weight", 0.0), ("head", 1.0)])
    assert grid.layers == (0, 1) and grid.modules == ("experts.*.w", "q")
    assert grid.values == {(0, "experts.*.w"): pytest.approx(0.3), (1, "q"): 0.0}
    both = grid_of([("encoder.0.q.weight", 0.1), ("decoder.0.q.weight", 0.9)])
    assert both.values == {(0, "encoder q"): 0.1, (0, "decoder q"): 0.9}
    with house_style():
        figure = heat_map(grid, "R_align", low=0.0, high=1.0)
    axes = figure.axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["0.00", "0.30"]
    assert len(axes.patches) == 2 and all(patch.get_hatch() for patch in axes.patches)
    mesh = axes.collections[0]
    assert mesh.get_array().mask.sum() == 2 and (mesh.norm.vmin, mesh.norm.vmax) == (0.0, 1.0)


def test_spectra_show_the_median_and_leave_zeros_off_a_logarithm() -> None:
    kinds = {"q": [[(1, 4.0), (2, 1.0)], [(1, 8.0), (2, 0.0)], [(1, 2.0), (2, 3.0)]], "zero": [[(1, 0.0)]]}
    axes = axes_of(draw_spectra, kinds, [0.01, 0.0])
    assert lines(axes)["q"] == [(1, 4.0), (2, 2.0)] and "zero" not in lines(axes)
    assert axes.get_yscale() == "log" and "rounding noise" in lines(axes)


def test_an_inline_picture_has_ids_of_its_own_and_follows_the_page() -> None:
    def build() -> Figure:
        figure = Figure(figsize=(4, 3))
        figure.subplots().plot([0, 1], [0, 1], marker="o", color="#0072b2", label="a & b <c>")
        legend_below(figure)
        return figure

    one, again, other = inline_svg(build, "one", "x < y"), inline_svg(build, "one", "x < y"), inline_svg(build, "other", "x < y")
    assert one == again and one != other and one.replace("one-", "other-") == other.replace("other-title", "other-title")
    assert "var(--blue)" in one and "#0072b2" not in one and "a &amp; b &lt;c&gt;" in one and '<title id="one-title">x &lt; y</title>' in one
    assert "http" not in one and "<style" not in one and "<metadata" not in one and "width=" not in one.split(">")[0]


def test_numbers_never_round_to_zero_and_undefined_is_a_word() -> None:
    assert [number(value) for value in (None, 0.0, 0.00012, -0.00012, 0.5, -0.25)] == ["undefined", "0.000", "1.2e−04", "−1.2e−04", "0.500", "−0.250"]


def test_several_runs_of_one_kind_keep_their_pictures_apart(documents: Documents) -> None:
    from lox_merge.publish.report.page import make_report

    search = documents["search"]
    other = copy.deepcopy(search) | {"rho": 0.25}
    report = make_report([Run("a.json", "0", search), Run("b.json", "1", other)])
    assert list(report.pictures) == ["asr_against_rank", "asr_against_rank_2"]
    assert "below 0.25" in report.sections[1].summary
