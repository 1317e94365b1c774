"""The model card: a view of manifest, sources and results that claims nothing else, parses back, and is not lost."""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from card_documents import MIT, card_of, from_hub, robustness
from click.testing import CliRunner
from hub_clients import LoopbackHub, run_client
from huggingface_hub import ModelCard

from lox_merge import Recipe, harden
from lox_merge.cli.main import cli
from lox_merge.errors import LoxMergeWarning, OutputError, RequestError, SourceError
from lox_merge.jobs.verify import verify
from lox_merge.publish.card import Card, CardSettings, build_card
from lox_merge.publish.licence import Licence, choose_licence, given_licence, stated_licence
from lox_merge.publish.output import open_output
from lox_merge.publish.picture import PICTURE
from lox_merge.publish.readme import card_to_publish, existing_card, write_card

# What it says


def test_a_card_without_results_claims_nothing(card_out: Path) -> None:
    card = card_of(card_out)
    assert "Not evaluated: attack success and utility of this model were not measured." in card.content
    assert "Whether hardening helped this model is not known" in card.content
    assert card.picture is None and "![" not in card.content and "%" not in card.content.split("## Limits")[1].split("## Check it")[0]
    assert card.data.eval_results is None and card.data.get("base_model") is None and card.data.get("base_model_relation") is None
    assert card.data.to_dict() == {
        "license": "mit", "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["lox", "safety", "alignment", "lox-merge", "merge"],
    }  # fmt: skip
    manifest = json.loads((card_out / "lox_merge.json").read_text())
    for shard in manifest["output"]["shards"]:
        assert shard["sha256"] in card.content
    for words in ("delays the erosion", "no guarantee", "the local checkpoint `aligned`", f"{manifest['summary']['mean_r_align']:.3f}", "2506.15606"):
        assert words in card.content
    assert "None" not in card.content and "\n\n\n" not in card.content


def test_hub_sources_are_linked_with_their_commits(card_out: Path) -> None:
    base = {"kind": "hub", "name": "org/base", "commit": "b" * 40, "revision": None}
    aligned = {"kind": "hub", "name": "org/aligned", "commit": "a" * 40, "revision": "v1"}
    with warnings.catch_warnings(record=True) as caught:  # offline, and the licence is given
        warnings.simplefilter("always")
        both = build_card(from_hub(card_out, base=base, aligned=aligned), "me/hardened", CardSettings(licence=MIT))
    assert sorted(str(warning.message).split(" was not read")[0] for warning in caught) == ["the card of aligned", "the card of base"]
    assert both.data.base_model == ["org/aligned", "org/base"] and both.data.get("base_model_relation") == "merge"
    for words in (f"org/base@{'b' * 40} org/aligned@{'a' * 40}", "(https://huggingface.co/org/aligned)", f"`{'a' * 40}`"):
        assert words in both.content
    assert "lox-merge verify me/hardened\n" in both.content
    with pytest.warns(LoxMergeWarning):
        one = build_card(from_hub(card_out, aligned=aligned), None, CardSettings(licence=MIT))
    assert one.data.base_model == ["org/aligned"]
    with pytest.raises(SourceError, match=r"state the licence of the output with --license"):
        build_card(from_hub(card_out, aligned=aligned), None, CardSettings())


def test_the_adapter_form(card_out: Path) -> None:
    aligned = {"kind": "hub", "name": "org/aligned", "commit": "a" * 40, "revision": None}
    output = from_hub(card_out, aligned=aligned, base={"kind": "hub", "name": "org/base", "commit": "b" * 40})
    output = replace(output, manifest={**output.manifest, "output": {**output.manifest["output"], "form": "adapter"}})
    (card_out / "config.json").rename(card_out / "adapter_config.json")
    (card_out / "adapter_config.json").write_text('{"task_type": "CAUSAL_LM"}')
    config = replace(output.files[-1], name="adapter_config.json", path=card_out / "adapter_config.json")
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


# Licence


def test_the_licence_is_aligneds_own(card_pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, aligned = (shutil.copytree(card_pair[role], tmp_path / card_pair[role].name) for role in (0, 1))
    sources = {"base": base, "aligned": aligned}

    def written(role: Path, text: str) -> Card:
        (role / "README.md").write_text(text)
        return card_of(card_pair[2], licence=None, sources=sources)

    with pytest.raises(RequestError, match="licence of the output is unknown"):
        card_of(card_pair[2], licence=None, sources=sources)
    with pytest.raises(RequestError, match="licence of the output is unknown"):
        written(aligned, "no metadata")
    custom = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nlanguage:\n- en\n- de\npipeline_tag: text2text-generation\n---\n"
    data = written(aligned, custom).data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "own", "LICENSE")
    assert (data["language"], data["pipeline_tag"]) == (["en", "de"], "text2text-generation")
    with pytest.raises(RequestError, match=r"aligned is under other \(own\), base under llama2"):
        written(base, "---\nlicense: llama2\n---\n")
    with pytest.warns(LoxMergeWarning, match="published under mit, as you said"):
        card = card_of(card_pair[2], sources=sources)
    assert card.data.license == "mit" and "other (own)" in card.content and "llama2" in card.content
    with pytest.raises(RequestError, match="unknown"), pytest.warns(LoxMergeWarning, match="cannot be read"):
        written(aligned, "---\nlicense: [mit\n---\n")


@pytest.mark.parametrize(
    ("stated", "language"),
    [
        ("no", "no"),
        ("\n- en\n- no\n- sv", ["en", "no", "sv"]),
        ("'no'", "no"),
        ("5", None),
        ("{a: b}", None),
        ("\n- 5\n- de", ["de"]),
        ("yes", None),
        ("[]", None),
    ],
)
def test_the_language_is_what_is_a_code_in_aligneds_card(card_pair: tuple[Path, Path, Path], tmp_path: Path, stated: str, language: object) -> None:
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\nlanguage: {stated}\n---\n")
    card = card_of(card_pair[2], licence=None, sources={"aligned": tmp_path})
    assert card.data.to_dict().get("language") == language and ModelCard(card.content).data.to_dict() == card.data.to_dict()


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


def test_a_card_in_the_output_is_kept_rebuilt_or_refused(card_pair: tuple[Path, Path, Path], card_out: Path, tmp_path: Path) -> None:
    output = open_output(card_out)
    settings = CardSettings(licence=MIT)
    results = robustness(tmp_path / "r.json", None, {"aligned": [2], "LoX": [6]})
    write_card(output, build_card(output, "me/hardened", replace(settings, results=(results,))))
    assert verify(card_out, offline=True).ok and sorted(path.name for path in card_out.iterdir() if path.name in ("README.md", PICTURE)) == [
        "README.md",
        PICTURE,
    ]
    kept, where = card_to_publish(output, "me/hardened", CardSettings())  # a licence is not asked for again
    assert (
        kept.content == (card_out / "README.md").read_text()
        and kept.picture == (card_out / PICTURE).read_bytes()
        and where == "README.md of the output"
    )
    with pytest.raises(OutputError, match=r"was written for me/hardened, not for me/other.*lox-merge card hardened --repo me/other"):
        card_to_publish(output, "me/other", CardSettings())
    anew, where = card_to_publish(output, "me/hardened", settings)
    assert "Not evaluated" in anew.content and anew.picture is None and "written anew" in where

    text = (card_out / "README.md").read_text()
    (card_out / "README.md").write_text(text.replace("## Limits", "## My own words\n\nHello.\n\n## Limits"))
    card, where = card_to_publish(output, "me/hardened", CardSettings())
    assert "My own words" in card.content and "as it was edited" in where
    for call in (lambda: card_to_publish(output, "me/hardened", settings), lambda: write_card(output, build_card(output, None, settings))):
        with pytest.raises(OutputError, match="by hand"):
            call()
    other = tmp_path / "again"
    harden(card_pair[0], card_pair[1], other, recipe=Recipe(rank=1))
    shutil.copy(card_out / "README.md", other / "README.md")
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
    assert there is not None and there.ours and not there.edited and there.repo is None and not (card_out / PICTURE).exists()


def test_the_command_writes_and_reports(card_out: Path, tmp_path: Path, loopback_hub: LoopbackHub, hub_home: Path) -> None:
    results = robustness(tmp_path / "r.json", None, {"aligned": [2], "LoX": [6]})
    asked = ["--repo", "me/hardened", "--license", "mit", "--results", results, "--json", tmp_path / "card.json"]
    done = CliRunner().invoke(cli, ["card", str(card_out), *map(str, asked)])
    assert done.exit_code == 0, done.output
    assert done.output == f"README.md and {PICTURE} written to hardened (with results; licence mit).\n"
    report = json.loads((tmp_path / "card.json").read_text())
    assert report["written"] and report["metadata"] == ModelCard.load(card_out / "README.md").data.to_dict() and report["metadata"]["model-index"]
    file = str(card_out / "README.md")
    body = f"from huggingface_hub import ModelCard; card = ModelCard.load({file!r}); card.validate(); result = card.data.to_dict()"
    assert run_client(loopback_hub.environment(hub_home), body) == report["metadata"]
    assert [request.status for request in loopback_hub.requests] == [200]
    printed = CliRunner().invoke(cli, ["card", str(card_out), "--license", "mit", "--print"])
    assert printed.exit_code == 0 and printed.output.startswith("---\n") and "Not evaluated" in printed.output
    assert "Not evaluated" not in (card_out / "README.md").read_text()


def test_outputs_of_other_kinds_are_refused(card_pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mergekit_config.yml").write_text("x")
    with pytest.raises(OutputError, match="lox-merge yaml keeps no manifest"):
        open_output(tmp_path / "merged")
    with pytest.raises(OutputError, match=r"has no lox_merge\.json"):
        open_output(card_pair[1])


def test_files_of_a_card_are_none_of_the_model(card_pair: tuple[Path, Path, Path], card_out: Path, tmp_path: Path) -> None:
    """An output that was published with its card, hardened again."""
    results = robustness(tmp_path / "r.json", None, {"aligned": [2], "LoX": [6]})
    write_card(open_output(card_out), card_of(card_out, results))
    (card_out / "lox_merge_weights.json").write_text("{}")
    again = tmp_path / "again"
    harden(card_pair[0], card_out, again, recipe=Recipe(rank=1))
    assert not {PICTURE, "README.md", "lox_merge_weights.json"} & {path.name for path in again.iterdir()}

    # One that an earlier version made has the picture in its manifest.
    (again / PICTURE).write_bytes((card_out / PICTURE).read_bytes())
    manifest = json.loads((again / "lox_merge.json").read_text())
    manifest["output"]["files"][PICTURE] = "a" * 64
    (again / "lox_merge.json").write_text(json.dumps(manifest))
    document = json.loads(results.read_text())
    document["sources"]["aligned"]["name"] = "hardened"
    document["recipe"] = manifest["job"]["recipe"]
    results.write_text(json.dumps(document))
    with pytest.raises(OutputError, match=rf"again holds {PICTURE} from aligned.*--overwrite"):
        card_of(again, results)
    assert "Not evaluated" in card_of(again).content
