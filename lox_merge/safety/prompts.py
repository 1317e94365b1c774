"""Prompts from a file (CSV, JSONL, JSON, plain text) or a Hub data set, as one hashed set."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lox_merge.checkpoint.json_text import parse_json
from lox_merge.errors import RequestError
from lox_merge.safety.prompt_hub import hub_rows
from lox_merge.safety.types import Prompt, PromptSet
from lox_merge.wording import first_few

Row = dict[str, Any]

# AdvBench calls it goal; the others are what data sets of prompts and of questions use, the more telling name first.
PROMPT_COLUMNS = ("goal", "prompt", "text", "question", "instruction", "behavior")
_SHOWN = 8


def load_prompts(
    source: str | Path,
    *,
    column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    cache_dir: Path | None = None,
) -> PromptSet:
    """The prompts of a file, or of the Hub data set `org/name`, `org/name@revision` or `org/name:configuration`.

    column: the first of PROMPT_COLUMNS by default. split: of a Hub data set only; may be left out where there is just one.
    limit: the first so many prompts, or, with a seed, a random sample of that size in the order of the source.
    A column `category` is kept, a column `id` names the prompts. Plain text holds one prompt a line; blank lines are skipped.
    Raises RequestError: nothing there, no such column, empty prompts, no prompts.
    """
    if limit is not None and limit < 1:
        raise RequestError(f"a limit of {limit} prompts leaves nothing to ask; give 1 or more.")
    path = Path(source).expanduser()
    if path.is_file():
        if split is not None:
            raise RequestError(f"{path.name} is a file, which has no split {split!r}; only Hub data sets have. Leave the split out.")
        title, rows = path.name, read_rows(path)
        if column is not None and rows and isinstance(rows[0], str):
            raise RequestError(f"{path.name} holds plain texts, which have no column {column!r}. Leave the column out.")
    else:
        title, rows = hub_rows(str(source), split, cache_dir)
    prompts, used = _prompts(rows, column, title)
    chosen = _select(prompts, limit, seed)
    return prompt_set(chosen, title if used is None or path.is_file() else f"{title}, column {used}")


def prompt_set(prompts: Iterable[Prompt], source: str) -> PromptSet:
    """A set with its hash: sha256 of the JSON list of [identity, text, category], without spaces, UTF-8. Any number of prompts."""
    kept = tuple(prompts)
    document = [[prompt.identity, prompt.text, prompt.category] for prompt in kept]
    data = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    return PromptSet(kept, hashlib.sha256(data).hexdigest(), source)


def read_text(path: Path) -> str:
    """A file's text. Raises RequestError saying whether it is missing, a folder, unreadable, or of another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark, which would become part of a name
    except FileNotFoundError as error:
        raise RequestError(f"there is no file {path}. Check the name.") from error
    except IsADirectoryError as error:
        raise RequestError(f"{path} is a folder. Name a file in it.") from error
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}. Check its permissions, or name another file.") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path.name} cannot be read as UTF-8 text: {error}. Save it as UTF-8.") from error


def read_rows(path: Path) -> Sequence[Row] | Sequence[str]:
    """A file's rows: dicts by column, or strings where there are no columns. The suffix decides the format. Raises RequestError."""
    text = read_text(path)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _csv_rows(text, path.name, "\t" if suffix == ".tsv" else ",")
    if suffix in (".jsonl", ".ndjson"):
        return _records([_parse(line, f"{path.name}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()], path.name)
    if suffix == ".json":
        value = _parse(text, path.name)
        if not isinstance(value, list):
            raise RequestError(f"{path.name} does not hold a JSON list. Save the prompts as a list of strings or of objects.")
        return _records(value, path.name)
    return [line.rstrip("\r") for line in text.split("\n") if line.strip()]


def column_of(rows: Sequence[Row], wanted: str | None, defaults: Sequence[str], title: str) -> str:
    """The column asked for, else the first default that is there (capitals do not matter). RequestError lists those there are."""
    there = list(dict.fromkeys(name for row in rows for name in row))
    lowered = {name.lower(): name for name in reversed(there)}
    if wanted is not None and wanted in there:
        return wanted
    found = [lowered[name] for name in defaults if name in lowered] if wanted is None else []
    if not found:
        missing = f"no column {wanted!r}" if wanted is not None else f"none of the columns {', '.join(defaults)}"
        raise RequestError(f"{title} has {missing}. It has: {', '.join(there) or 'no columns'}. Name one of them with --column.")
    return found[0]


def numbers(rows: Sequence[int]) -> str:
    """Row numbers for a message: '3, 4, 9 and 12 more'."""
    return first_few(rows, _SHOWN)


def _prompts(rows: Sequence[Row] | Sequence[str], column: str | None, title: str) -> tuple[list[Prompt], str | None]:
    if not rows:
        raise RequestError(f"{title} holds no prompts. Give a file or split with at least one.")
    table = [row if isinstance(row, dict) else {"prompt": row} for row in rows]
    used = column_of(table, column, PROMPT_COLUMNS, title)
    category, identity = _optional(table, "category"), _optional(table, "id")
    texts = [row.get(used) for row in table]
    refuse_rows(texts, lambda text: text is None or (isinstance(text, str) and not text.strip()), f"{title}: column {used} is empty")
    refuse_rows(texts, lambda text: not isinstance(text, str), f"{title}: column {used} does not hold text")
    names = [str(position) if identity is None else str(row.get(identity)) for position, row in enumerate(table)]
    seen: set[str] = set()
    repeated = [n for n, name in enumerate(names, 1) if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
    if repeated:
        raise RequestError(f"{title}: the column {identity} repeats itself in row(s) {numbers(repeated)}. Make it unique, or rename that column.")
    categories = [None if category is None or row.get(category) in (None, "") else str(row[category]) for row in table]
    prompts = [Prompt(name, str(text), kind) for name, text, kind in zip(names, texts, categories, strict=True)]
    return prompts, None if isinstance(rows[0], str) else used


def refuse_rows(values: Sequence[Any], bad: Callable[[Any], bool], what: str) -> None:
    """Raises RequestError naming the rows (from 1, a header not counted) for which `bad` holds."""
    rows = [number for number, value in enumerate(values, 1) if bad(value)]
    if rows:
        raise RequestError(f"{what} in row(s) {numbers(rows)}. Correct or remove them.")


def _optional(rows: Sequence[Row], name: str) -> str | None:
    return next((key for row in rows for key in row if isinstance(key, str) and key.lower() == name), None)


def _select(prompts: list[Prompt], limit: int | None, seed: int | None) -> list[Prompt]:
    if limit is None or limit >= len(prompts):
        return prompts
    if seed is None:
        return prompts[:limit]
    return [prompts[position] for position in sorted(random.Random(seed).sample(range(len(prompts)), limit))]


def _csv_rows(text: str, title: str, delimiter: str) -> list[Row]:
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise RequestError(f"{title} is not a table of comma-separated values: {error}. Save it again with texts in double quotes.") from error
    # csv keeps surplus fields under the key None: a comma outside quotes, which would cut a prompt short unseen.
    refuse_rows(rows, lambda row: None in row, f"{title}: more fields than column names")
    return rows


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}. Correct it, or give plain text in a file that ends in .txt.") from error


def _records(values: list[Any], title: str) -> Sequence[Row] | Sequence[str]:
    if all(isinstance(value, str) for value in values):
        refuse_rows(values, lambda text: not text.strip(), f"{title}: the text is empty")
        return values
    refuse_rows(values, lambda value: not isinstance(value, dict), f"{title}: neither all strings nor all objects; not an object")
    return values
