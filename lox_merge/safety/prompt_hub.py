"""Rows of a Hub data set, through the `datasets` package."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.hub_reference import parse_hub_reference
from lox_merge.errors import RequestError


def hub_rows(source: str, split: str | None, cache_dir: Path | None = None) -> tuple[str, list[dict[str, Any]]]:
    """Title and rows of `org/name[:configuration][@revision]`. Raises RequestError: no such thing, several splits, no package."""
    text, at, revision = source.partition("@")
    repository, colon, configuration = text.partition(":")
    reference = parse_hub_reference(repository + at + revision)
    if reference is None or (colon and not configuration):
        raise RequestError(
            f"there is no file {source}, and it is not a Hub data set id. Give a .csv, .jsonl, .json or .txt file, or an id such as "
            "org/name, org/name@revision or org/name:configuration."
        )
    try:
        # Imported here: it takes a second, and most prompts come from files.
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise RequestError(f"{source} is a Hub data set, which needs the package datasets: pip install datasets.") from error
    title = repository + (f":{configuration}" if configuration else "") + (f"@{revision}" if revision else "")
    options: dict[str, Any] = {"name": configuration or None, "revision": reference.revision, "cache_dir": str(cache_dir) if cache_dir else None}
    quiet = datasets.is_progress_bar_enabled()
    try:
        datasets.disable_progress_bars()
        if split is None:
            splits = datasets.get_dataset_split_names(repository, options["name"], revision=options["revision"])
            if len(splits) != 1:
                raise RequestError(f"{title} has the splits {', '.join(splits)}. Choose one with --split.")
            split = splits[0]
        rows = list(datasets.load_dataset(repository, split=split, **options))
    # The package raises its own, the Hub client's, the file system's and ValueError, with no common class; all mean the same to a user.
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(
            f"the data set {title} cannot be read: {error} ({type(error).__name__}). Check the id, its split ({split or 'none given'}), "
            "the connection, and whether it asks you to log in; or download it and give the file."
        ) from error
    finally:
        if quiet:
            datasets.enable_progress_bars()
    return f"{title}, split {split}", [dict(row) for row in rows]
