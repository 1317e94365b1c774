"""The metadata block of a README.md that somebody wrote or changed: what the Hub would not see or not take is said before it is asked."""

from __future__ import annotations

import re
import warnings
from typing import Any

from lox_merge.errors import LoxMergeWarning, RequestError
from lox_merge.publish.licence import stated_licence
from lox_merge.publish.sources import README

# As the Hub looks for it.
_BLOCK = re.compile(r"(\s*---(?:\r\n|\r|\n))([\S\s]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)")
_LINE_END = re.compile(r"\r\n|\r|\n")


def check_readme(data: bytes) -> None:
    """Raises RequestError for bytes that are no text, and for metadata that are not there or cannot be read; warns without a licence."""
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise RequestError(f"{README}, line {line}, is not UTF-8, which the Hub expects. Save it as UTF-8.") from error
    if content.startswith("\ufeff"):
        raise RequestError(f"{README} begins with a byte order mark, behind which the Hub sees no metadata. Save it as UTF-8 without one.")
    if stated_licence(read_metadata(content)) is None:
        warnings.warn(f"{README} states no licence in its metadata (a line such as license: apache-2.0).", LoxMergeWarning, stacklevel=3)


def read_metadata(content: str) -> dict[str, Any]:
    """The metadata of a card. Raises RequestError where there are none, or where they are not what the Hub and its client can read."""
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub import ModelCard

    block = _BLOCK.match(content)
    first = len(_LINE_END.findall(block.group(1))) + 1 if block else 1
    try:
        metadata = yaml.safe_load(block.group(2)) if block else None
    except yaml.YAMLError as error:
        mark, begun = (getattr(error, name, None) for name in ("problem_mark", "context_mark"))
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "they cannot be read"
        if mark and begun and begun.line != mark.line:
            problem += f"; what it belongs to begins in line {first + begun.line}"
        where = f"{README}, line {first + mark.line}" if mark else README
        raise RequestError(f"{where}: its metadata are no YAML ({problem}). Correct them.") from error
    if metadata is None:
        raise RequestError(
            f"{README} has no metadata (a block between two lines ---, at its beginning), so it would be published without a licence. "
            "Give it such a block, with license: in it."
        )
    if not isinstance(metadata, dict) or not all(isinstance(key, str) for key in metadata):
        raise RequestError(f"{README}, line {first}: its metadata are no table of names and values. Write lines such as license: apache-2.0.")
    try:
        ModelCard(content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = "model-index" if "model-index" in metadata else "metadata"
        hint = " (a list of models, each with its name and results: task, dataset and metrics)" if what == "model-index" else ""
        raise RequestError(f"{README}: its {what} cannot be read{hint}. Correct it, or take it out.") from error
    return metadata
