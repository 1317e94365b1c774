"""The model card of an output: a view of its manifest, its sources' cards and what was measured. It claims nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lox_merge.errors import OutputError
from lox_merge.publish.body import card_body
from lox_merge.publish.licence import Licence
from lox_merge.publish.metadata import TAGS, base_models, card_data, evaluation_results, pipeline_tag
from lox_merge.publish.output import FinishedOutput
from lox_merge.publish.picture import PICTURE, draw
from lox_merge.publish.privacy import check_text
from lox_merge.publish.results import Measured, Subject, read_results
from lox_merge.publish.sources import README, SourceCard, read_source_cards

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


@dataclass(frozen=True)
class CardSettings:
    """What a user may say about a card. sources: where local sources are ('base', 'aligned'), for their cards' licences."""

    results: tuple[Path, ...] = ()
    licence: Licence | None = None
    sources: Mapping[str, str | Path | None] = field(default_factory=dict)
    cache_dir: Path | None = None

    @property
    def says_something(self) -> bool:
        return bool(self.results or self.licence)


@dataclass(frozen=True)
class Card:
    """README.md as text, and the picture that it shows (None: it shows none)."""

    content: str
    picture: bytes | None = field(default=None, repr=False)

    @property
    def files(self) -> dict[str, bytes]:
        return {README: self.content.encode("utf-8")} | ({PICTURE: self.picture} if self.picture is not None else {})

    @property
    def data(self) -> ModelCardData:
        from huggingface_hub import ModelCard

        return ModelCard(self.content).data  # type: ignore[return-value]


def build_card(output: FinishedOutput, repo: str | None, settings: CardSettings) -> Card:
    """The card of `output` as the repository `repo` (None: its folder's name stands for it).

    Raises RequestError for results of another model, a licence that is unknown or contradictory, or anything private in the text, and
    OutputError where the picture would replace a file of the model.
    """
    sources, licence = read_source_cards(output.manifest["sources"], settings.sources, licence=settings.licence, cache_dir=settings.cache_dir)
    names = tuple(name for name in (repo, output.name) if name)
    subject = Subject(names, output.manifest_sha256, output.manifest["job"]["recipe"], output.manifest["sources"])
    measured = read_results(settings.results, subject)
    picture = draw(measured)
    if picture is not None and PICTURE in output.hashes:
        raise OutputError(
            f"{output.name} holds {PICTURE} from aligned among the files of its manifest, so the card's picture cannot be written under that name. "
            "Make the output again with lox-merge harden --overwrite, which leaves that file out, or leave out --results."
        )
    body = card_body(output, repo or output.name, sources, measured, with_picture=picture is not None)
    data = _metadata(output, repo or output.name, sources, licence, measured)
    text = f"---\n{data.to_yaml()}\n---\n\n{body}"
    check_text(text, README, [output.folder, output.folder.parent], remedy="It stands in the result files or in the manifest; correct it there.")
    mark = {"manifest": output.manifest_sha256, "repo": repo, "text": text_hash(text)}
    return Card(f"{text}\n<!-- lox-merge card {json.dumps(mark)} -->\n", picture)


def _metadata(output: FinishedOutput, repo: str, sources: Mapping[str, SourceCard], licence: Licence, measured: Measured) -> ModelCardData:
    aligned = sources["aligned"]
    used = [aligned] if output.is_adapter else [aligned, sources["base"]]
    return card_data(
        licence=licence.metadata(),
        base_model=base_models([source.identity for source in used]),
        relation="adapter" if output.is_adapter else "merge",
        library="peft" if output.is_adapter else "transformers",
        pipeline_tag=pipeline_tag(output.config, aligned.metadata),
        language=stated_language(aligned),
        tags=(*TAGS, "lox-merge", "adapter" if output.is_adapter else "merge"),
        model_name=repo.rpartition("/")[2],
        results=evaluation_results(measured),
    )


def stated_language(aligned: SourceCard) -> str | list[str] | None:
    """As aligned's card states it, without what is no code of a language. The code of Norwegian is no string in YAML 1.1 unless quoted."""
    stated = (aligned.metadata or {}).get("language")
    codes = ["no" if code is False else code for code in (stated if isinstance(stated, list) else [stated])]
    kept = [code for code in codes if isinstance(code, str)]
    return (kept if isinstance(stated, list) else kept[0]) if kept else None


def text_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
