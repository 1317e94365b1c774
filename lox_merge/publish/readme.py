"""README.md in an output: written beside the weights, recognised again, and never replaced where somebody worked on it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import OutputError
from lox_merge.jobs.atomic import write_atomically
from lox_merge.jobs.output_folder import MANIFEST, WORK_FOLDER
from lox_merge.publish.card import Card, CardSettings, build_card, text_hash
from lox_merge.publish.front_matter import check_readme
from lox_merge.publish.output import FinishedOutput
from lox_merge.publish.picture import PICTURE
from lox_merge.publish.sources import README

_MARK = re.compile(r"\n<!-- lox-merge card (\{.*\}) -->\n?\Z")


@dataclass(frozen=True)
class Existing:
    """A README.md in an output. data: its bytes, of which the card's text is what can be read. ours: lox-merge wrote it; edited: and
    somebody changed it; manifest, repo: what it is of."""

    data: bytes
    card: Card
    ours: bool
    edited: bool
    manifest: str | None
    repo: str | None


def existing_card(output: FinishedOutput) -> Existing | None:
    """The card in the output's folder, None where there is none."""
    return _card_in(output.folder)


def _card_in(folder: Path) -> Existing | None:
    path = folder / README
    if not path.is_file():
        return None
    data = path.read_bytes()
    content = data.decode("utf-8", errors="replace")
    picture = folder / PICTURE
    card = Card(content, picture.read_bytes() if picture.is_file() and PICTURE in content else None)
    text = content.replace("\r\n", "\n")  # other line ends are no other text
    match = _MARK.search(text)
    try:
        mark = parse_json(match.group(1)) if match else None
    except ValueError:
        mark = None
    if match is None or not isinstance(mark, dict):
        return Existing(data, card, False, True, None, None)
    return Existing(data, card, True, text_hash(text[: match.start()]) != mark.get("text"), mark.get("manifest"), mark.get("repo"))


def write_card(output: FinishedOutput, card: Card, *, overwrite: bool = False) -> Path:
    """Writes README.md and its picture beside the weights. Neither is one of the manifest's files, so `verify` still passes.

    Raises OutputError where that would destroy what somebody wrote by hand.
    """
    there = existing_card(output)
    if there is not None and there.edited and not overwrite:
        reason = "was changed by hand" if there.ours else "was not written by lox-merge"
        raise OutputError(f"{output.name}/{README} {reason}. Pass --overwrite to replace it, or move it away.")
    for name, data in card.files.items():
        write_atomically(output.folder / name, data, output.folder)
    if card.picture is None and there is not None and there.card.picture is not None and PICTURE not in output.hashes:
        (output.folder / PICTURE).unlink(missing_ok=True)
    return output.folder / README


def card_to_publish(output: FinishedOutput, repo: str, settings: CardSettings) -> tuple[Card, str]:
    """The card that goes to `repo`, and in words where it is from: README.md of the output where that is of this output, else a new one.

    Raises OutputError for a README.md that is of something else and was written by hand, RequestError for one that cannot be read.
    """
    there = existing_card(output)
    if there is None:
        return build_card(output, repo, settings), "written anew"
    if _stays(there, output.name, output.manifest_sha256, repo, settings):
        return there.card, f"{README} of the output" + (", as it was edited" if there.edited else "")
    current = there.manifest == output.manifest_sha256 and there.repo == repo
    return build_card(output, repo, settings), f"written anew: {README} of the output was " + ("stale" if not current else "replaced")


def card_ahead(folder: Path, repo: str, settings: CardSettings) -> Card | None:
    """README.md that lies in the folder of a job already and will be published; None where one will be written. Raises as `card_to_publish`."""
    there = _card_in(folder) if (folder / MANIFEST).is_file() or (folder / WORK_FOLDER).is_dir() else None
    if there is None:
        return None
    manifest = folder / MANIFEST
    # Without a manifest the job is under way, and makes the one that the card is of, or does not.
    sha256 = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else there.manifest
    return there.card if _stays(there, folder.name, sha256, repo, settings) else None


def _stays(there: Existing, name: str, manifest_sha256: str | None, repo: str, settings: CardSettings) -> bool:
    """Whether it is published as it is, not written anew. Raises where neither may be."""
    current = there.manifest == manifest_sha256 and there.repo == repo
    if there.ours and current and not settings.says_something:
        check_readme(there.data)
        return True
    if not there.edited:
        if there.manifest == manifest_sha256 and not settings.says_something:
            raise OutputError(
                f"{name}/{README} was written for {there.repo or 'no repository'}, not for {repo}. Write it for this one, with the same "
                f"--results and --license as before: lox-merge card {name} --repo {repo}."
            )
        return False
    reason = f"is not for this output as {repo}" if not current else "was edited by hand, and --results or --license would replace it"
    raise OutputError(
        f"{name}/{README} {reason if there.ours else 'was not written by lox-merge'}. Move it away, or write it anew: "
        f"lox-merge card {name} --repo {repo} --overwrite."
    )
