"""The cards of the models that an output was made from: licence, task and language are theirs."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.files import find_source
from lox_merge.errors import LoxMergeWarning, RequestError, SourceError
from lox_merge.publish.licence import Licence, choose_licence, conflict, stated_licence

README = "README.md"


@dataclass(frozen=True)
class SourceCard:
    """One source as the manifest knows it. metadata: of its own card, None where that is not at hand."""

    role: str
    identity: Mapping[str, Any]
    metadata: Mapping[str, Any] | None = field(repr=False)

    @property
    def name(self) -> str:
        return str(self.identity["name"])

    @property
    def on_hub(self) -> bool:
        return bool(self.identity["kind"] == "hub")

    @property
    def commit(self) -> str | None:
        return self.identity.get("commit")

    @property
    def licence(self) -> Licence | None:
        return stated_licence(self.metadata)


def read_source_cards(
    identities: Mapping[str, Mapping[str, Any]],
    given: Mapping[str, str | Path | None],
    *,
    licence: Licence | None = None,
    cache_dir: Path | None = None,
) -> tuple[dict[str, SourceCard], Licence]:
    """The cards of base and aligned, and the licence of what is made from them.

    identities: as the manifest records the sources. given: where local ones are, if that is known. licence: what the user states.
    Raises RequestError for an unknown or contradictory licence, SourceError for a Hub source that cannot be read (a
    LoxMergeWarning instead where `licence` is given: it is then not needed).
    """
    cards = {}
    for role, identity in identities.items():
        try:
            metadata = _metadata(role, identity, given.get(role), cache_dir)
        except SourceError as error:
            if licence is None:
                raise SourceError(f"the card of a source cannot be read. {error} Or state the licence of the output with --license.") from error
            warnings.warn(f"the card of {role} was not read, so its licence was not compared with yours: {error}", LoxMergeWarning, stacklevel=2)
            metadata = None
        cards[role] = SourceCard(role, identity, metadata)
    stated = {role: card.licence for role, card in cards.items()}
    chosen = choose_licence(stated["aligned"], stated["base"], licence)
    if conflict(stated["aligned"], stated["base"]):
        warnings.warn(
            f"aligned is under {stated['aligned']} and base under {stated['base']}; the output is published under {chosen}, as you said.",
            LoxMergeWarning,
            stacklevel=2,
        )
    return cards, chosen


def _metadata(role: str, identity: Mapping[str, Any], given: str | Path | None, cache_dir: Path | None) -> dict[str, Any] | None:
    if identity["kind"] == "hub":
        source = find_source(f"{identity['name']}@{identity['commit']}", role, cache_dir)
        return card_metadata(source.path(README), f"{role}: {source.title}") if README in source.names() else None
    if given is None:
        return None
    if not Path(given).is_dir():
        raise RequestError(f"--{role} {given} is no folder. Give the folder of the checkpoint that was used.")
    path = Path(given) / README
    return card_metadata(path, f"{role}: {identity['name']}") if path.is_file() else None


def card_metadata(path: Path, where: str) -> dict[str, Any] | None:
    """The metadata block of a README, None if it has none. A block that is no YAML is a LoxMergeWarning and counts as none."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(path)
    except (ValueError, yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"{where}: the metadata of its card cannot be read ({reason}), so its licence is unknown.", LoxMergeWarning, stacklevel=2)
        return None
