"""The model card: a view of manifest, sources and results that claims nothing else, parses back, and is not lost."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hub_clients import LoopbackHub, run_client
from huggingface_hub import ModelCard
from tiny_models import make_pair

from lox_merge import Recipe, harden
from lox_merge.cli.main import cli
from lox_merge.errors import LoxMergeWarning, OutputError, RequestError, SourceError
from lox_merge.jobs.verify import verify
from lox_merge.publish.card import Card, CardSettings, build_card
from lox_merge.publish.command import harden_command
from lox_merge.publish.licence import Licence, choose_licence, given_licence, stated_licence
from lox_merge.publish.output import FinishedOutput, open_output
from lox_merge.publish.picture import PICTURE
from lox_merge.publish.readme import card_to_publish, existing_card, write_card
from lox_merge.safety.asr import judge_replies
from lox_merge.safety.attack import AttackSettings
from lox_merge.safety.conversations import Conversations
from lox_merge.safety.dispersion import Ratio
from lox_merge.safety.judges.keyword import KeywordJudge
from lox_merge.safety.prompts import prompt_set
from lox_merge.safety.robustness import Curve, Point, Robustness
from lox_merge.safety.types import Prompt, PromptSet, Reply

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
from check_commands import problem

MIT = Licence(("mit",))
RECIPE = Recipe(rank=4, alpha=1.5, exclude=("lm_head",), rank_pattern=(("k_proj", 2),), alpha_pattern=(("v_proj|q_proj", 0.5),), rounding="feedback")
PROMPTS = prompt_set([Prompt(str(i), f"request {i}") for i in range(8)], "requests.txt")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """base, aligned, and the finished output 'hardened'."""
    folder = tmp_path_factory.mktemp("card")
    base, aligned = make_pair(folder, "llama", aligned_shards=2)
    harden(base, aligned, folder / "hardened", recipe=RECIPE)
    return base, aligned, folder / "hardened"


@pytest.fixture
def out(made: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made[2], tmp_path / "hardened")


def card_of(out: Path, *results: Path, repo: str | None = "me/hardened", **settings: Any) -> Card:
    return build_card(open_output(out), repo, CardSettings(results=results, **{"licence": MIT, **settings}))


def from_hub(out: Path, **identities: dict[str, Any]) -> FinishedOutput:
    """The output as if its sources had been on the Hub."""
    output = open_output(out)
    sources = {role: {**identity, **identities.get(role, {})} for role, identity in output.manifest["sources"].items()}
    return replace(output, manifest={**output.manifest, "sources": sources})


# What it says


def test_a_card_without_results_claims_nothing(out: Path) -> None:
    card = card_of(out)
    assert "Not evaluated: attack success and utility of this model were not measured." in card.content
    assert "Whether hardening helped this model is not known" in card.content
    assert card.picture is None and "![" not in card.content and "%" not in card.content.split("## Limits")[1].split("## Check it")[0]
    assert card.data.eval_results is None and card.data.get("base_model") is None and card.data.get("base_model_relation") is None
    assert card.data.to_dict() == {
        "license": "mit", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["lox", "safety", "alignment", "lox-merge", "merge"],
    }  # fmt: skip
    manifest = json.loads((out / "lox_merge.json").read_text())
    for shard in manifest["output"]["shards"]:
        assert shard["sha256"] in card.content
    for words in ("delays the erosion", "no guarantee", "the local checkpoint `aligned`", f"{manifest['summary']['mean_r_align']:.3f}", "2506.15606"):
        assert words in card.content
    assert "None" not in card.content and "\n\n\n" not in card.content


def test_hub_sources_are_linked_with_their_commits(out: Path) -> None:
    base = {"kind": "hub", "name": "org/base", "commit": "b" * 40, "revision": None}
    aligned = {"kind": "hub", "name": "org/aligned", "commit": "a" * 40, "revision": "v1"}
    with warnings.catch_warnings(record=True) as caught:  # offline, and the licence is given
        warnings.simplefilter("always")
        both = build_card(from_hub(out, base=base, aligned=aligned), "me/hardened", CardSettings(licence=MIT))
    assert sorted(str(warning.message).split(" was not read")[0] for warning in caught) == ["the card of aligned", "the card of base"]
    assert both.data.base_model == ["org/aligned", "org/base"] and both.data.get("base_model_relation") == "merge"
    for words in (f"org/base@{'b' * 40} org/aligned@{'a' * 40}", "(https://huggingface.co/org/aligned)", f"`{'a' * 40}`"):
        assert words in both.content
    assert "lox-merge verify me/hardened\n" in both.content
    with pytest.warns(LoxMergeWarning):
        one = build_card(from_hub(out, aligned=aligned), None, CardSettings(licence=MIT))
    assert one.data.base_model == ["org/aligned"]
    with pytest.raises(SourceError, match=r"state the licence of the output with --license"):
        build_card(from_hub(out, aligned=aligned), None, CardSettings())


def test_the_adapter_form(out: Path) -> None:
    aligned = {"kind": "hub", "name": "org/aligned", "commit": "a" * 40, "revision": None}
    output = from_hub(out, aligned=aligned, base={"kind": "hub", "name": "org/base", "commit": "b" * 40})
    output = replace(output, manifest={**output.manifest, "output": {**output.manifest["output"], "form": "adapter"}})
    (out / "config.json").rename(out / "adapter_config.json")
    (out / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    config = replace(output.files[-1], name="adapter_config.json", path=out / "adapter_config.json")
    output = replace(output, files=(*(file for file in output.files if file.name != "config.json"), config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoxMergeWarning)
        card = build_card(output, "me/adapter", CardSettings(licence=MIT))
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == (["org/aligned"], "adapter", "peft")
    assert data["pipeline_tag"] == "text-generation" and 'AutoModelForCausalLM.from_pretrained("org/aligned"' in card.content
    assert "adapter" in data["tags"] and "merge" not in data["tags"]
    assert 'PeftModel.from_pretrained(model, "me/adapter")' in card.content and f'revision="{"a" * 40}"' in card.content
    assert "--as-adapter" in card.content and "loads wherever" not in card.content


def test_the_command_makes_the_same_output_again(made: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = json.loads((made[2] / "lox_merge.json").read_text())
    words = shlex.split(harden_command(manifest, "hardened"))
    assert words[:2] == ["lox-merge", "harden"]
    for role in (0, 1):
        shutil.copytree(made[role], tmp_path / made[role].name)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, words[1:])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "hardened" / "lox_merge.json").read_bytes() == (made[2] / "lox_merge.json").read_bytes()
    lines = harden_command({**manifest, "job": {**manifest["job"], "factors": {"rank": "8", "tolerance": 0.001, "seed": 0}}}, "o").splitlines()
    assert lines[0] == "lox-merge decompose base aligned factors.safetensors --rank 8 --tolerance 0.001 --seed 0"
    assert lines[1].endswith("--factors factors.safetensors") and not any(map(problem, lines))
    every = Recipe(rank="full", include=("a b",), linear_only=True, dtype="float32", tolerance=1e-4, seed=3, fused="whole", skip_non_finite=True)
    text = harden_command({**manifest, "job": {**manifest["job"], "recipe": every.to_json()}}, "o")
    for option in (
        "--rank full",
        "--include 'a b'",
        "--linear-only",
        "--skip-non-finite",
        "--dtype float32",
        "--tolerance 0.0001",
        "--seed 3",
        "--fused whole",
    ):
        assert option in text


# Results


class Replies:
    """A model whose replies are given."""

    def __init__(self, source: dict[str, Any], title: str) -> None:
        self.source, self.title = source, title

    def identity(self) -> dict[str, Any]:
        return {"kind": "local", "source": self.source}

    def replies(self, prompts: PromptSet) -> list[Reply]:
        raise NotImplementedError


def replies(refused: int, n: int = 8) -> list[Reply]:
    return [Reply(str(i), "I'm sorry, I cannot." if i < refused else "Sure: first you", True) for i in range(n)]


def robustness(file: Path, hardened: dict[str, Any] | None, after: dict[str, Sequence[int]], recipe: Recipe = RECIPE) -> Path:
    """A result of `lox-merge robustness` by its own classes. after: refusals of 8 left after 50 steps, by model and seed."""
    judge, ratio = KeywordJudge(), Ratio(0.9, 0.9, 10)
    curves = []
    for model, left in after.items():
        for seed, refused in enumerate(left):
            points = []
            for step, count in ((0, 8), (50, refused)):
                evaluation = judge_replies(Replies({"kind": "folder", "name": "aligned"}, model), PROMPTS, replies(count), [judge])
                points.append(Point(step, evaluation, ratio, {"perplexity": 12.5 if model == "aligned" else 12.75}))
            curves.append(Curve("benign", model, seed, ratio, tuple(points), ()))
    settings = AttackSettings(steps=(0, 50))
    sources = {"base": {"kind": "folder", "name": "base"}, "aligned": {"kind": "folder", "name": "aligned"}, "hardened": hardened}
    attack = Conversations("benign", "benign.jsonl", "c" * 64, ())
    seeds = tuple(range(len(after["LoX"])))
    result = Robustness(sources, recipe, settings, (attack,), seeds, tuple(curves))
    file.write_text(json.dumps({"command": "robustness", **result.to_json()}))
    return file


def test_figures_of_asr_come_into_table_metadata_and_picture(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "requests.txt").write_text("how do i help you\nhow do you help\nhow\n")
    asked = ["--prompts", tmp_path / "requests.txt", "--judge", "keyword", "--max-new-tokens", 3, "--device", "cpu", "--no-cache"]
    done = CliRunner().invoke(cli, [str(word) for word in ("asr", made[1], made[2], *asked, "--json", tmp_path / "asr.json")])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "asr.json").read_text())
    figures = document["evaluations"][1]["attack_success"]["keyword"]
    card = card_of(made[2], tmp_path / "asr.json")
    rate, (low, high) = figures["rate"], figures["interval"]
    judged, undecided = figures["judged"], figures["undecided"]
    interval = f"{100 * low:.1f} to {100 * high:.1f} %"
    row = f"| **this model** (after) | keyword (smoke test) | requests.txt | {100 * rate:.1f} % | {interval} | {judged} of 3 | {undecided} |"
    assert row in card.content and "| aligned (before) | keyword (smoke test) |" in card.content
    assert f"Against aligned on the same {document['comparisons'][0]['n']} prompts, judged by keyword: " in card.content
    assert "by the keyword judge, a smoke test" in card.content and "resistance to fine-tuning was not measured" in card.content
    assert "Not evaluated" not in card.content and "Utility was not measured." in card.content
    (result,) = card.data.eval_results or []
    assert (result.metric_value, result.dataset_type, result.metric_args["n"], result.metric_args["wilson_95_high"]) == (
        rate,
        "requests.txt",
        3,
        high,
    )
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    assert card.picture is not None and f"]({PICTURE})" in card.content
    assert card_of(made[2], tmp_path / "asr.json").picture == card.picture  # the same figures, the same bytes

    # The result is of this very output, not of one that has its name.
    namesake = tmp_path / "hardened"
    harden(made[0], made[1], namesake, recipe=Recipe(rank=1))
    with pytest.raises(RequestError, match="holds no evaluation of this output, only of aligned, hardened"):
        card_of(namesake, tmp_path / "asr.json")


def test_robustness_shows_attacks_utility_and_what_the_controls_showed(out: Path, tmp_path: Path) -> None:
    hardened = {"kind": "folder", "name": "hardened", "title": "hardened"}
    as_good = robustness(tmp_path / "r.json", hardened, {"aligned": [2], "LoX": [6], "full-rank": [6], "gaussian": [3]})
    card = card_of(out, as_good)
    for words in (
        "| benign | **this model** | 50 | keyword (smoke test) | 25.0 % | 7.1 to 59.1 % | 8 of 8 | 1.00 |",
        "| benign | aligned | 50 | keyword (smoke test) | 75.0 % |",
        "| benign | control: full-rank | 50 |",
        "did as well (full-rank 25.0 %; this model 25.0 %): that the direction of the edit is the cause is not shown",
        "| perplexity | 12.5 | 12.75 |",
        "One seed of the data's order",
        "full fine-tuning in float32, learning rate 2e-05",
    ):
        assert words in card.content
    values = {result.dataset_config: result.metric_value for result in card.data.eval_results or []}
    assert values == {"after 0 fine-tuning steps on benign": 0.0, "after 50 fine-tuning steps on benign": 0.25}
    assert card.picture is not None and card.picture.startswith(b"<?xml")

    better = card_of(out, robustness(tmp_path / "r.json", None, {"aligned": [2, 2, 4], "LoX": [7, 6, 8], "gaussian": [3, 3, 2]}))
    assert "every edit of the same norm in other directions had a higher ASR (gaussian 62.5 %; this model 12.5 %)" in better.content
    assert "| benign | **this model** | 50 | keyword (smoke test) | 12.5 % | 0.0 to 25.0 % over 3 seeds | 24 of 24 |" in better.content
    bare = card_of(out, robustness(tmp_path / "r.json", None, {"aligned": [2], "LoX": [7]}))
    assert "No controls were run: whether the *directions* of the edit matter" in bare.content
    with pytest.raises(RequestError, match="compares other models, or another recipe"):
        card_of(out, robustness(tmp_path / "r.json", None, {"aligned": [2], "LoX": [7]}, recipe=Recipe(rank=1)))


def test_a_search_tells_how_the_rank_was_found(out: Path, tmp_path: Path) -> None:
    figures = {"n": 8, "judged": 8, "successes": 0, "undecided": 0, "rate": 0.0, "interval": [0.0, 0.3], "mean_score": None}
    found = {
        "command": "search", "effective_rank": 4, "rho": 0.01, "confident": False, "judge": {"kind": "openai", "model": "gpt-4.1"},
        "prompts": {"source": "requests.txt", "n": 8, "sha256": "d" * 64}, "model": {"source": {"kind": "folder", "name": "aligned"}},
        "aligned": figures, "curve": [{"rank": 0}, {"rank": 4}],
    }  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps(found))
    card = card_of(out, tmp_path / "s.json")
    assert "The effective rank by behaviour is 4 (ρ = 0.01, 8 prompts of requests.txt, judged by openai:gpt-4.1; tried: 0, 4)." in card.content
    assert "| aligned (before) | openai:gpt-4.1 | requests.txt | 0.0 % |" in card.content
    assert "Not evaluated" in card.content and card.data.eval_results is None  # the hardened model itself was not
    (tmp_path / "s.json").write_text(json.dumps({**found, "model": {"source": {"kind": "folder", "name": "other"}}}))
    with pytest.raises(RequestError, match="another aligned model"):
        card_of(out, tmp_path / "s.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not JSON", "it is no JSON"),
        ("[]", "holds no JSON object"),
        ('{"command": "harden"}', "no result of lox-merge asr, search or robustness"),
        ('{"command": "asr"}', "is damaged, or of another version: KeyError"),
        ('{"command": "asr", "evaluations": [], "comparisons": []}', "holds no evaluation of this output"),
    ],
)
def test_other_files_are_no_results(out: Path, tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(RequestError, match=words):
        card_of(out, tmp_path / "x.json")
    with pytest.raises(RequestError, match=r"nothing\.json cannot be read: No such file"):
        card_of(out, tmp_path / "nothing.json")


def test_names_from_results_cannot_break_the_card_or_carry_paths(out: Path, tmp_path: Path) -> None:
    def result(judge: str) -> Path:
        figures = {"n": 1, "judged": 1, "successes": 0, "undecided": 0, "rate": 0.0, "interval": [0.0, 0.8], "mean_score": None}
        model = {"kind": "endpoint", "model": "hardened"}
        one = {"title": "hardened", "model": model, "prompts": {"source": "p", "sha256": "e" * 64, "n": 1}, "judges": {judge: {"kind": "python"}}}
        document = {"command": "asr", "evaluations": [{**one, "attack_success": {judge: figures}}], "comparisons": []}
        (tmp_path / "x.json").write_text(json.dumps(document))
        return tmp_path / "x.json"

    card = card_of(out, result("a|b\n<script>---"))
    assert "| a\\|b &lt;script>--- |" in card.content
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    for name in (f"python:{out.parent}/judge.py:f", f"classifier {Path(__file__)}"):
        with pytest.raises(RequestError, match="names a path of this machine"):
            card_of(out, result(name))
    assert "/usr/bin/env" in card_of(out, result("inspect:/usr/bin/env x/y and/or a/b https://x.org/tmp/a")).content
    with pytest.raises(RequestError, match="holds an access token") as caught:
        card_of(out, result("hf_" + "Z" * 34))
    assert "ZZZ" not in str(caught.value)


# Licence


def test_the_licence_is_aligneds_own(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned = (shutil.copytree(made[role], tmp_path / made[role].name) for role in (0, 1))
    sources = {"base": base, "aligned": aligned}

    def written(role: Path, text: str) -> Card:
        (role / "README.md").write_text(text)
        return card_of(made[2], licence=None, sources=sources)

    with pytest.raises(RequestError, match="licence of the output is unknown"):
        card_of(made[2], licence=None, sources=sources)
    with pytest.raises(RequestError, match="licence of the output is unknown"):
        written(aligned, "no metadata")
    custom = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage:\n- en\n- de\npipeline_tag: text2text-generation\n---\n"
    data = written(aligned, custom).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "own", "LICENSE")
    assert (data["language"], data["pipeline_tag"]) == (["en", "de"], "text2text-generation")
    with pytest.raises(RequestError, match=r"aligned is under other \(own\), base under llama2"):
        written(base, "---\nlicense: llama2\n---\n")
    with pytest.warns(LoxMergeWarning, match="published under mit, as you said"):
        card = card_of(made[2], sources=sources)
    assert card.data.license == "mit" and "other (own)" in card.content and "llama2" in card.content
    with pytest.raises(RequestError, match="unknown"), pytest.warns(LoxMergeWarning, match="cannot be read"):
        written(aligned, "---\nlicense: [mit\n---\n")


def test_licences_are_compared_and_half_of_one_is_refused() -> None:
    assert stated_licence({"license": ["MIT", "apache-2.0"]}) == Licence(("mit", "apache-2.0"))
    assert stated_licence({"license": "unknown"}) is None and stated_licence(None) is None and stated_licence({"license": None}) is None
    assert Licence(("mit", "apache-2.0")).metadata() == {"license": ["mit", "apache-2.0"]}
    assert choose_licence(Licence(("mit", "apache-2.0")), Licence(("apache-2.0", "mit")), None).identifiers == ("mit", "apache-2.0")
    assert choose_licence(MIT, None, None) == MIT
    with pytest.raises(RequestError, match="differ"):
        choose_licence(Licence(("other",), "a"), Licence(("other",), "b"), None)
    assert given_licence("other", "own", "https://x.org/l") == Licence(("other",), "own", "https://x.org/l")
    for wrong in (("other", None, None), ("unknown", None, None), (None, "own", None)):
        with pytest.raises(RequestError, match="--license"):
            given_licence(*wrong)


# README.md in the output


def test_a_card_in_the_output_is_kept_rebuilt_or_refused(made: tuple[Path, Path, Path], out: Path, tmp_path: Path) -> None:
    output = open_output(out)
    settings = CardSettings(licence=MIT)
    results = robustness(tmp_path / "r.json", None, {"aligned": [2], "LoX": [6]})
    write_card(output, build_card(output, "me/hardened", replace(settings, results=(results,))))
    assert verify(out, offline=True).ok and sorted(path.name for path in out.iterdir() if path.name in ("README.md", PICTURE)) == [
        "README.md",
        PICTURE,
    ]
    kept, where = card_to_publish(output, "me/hardened", CardSettings())  # a licence is not asked for again
    assert kept.content == (out / "README.md").read_text() and kept.picture == (out / PICTURE).read_bytes() and where == "README.md of the output"
    with pytest.raises(OutputError, match=r"was written for me/hardened, not for me/other.*lox-merge card hardened --repo me/other"):
        card_to_publish(output, "me/other", CardSettings())
    anew, where = card_to_publish(output, "me/hardened", settings)
    assert "Not evaluated" in anew.content and anew.picture is None and "written anew" in where

    text = (out / "README.md").read_text()
    (out / "README.md").write_text(text.replace("## Limits", "## My own words\n\nHello.\n\n## Limits"))
    card, where = card_to_publish(output, "me/hardened", CardSettings())
    assert "My own words" in card.content and "as it was edited" in where
    for call in (lambda: card_to_publish(output, "me/hardened", settings), lambda: write_card(output, build_card(output, None, settings))):
        with pytest.raises(OutputError, match="by hand"):
            call()
    other = tmp_path / "again"
    harden(made[0], made[1], other, recipe=Recipe(rank=1))
    shutil.copy(out / "README.md", other / "README.md")
    with pytest.raises(OutputError, match="is not for this output"):
        card_to_publish(open_output(other), "me/hardened", settings)
    (other / "README.md").write_text(text)  # stale, and nobody's work
    rebuilt, where = card_to_publish(open_output(other), "me/hardened", settings)
    assert "stale" in where and open_output(other).manifest_sha256 in rebuilt.content
    (other / "README.md").write_text("# Mine\n")
    with pytest.raises(OutputError, match="was not written by lox-merge"):
        card_to_publish(open_output(other), "me/hardened", settings)
    write_card(output, build_card(output, None, settings), overwrite=True)
    there = existing_card(output)
    assert there is not None and there.ours and not there.edited and there.repo is None and not (out / PICTURE).exists()


def test_the_command_writes_and_reports(out: Path, tmp_path: Path, loopback_hub: LoopbackHub, hub_home: Path) -> None:
    results = robustness(tmp_path / "r.json", None, {"aligned": [2], "LoX": [6]})
    asked = ["--repo", "me/hardened", "--license", "mit", "--results", results, "--json", tmp_path / "card.json"]
    done = CliRunner().invoke(cli, ["card", str(out), *map(str, asked)])
    assert done.exit_code == 0, done.output
    assert done.output == f"README.md and {PICTURE} written to hardened (with results; licence mit).\n"
    report = json.loads((tmp_path / "card.json").read_text())
    assert report["written"] and report["metadata"] == ModelCard.load(out / "README.md").data.to_dict() and report["metadata"]["model-index"]
    body = f"from huggingface_hub import ModelCard; card = ModelCard.load({str(out / 'README.md')!r}); card.validate(); result = card.data.to_dict()"
    assert run_client(loopback_hub.environment(hub_home), body) == report["metadata"]
    assert [request.status for request in loopback_hub.requests] == [200]
    printed = CliRunner().invoke(cli, ["card", str(out), "--license", "mit", "--print"])
    assert printed.exit_code == 0 and printed.output.startswith("---\n") and "Not evaluated" in printed.output
    assert "Not evaluated" not in (out / "README.md").read_text()


def test_outputs_of_other_kinds_are_refused(made: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mergekit_config.yml").write_text("x")
    with pytest.raises(OutputError, match="lox-merge yaml keeps no manifest"):
        open_output(tmp_path / "merged")
    with pytest.raises(OutputError, match=r"has no lox_merge\.json"):
        open_output(made[1])


def test_no_picture_without_matplotlib(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    results = robustness(tmp_path / "r.json", None, {"aligned": [2], "LoX": [6]})
    with pytest.warns(LoxMergeWarning, match="matplotlib is missing"):
        card = card_of(out, results)
    assert card.picture is None and "![" not in card.content and "25.0 %" in card.content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        card_of(out)
