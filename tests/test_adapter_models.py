"""PEFT adapters where a command wants a model to run: merged in memory, with the figures of the merged checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from adapters import edit_config, make_adapter, merge
from conftest import RunCli
from tiny_models import make_pair

import lox_merge
from lox_merge.cli.activations import activations_command
from lox_merge.cli.asr import asr_command
from lox_merge.cli.behaviour import behaviour_command
from lox_merge.cli.curvature import curvature_command
from lox_merge.cli.framing import framing_command
from lox_merge.cli.landscape import landscape_command
from lox_merge.errors import RequestError
from lox_merge.safety.adapted import load_any
from lox_merge.safety.attack import AttackSettings
from lox_merge.safety.conversations import load_conversations
from lox_merge.safety.decoding import Decoding
from lox_merge.safety.judges.factory import make_judge
from lox_merge.safety.prompts import load_prompts
from lox_merge.safety.robustness import compare_under_attack

ALONE = ("asr", "landscape", "curvature", "framing")
COMMANDS: dict[str, click.Command] = {
    "asr": asr_command,
    "landscape": landscape_command,
    "curvature": curvature_command,
    "framing": framing_command,
    "behaviour": behaviour_command,
    "activations": activations_command,
}
PROMPTS = ("how do i", "help you", "yes no")
ANYTHING = "def decided(prompt, reply):\n    return len(reply) % 2 == 0\n"


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """aligned, an adapter over it, both merged (float32, so that nothing is rounded), and what commands read."""
    folder = tmp_path_factory.mktemp("adapters")
    base, aligned = make_pair(folder, "llama", "float32", aligned_shards=1, vocabulary=15)
    adapter = make_adapter(aligned, folder / "adapter", target_modules=["q_proj", "down_proj"])
    merge(aligned, adapter, folder / "merged")
    words(adapter, folder / "merged")
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")
    rows = [{"prompt": "how do i", "response": "no sorry i cannot"}, {"prompt": "help you", "response": "yes i do"}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    others = [row | {"prompt": "sorry no"} for row in rows]
    (folder / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others), encoding="utf-8")
    (folder / "judge.py").write_text(ANYTHING, encoding="utf-8")
    return {"folder": folder, "base": base, "aligned": aligned, "adapter": adapter, "merged": folder / "merged"}


def words(adapter: Path, merged: Path) -> None:
    """The tokenizer that an adapter brings."""
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(adapter / file, merged)


def run(command: str, models: Sequence[Path], there: dict[str, Path], *options: object) -> Any:
    """What the command measured of the last of `models`, without its name."""
    folder = there["folder"]
    written, pairs = folder / "written.json", folder / "pairs.jsonl"
    measured = ("--prompts", folder / "prompts.txt", "--judge", f"python:{folder / 'judge.py'}:decided", "--no-cache", "--max-new-tokens", 4)
    own: dict[str, tuple[object, ...]] = {
        "asr": (*measured, "--transcripts", folder / "transcripts.jsonl"),
        "landscape": (*measured, "--random", 1, "--range", "-1:1", "--steps", 4),
        "curvature": ("--completions", pairs, "--data", pairs, "--data-batch-size", 1),
        "framing": ("--first", pairs, "--second", folder / "others.jsonl"),
    }
    texts = [str(one) for one in (*models, *own.get(command, ("--pairs", pairs)), "--device", "cpu", "--json", written, *options)]
    COMMANDS[command].main(texts, standalone_mode=False)
    document = json.loads(written.read_text(encoding="utf-8"))
    if command == "asr":
        kept = map(json.loads, (folder / "transcripts.jsonl").read_text(encoding="utf-8").splitlines())
        return [record["reply"] for record in kept][-len(PROMPTS) :]
    if command == "landscape":
        return [point["attack_success"] for one in document["slices"] for point in one["points"]]
    if command == "curvature":
        return {"trace": document["fisher"]["trace"], "coupling": document["data"][0]["coupling"]["value"]}
    return document["models"][-1]["gradient"] if command == "framing" else document["models"]


def near(one: Any, other: Any) -> bool:
    """Equal up to float32 rounding of the two ways to add B·A."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(near(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(near, one, other))
    return one == other if not isinstance(one, float) else one == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("command", ALONE)
def test_the_figures_are_those_of_the_merged_model(there: dict[str, Path], command: str) -> None:
    found = run(command, [there["adapter"]], there, "--adapter-base", there["aligned"])
    assert near(found, run(command, [there["merged"]], there)) and not near(found, run(command, [there["aligned"]], there))


def test_later_models_may_be_adapters_over_the_first(there: dict[str, Path]) -> None:
    assert run("asr", [there["aligned"], there["adapter"]], there) == run("asr", [there["aligned"], there["merged"]], there)


@pytest.mark.parametrize("command", ALONE)
def test_an_adapter_alone_is_refused_with_the_way_out(there: dict[str, Path], command: str) -> None:
    with pytest.raises(RequestError, match=r"is a PEFT adapter.*--adapter-base"):
        run(command, [there["adapter"]], there)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_adapter_of_another_name_says_which_option(there: dict[str, Path], tmp_path: Path, command: str) -> None:
    """The message names an option, so the command has to have it."""
    strange = Path(shutil.copytree(there["adapter"], tmp_path / "strange"))
    edit_config(strange, base_model_name_or_path="elsewhere")
    models, over = ([strange], ("--adapter-base", there["aligned"])) if command in ALONE else ([there["base"], there["aligned"], strange], ())
    with pytest.raises(RequestError, match="--base-is-right"):
        run(command, models, there, *over)
    assert run(command, models, there, *over, "--base-is-right")


def test_nothing_is_written_and_the_command_line_says_the_same(there: dict[str, Path], tmp_path: Path, run_cli: RunCli) -> None:
    asked = ("--prompts", there["folder"] / "prompts.txt", "--no-cache", "--max-new-tokens", 2, "--device", "cpu")
    done = run_cli("asr", there["adapter"], *asked, "--adapter-base", there["aligned"], "--json", "-", cwd=tmp_path)
    assert json.loads(done.stdout)["evaluations"][0]["model"]["source"]["form"] == "adapter" and not list(tmp_path.iterdir())
    done = run_cli("asr", there["adapter"], *asked, cwd=tmp_path)
    assert done.returncode == 2 and "--adapter-base" in done.stderr and "Traceback" not in done.stderr


def test_robustness_takes_adapters(there: dict[str, Path], tmp_path: Path) -> None:
    """ALIGNED an adapter over BASE, HARDENED one over that: as the merged models."""
    plain = make_adapter(there["base"], tmp_path / "plain", target_modules=["v_proj", "up_proj"])
    merge(there["base"], plain, tmp_path / "aligned")
    words(plain, tmp_path / "aligned")
    thin = make_adapter(tmp_path / "aligned", tmp_path / "thin", target_modules=["o_proj"])
    merge(tmp_path / "aligned", thin, tmp_path / "hardened")

    def attacked(aligned: Path, hardened: Path) -> list[tuple[str, list[float | None]]]:
        result = compare_under_attack(
            there["base"],
            aligned,
            hardened,
            [load_conversations(there["folder"] / "pairs.jsonl")],
            load_prompts(there["folder"] / "prompts.txt"),
            [make_judge("keyword")],
            settings=AttackSettings(steps=(0, 1), learning_rate=1e-3, batch_size=2, max_length=32),
            model={"decoding": Decoding(max_new_tokens=2)},
            recipe=lox_merge.Recipe(rank=2),
            device="cpu",
            base_is_right=True,
        )
        return [(curve.model, [curve.r_align.mean, *(point.r_ft.mean for point in curve.points)]) for curve in result.curves]

    found, expected = attacked(plain, thin), attacked(tmp_path / "aligned", tmp_path / "hardened")
    assert [name for name, _ in found] == ["aligned", "LoX"] and found[0][1] != found[1][1]
    for (_, one), (_, other) in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_an_adapter_needs_something_to_lie_over(there: dict[str, Path]) -> None:
    with pytest.raises(RequestError, match="is a PEFT adapter"):
        load_any(there["adapter"], device="cpu")
    loaded = load_any(there["adapter"], adapter_base=there["aligned"], device="cpu")
    assert loaded.source["form"] == "adapter" and loaded.title == "adapter"
