"""Rows of prompt files, each with its place, by the kind that the file's ending says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from rlr_ray.errors import UserError
from rlr_ray.prompts.prompt import COLUMNS

Rows = Iterator[tuple[str, Any]]  # where a row stands, and the row: a text or an object


def rows_of(path: Path, source: str) -> Rows:
    """The rows of a file. Raises UserError if it cannot be read."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path, source)
    return _TEXTS[kind](decoded(path.read_bytes(), source), source)


def decoded(content: bytes, source: str) -> str:
    """UTF-8 text, with or without a byte order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"prompts file {source!r}, line {line}: byte {error.start} (0x{content[error.start]:02x}) is not UTF-8; "
            "save the file as UTF-8"
        ) from error


def _lines(text: str, source: str) -> Rows:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        yield f"{source}:{number}", line.strip()


def json_lines(text: str, source: str) -> Rows:
    for place, line in _lines(text, source):
        try:
            yield place, json.loads(line) if line else ""
        except json.JSONDecodeError as error:
            raise UserError(f"{place}: not JSON ({error}); write one object a line") from error


def _json(text: str, source: str) -> Rows:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"prompts file {source!r} is not JSON: {error}; for one object a line, name it .jsonl"
        ) from error
    if not isinstance(entries, list):
        raise UserError(
            f"prompts file {source!r} holds {type(entries).__name__}; allowed: a list of texts or of objects, e.g. "
            '[{"prompt": "a cat"}]'
        )
    for number, entry in enumerate(entries, 1):
        yield f"{source}, entry {number}", entry


def _csv(text: str, source: str, delimiter: str = ",") -> Rows:
    """Columns that are known by name stay text, all digits or not; the others become numbers where they can."""
    content, parsing = text.encode(), pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        names = pyarrow.csv.open_csv(io.BytesIO(content), parse_options=parsing).schema.names
        texts = {name: pyarrow.string() for name in names if name.lower() in COLUMNS}
        conversion = pyarrow.csv.ConvertOptions(column_types=texts)
        table = pyarrow.csv.read_csv(io.BytesIO(content), parse_options=parsing, convert_options=conversion)
        return _table(table, source)
    except ValueError as error:  # Arrow's errors are
        raise _unreadable(source, "a table", error) from error


def _tsv(text: str, source: str) -> Rows:
    return _csv(text, source, "\t")


def _parquet(path: Path, source: str) -> Rows:
    try:
        return _table(pyarrow.parquet.read_table(path), source)
    except (ValueError, OSError) as error:  # Arrow's errors are ValueErrors; so is a time that Python cannot hold
        raise _unreadable(source, "Parquet", error) from error


def _table(table: Any, source: str) -> Rows:
    rows = table.to_pylist()
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, 1))


def _unreadable(source: str, kind: str, error: Exception) -> UserError:
    return UserError(f"prompts file {source!r} could not be read as {kind}: {error}; save it again")


_TEXTS: dict[str, Callable[[str, str], Rows]] = {
    ".txt": _lines,
    ".jsonl": json_lines,
    ".csv": _csv,
    ".tsv": _tsv,
    ".json": _json,
}
ENDINGS = (*_TEXTS, ".parquet")
