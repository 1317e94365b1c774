"""What measuring commands say of small mistakes: the words name what is wrong, and nothing is ignored in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from conftest import RunCli
from openai_server import OpenAIServer
from tiny_models import make_pair, tokenizer

from lox_merge.cli.activations import _named
from lox_merge.cli.main import cli
from lox_merge.cli.search import _check_found
from lox_merge.diagnostics.measures import Spectrum, _overlaps
from lox_merge.errors import LoxMergeError, RecipeError, RequestError
from lox_merge.maths.subspace import Certificate
from lox_merge.safety.chat import Rendering, render
from lox_merge.safety.judges.python_judge import PythonJudge
from lox_merge.safety.line_store import LineStore
from lox_merge.safety.search_utility import load_measures
from lox_merge.safety.types import Exchange


def refused(*arguments: object) -> str:
    with pytest.raises((RequestError, click.UsageError)) as error:
        cli.main([str(argument) for argument in arguments], standalone_mode=False)
    return str(error.value) if isinstance(error.value, RequestError) else error.value.format_message()


def test_files_that_are_missing_or_folders_are_called_so(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes("question,answer\nä,b\n".encode("latin-1"))
    for file, words in (("missing.csv", "there is no file"), (".", "is a folder"), ("latin.csv", "Save it as UTF-8")):
        for measure in ({"questions": tmp_path / file}, {"text": tmp_path / file}):
            with pytest.raises(RequestError, match=words) as error:
                load_measures(measure.get("questions"), measure.get("text"), None)
            assert ("UTF-8" in str(error.value)) is (file == "latin.csv")


def test_a_threshold_that_no_judge_reads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n")
    for judge in ("keyword", "classifier:org/name#unsafe"):
        assert "--threshold is for judges that give scores" in refused(
            "asr", "m", "--prompts", tmp_path / "p.txt", "--judge", judge, "--threshold", 3
        )


def test_a_file_in_the_place_of_a_folder_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n")
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refused("asr", "m", "--prompts", tmp_path / "p.txt", "--replies", file)
    assert "is a directory" in refused("landscape", "m", "--prompts", tmp_path / "p.txt", "--points", tmp_path)
    for path in (file / "1.jsonl", file / "deeper" / "1.jsonl"):
        with pytest.raises(RequestError, match=f"{file} is a file; name a folder"):
            LineStore(path, "replies", {}, "a reply")
    with pytest.raises(RequestError, match=r"is a folder\. Name a file"):
        LineStore(tmp_path, "landscape points", {}, "a point")


def test_an_encoding_that_fails_shows_what_was_encoded() -> None:
    words = tokenizer()
    with pytest.raises(RequestError, match=r"the prompt 'how do i' as it is rendered \('how do izzz'\)"):
        _only_known(words, "how do i", Rendering(chat_template=False, prefill="zzz"))
    with pytest.raises(RequestError, match=r"the prompt 'zzz': "):
        _only_known(words, "zzz", Rendering(chat_template=False))


def _only_known(words: Any, prompt: str, rendering: Rendering) -> None:
    class Strict:
        """Refuses the unknown word, as tokenizers without a token for it do."""

        eos_token_id = words.eos_token_id

        def __call__(self, text: str, **options: Any) -> Any:
            if "zzz" in text:
                raise Exception("Missing [UNK] token")
            return words(text, **options)

    render(Strict(), prompt, rendering)


@pytest.mark.parametrize("write", [False, True])
def test_a_search_without_a_rank_says_so_in_one_sentence(write: bool) -> None:
    class Nothing:
        effective_rank, rho, confident = None, 0.01, False

    with pytest.raises(LoxMergeError, match=r"rho = 0\.01; (nothing was hardened; )?try higher ranks"):
        _check_found(Nothing(), write=write)  # type: ignore[arg-type]


def test_a_judge_that_gives_nothing_is_quoted(tmp_path: Path, run_cli: RunCli) -> None:
    (tmp_path / "judge.py").write_text(
        "from lox_merge.safety.types import Verdict\n"
        "def none(prompt, reply): return None\n"
        "def empty(prompt, reply): return Verdict(None)\n"
        "def nan(prompt, reply): return Verdict(True, float('nan'))\n"
    )
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    for name, words in (("none", "the judge returned None (undecided)"), ("empty", "the judge returned None (undecided)"), ("nan", "not finite")):
        (verdict,) = PythonJudge(f"{tmp_path / 'judge.py'}:{name}").judge([Exchange("a", "b")])
        assert verdict.success is None and words in verdict.explanation
    with OpenAIServer(reply_with=lambda body: "Here it is") as served:
        arguments = ["asr", "m", "--endpoint", served.url, "--no-key", "--prompts", tmp_path / "p.txt", "--no-cache"]
        done = run_cli(*arguments, "--judge", f"python:{tmp_path / 'judge.py'}:none")
    assert done.returncode == 1 and "The first reason: the judge returned None (undecided)" in done.stderr


def test_sets_of_prompts_need_a_name_and_a_file() -> None:
    for value in ("=x.txt", "x=", "="):
        with pytest.raises(RecipeError, match="is not NAME=FILE, such as harmful="):
            _named((value,))
    assert _named(("a=x.txt", "y.txt")) == {"a": "x.txt", "y": "y.txt"}


def test_an_overlap_is_at_most_one() -> None:
    """float32 bases are orthonormal to seven digits: the overlap of a subspace with itself came out as 1.0000004768."""
    basis = torch.linalg.qr(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))[0] * (1 + 3e-7)
    squares = torch.ones(8, dtype=torch.float64)
    certificate = Certificate("exact", 0.0, 1.0, None, 0)
    spectrum = Spectrum(squares, 8.0, None, True, 8, 0.0, certificate)
    assert float((basis.T @ basis).double().square().sum()) / 8 > 1
    assert [found.value for found in _overlaps((basis, spectrum), (basis, spectrum), (0.99,))] == [1.0]


def test_intervals_of_late_tokens_are_null_as_the_page_says(tmp_path: Path, run_cli: RunCli) -> None:
    base, aligned = make_pair(tmp_path, "llama", "float32")
    rows = [{"prompt": "how do i", "response": " ".join(["you cannot help"] * 8)}, {"prompt": "do you", "response": " ".join(["no yes sorry"] * 8)}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_cli("behaviour", base, aligned, "--pairs", tmp_path / "pairs.jsonl", "--device", "cpu", "--json", "-")
    assert done.returncode == 0, done.stderr
    positions = json.loads(done.stdout)["sets"][0]["kl_from_base"]["aligned"]["positions"]
    assert len(positions) > 20 and [position["interval"] is None for position in positions] == [place >= 20 for place in range(len(positions))]
    assert "none after the 20th" in " ".join((Path(__file__).parents[1] / "docs" / "behaviour.md").read_text().split())
