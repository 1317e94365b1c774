"""Under which licence a hardened model goes out: aligned's, if it states one that its base does not contradict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lox_merge.errors import RequestError

_UNKNOWN = {"", "unknown", "none"}


@dataclass(frozen=True)
class Licence:
    """As in the metadata of a card: identifiers of the Hub; name and link go with the identifier 'other'."""

    identifiers: tuple[str, ...]
    name: str | None = None
    link: str | None = None

    def __str__(self) -> str:
        shown = ", ".join(self.identifiers)
        return f"{shown} ({self.name})" if self.name else shown

    def metadata(self) -> dict[str, Any]:
        """license, license_name and license_link of the Hub's card metadata, as far as they are there."""
        one = self.identifiers[0] if len(self.identifiers) == 1 else list(self.identifiers)
        return {"license": one} | {key: value for key, value in (("license_name", self.name), ("license_link", self.link)) if value}


def stated_licence(metadata: Mapping[str, Any] | None) -> Licence | None:
    """The licence that a card's metadata states; None without a card, without a licence, or for 'unknown'."""
    stated = (metadata or {}).get("license")
    identifiers = tuple(text.strip().lower() for text in (stated if isinstance(stated, list) else [stated]) if isinstance(text, str))
    if not identifiers or set(identifiers) <= _UNKNOWN:
        return None
    name, link = ((metadata or {}).get(key) for key in ("license_name", "license_link"))
    return Licence(identifiers, str(name) if name else None, str(link) if link else None)


def given_licence(identifier: str | None, name: str | None = None, link: str | None = None) -> Licence | None:
    """What --license, --license-name and --license-link ask for. Raises RequestError for half of it."""
    if identifier is None:
        if name or link:
            raise RequestError("--license-name and --license-link describe a licence: add --license other (or another identifier of the Hub).")
        return None
    if identifier.strip().lower() in _UNKNOWN:
        raise RequestError(f"--license {identifier!r} states no licence. Give an identifier of the Hub, such as apache-2.0, or other.")
    if identifier.strip().lower() == "other" and not (name and link):
        raise RequestError("--license other says nothing by itself: add --license-name and --license-link.")
    return Licence((identifier.strip().lower(),), name, link)


def choose_licence(aligned: Licence | None, base: Licence | None, given: Licence | None) -> Licence:
    """The licence of the output. Raises RequestError where none is known, or where base and aligned state different ones."""
    if given is not None:
        return given
    if aligned is None:
        raise RequestError(
            "the licence of the output is unknown: the card of aligned states none, or is not at hand. Say it with --license (an identifier "
            "of the Hub, such as apache-2.0)" + (f"; base is under {base}." if base else ".")
        )
    if base is not None and conflict(aligned, base):
        raise RequestError(
            f"the licences of the sources differ: aligned is under {aligned}, base under {base}, and the output is made from both. Find out "
            "which terms it may be published under, and say so with --license."
        )
    return aligned


def conflict(aligned: Licence | None, base: Licence | None) -> bool:
    """True where both are known and are not the same. Whether two different licences go together is not for a program to say."""
    return aligned is not None and base is not None and (set(aligned.identifiers), aligned.name) != (set(base.identifiers), base.name)
