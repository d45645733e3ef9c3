"""Rows of prompt files, each with its place, by the kind that the file's ending says."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from rlr_ray.errors import UserError
from rlr_ray.prompts.prompt import COLUMNS

Rows = Iterator[tuple[str, Any]]  # where a row stands, and the row: a text or an object


def rows_of(path: Path, source: str, column: str | None = None) -> Rows:
    """The rows of a file; `column` has the texts if none that is known does. Raises UserError if it cannot be read."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path, source)
    text = decoded(path.read_bytes(), source)
    if kind in _TABLES:
        return _table_of(text, source, _TABLES[kind], {*COLUMNS, (column or "").lower()})
    return _TEXTS[kind](text, source)


def decoded(content: bytes, source: str) -> str:
    """UTF-8 text, with or without a byte order mark. Raises UserError with what makes it of something else."""
    packed = next((kind for kind, start in _STARTS.items() if content.startswith(start)), None)
    if packed is not None:
        raise UserError(f"prompts file {source!r} is {packed} inside; {conversion(packed, source)}")
    marked = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    if marked or b"\0" in content:
        kind = "UTF-16" if marked else "UTF-16LE" if content.find(b"\0") % 2 else "UTF-16BE"
        raise UserError(
            f"prompts file {source!r} is {kind}, or no text; allowed: UTF-8; convert it: "
            f"iconv -f {kind} -t UTF-8 {shlex.quote(source)} > {shlex.quote(_beside(source))}"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"prompts file {source!r}, line {line}: byte {error.start} (0x{content[error.start]:02x}) is not UTF-8; "
            f"convert it: iconv -f CP1252 -t UTF-8 {shlex.quote(source)} > {shlex.quote(_beside(source))} (CP1252: of "
            "Windows in the West; GB18030 in China, CP932 in Japan, CP1251 in Russia)"
        ) from error


def _beside(source: str) -> str:
    return str(Path(source).with_suffix(f".utf8{Path(source).suffix}"))


_STARTS = {".gz": b"\x1f\x8b", ".bz2": b"BZh9", ".xz": b"\xfd7zXZ", ".zst": b"\x28\xb5\x2f\xfd", ".xlsx": b"PK\x03\x04"}
_UNPACKED_BY = {".gz": "gunzip --keep", ".bz2": "bunzip2 --keep", ".xz": "unxz --keep", ".zst": "unzstd"}
_UNPACKED_BY |= dict.fromkeys(
    (".xlsx", ".xls", ".ods"), "soffice --headless --convert-to csv:'Text - txt - csv':44,34,76"
)


def conversion(kind: str, source: str) -> str:
    """The command that converts a file of such an ending to one that can be read; empty if none is known."""
    command = _UNPACKED_BY.get(kind)
    return f"convert it: {command} {shlex.quote(source)}, and name what comes of it" if command else ""


def _lines(text: str, source: str) -> Rows:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        yield f"{source}:{number}", line.strip()


def json_lines(text: str, source: str) -> Rows:
    for place, line in _lines(text, source):
        try:
            yield place, _loads(line) if line else ""
        except ValueError as error:
            raise UserError(f"{place}: not JSON ({error}); write one object a line") from error


def _loads(text: str) -> Any:
    """Raises ValueError for what is no JSON, or has a key twice in one object."""
    return _DECODER.decode(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"key {_repeated(key for key, _ in pairs)!r} stands twice in an object")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


def _repeated(names: Iterable[str]) -> str | None:
    """The first of the names that stands twice."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _json(text: str, source: str) -> Rows:
    try:
        entries = _loads(text)
    except ValueError as error:
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


def _table_of(text: str, source: str, delimiter: str, texts: Collection[str]) -> Rows:
    """A cell stays what it is in the file, unless all of its column are plain numbers or truth values; see `_values`.

    The columns `texts`, in lower case, stay text in any case.
    """
    names = next((row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row), [])
    _check_once(names, source)
    content = text.encode()
    try:
        table = pyarrow.csv.read_csv(
            io.BytesIO(content),
            pyarrow.csv.ReadOptions(block_size=min(len(content) + 1, _LARGEST)),  # a row must not leave its block
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string())),
        )
    except ValueError as error:  # Arrow's errors are
        raise _unreadable(source, "a table", error) from error
    columns = [table[name].to_pylist() for name in names]
    columns = [cells if name.lower() in texts else _values(cells) for name, cells in zip(names, columns, strict=True)]
    return _numbered([dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)], source)


_LARGEST = 2**31 - 2  # bytes of a block that Arrow can count


def _values(cells: list[str]) -> list[Any]:
    """A column's cells as numbers, or as truth values, if each could be written again as it is; else as they are.

    So 007 and 1.10 stay text. An empty cell is None where the others are no text.
    """
    for kind in (_whole, _real, _truth):
        try:
            return [kind(cell) if cell else None for cell in cells]
        except ValueError:
            continue
    return list(cells)


def _whole(cell: str) -> int:
    value = int(cell)
    if str(value) != cell:
        raise ValueError(cell)
    return value


def _real(cell: str) -> float:
    value = float(cell)
    if repr(value) not in (cell, f"{cell}.0") or not math.isfinite(value):
        raise ValueError(cell)
    return value


def _truth(cell: str) -> bool:
    if cell not in ("true", "false", "True", "False"):
        raise ValueError(cell)
    return cell in ("true", "True")


def _check_once(names: Iterable[str], source: str) -> None:
    twice = _repeated(names)
    if twice is not None:
        raise UserError(
            f"prompts file {source!r} has the column {twice!r} twice; allowed: each name once; rename or drop one"
        )


def _parquet(path: Path, source: str) -> Rows:
    try:
        _check_once(pyarrow.parquet.read_schema(path).names, source)
        table = pyarrow.parquet.read_table(path)
        return _numbered(_carried(table.to_pylist()), source)
    except (pyarrow.ArrowException, OSError) as error:  # a time that Python cannot hold is an ArrowException too
        raise _unreadable(source, "Parquet", error) from error


def _carried(value: Any) -> Any:
    """A value of Parquet's as one that JSON has: dates and times as ISO 8601 writes them, decimals as text."""
    if isinstance(value, dict):
        return {key: _carried(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_carried(one) for one in value]
    if value is None or isinstance(value, str | int | float | bytes):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _numbered(rows: list[dict[str, Any]], source: str) -> Rows:
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows, 1))


def _unreadable(source: str, kind: str, error: Exception) -> UserError:
    return UserError(f"prompts file {source!r} could not be read as {kind}: {error}; save it again")


_TABLES = {".csv": ",", ".tsv": "\t"}
_TEXTS: dict[str, Callable[[str, str], Rows]] = {".txt": _lines, ".jsonl": json_lines, ".json": _json}
ENDINGS = (".txt", ".jsonl", *_TABLES, ".json", ".parquet")
