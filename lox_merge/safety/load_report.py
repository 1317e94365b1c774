"""What transformers says it did while it filled a model from a checkpoint: weights it made up are no model's, and are refused."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lox_merge.errors import CheckpointFormatError, LoxMergeWarning
from lox_merge.wording import first_few

_MOST_NAMED = 3
_REPORT = "LOAD REPORT"


def check_report(report: Mapping[str, Any], model: Any, title: str) -> None:
    """report: what `from_pretrained` gives for output_loading_info, asked to go on where shapes differ. Tied weights are not missing there.

    Raises CheckpointFormatError for parameters that the checkpoint lacks or holds in another shape: transformers draws them at random,
    and figures of such a model look like any other's. Tensors that the model has no use for are named in a LoxMergeWarning.
    """
    kind = type(model).__name__
    if lacking := report["missing_keys"]:
        raise CheckpointFormatError(
            f"{title} holds no weights for {len(lacking):,} parameter(s) of the {kind} that its config.json describes: {_some(lacking)}. "
            "They would be random numbers. Restore the config.json that belongs to these weights (check its number of layers, and "
            "tie_word_embeddings), or get the whole checkpoint."
        )
    if unlike := sorted(report["mismatched_keys"], key=lambda entry: _natural(entry[0])):
        name, stored, wanted = unlike[0]
        more = f" ({len(unlike) - 1:,} more differ)" if len(unlike) > 1 else ""
        raise CheckpointFormatError(
            f"{title} holds {name} of shape {list(stored)}, where its config.json asks for {list(wanted)}{more}. "
            "Restore the config.json that belongs to these weights."
        )
    if idle := report["unexpected_keys"]:
        warnings.warn(
            f"{title}: {len(idle):,} tensor(s) have no place in {kind} and play no part in what it says: {_some(idle)}. "
            "Where that is a layer of the model, its config.json is not the one that belongs to these weights",
            LoxMergeWarning,
            stacklevel=3,
        )


@contextmanager
def report_withheld() -> Iterator[None]:
    """Keeps back the table that transformers logs of the same findings; shows it after all where loading fails in another way."""
    logger = logging.getLogger("transformers.modeling_utils")
    held: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        if _REPORT not in record.getMessage():
            return True
        held.append(record)
        return False

    logger.addFilter(keep)
    try:
        yield
    except BaseException:
        logger.removeFilter(keep)
        for record in held:
            logger.handle(record)
        raise
    finally:
        logger.removeFilter(keep)


def _some(names: Iterable[str]) -> str:
    found: list[str] = sorted(names, key=_natural)
    return first_few(found, _MOST_NAMED)


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
