"""Prompts: a list, a text file (one a line), or a table with a column `prompt`, whose others are metadata."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.parquet

from rlr_ray.core.seeds import permutation
from rlr_ray.dcot_config import STAGES
from rlr_ray.errors import UserError

_TABLES = {".csv": pyarrow.csv.read_csv, ".parquet": pyarrow.parquet.read_table}


@dataclass(frozen=True)
class Prompt:
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)  # handed to the reward
    stages: tuple[str, str, str] | None = None  # what the coarse, mid and fine steps see; the reward sees the text


def load_prompts(source: str | Sequence[str]) -> list[Prompt]:
    """Prompts from a list or from a file of the kind that its ending says. Raises UserError if there are none."""
    if not isinstance(source, str):
        return [Prompt(text) for text in source]
    path = Path(source).expanduser()
    if path.suffix not in (".txt", ".jsonl", *_TABLES):
        raise UserError(f"prompts file {source!r} ends in {path.suffix!r}; allowed: .txt, .jsonl, .csv, .parquet")
    if not path.is_file():
        raise UserError(f"prompts file {source!r} was not found (looked in {Path.cwd()}); write its path from there")
    if path.suffix in _TABLES:
        return _from_table(path, source)
    try:
        lines = [(number, line.strip()) for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)]
    except UnicodeDecodeError as error:
        raise UserError(f"prompts file {source!r} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    lines = [(number, line) for number, line in lines if line]
    if not lines:
        raise UserError(f"prompts file {source!r} holds no prompt; write one a line")
    if path.suffix == ".txt":
        return [Prompt(line) for _, line in lines]
    return [_from_json(line, f"{source}:{number}") for number, line in lines]


def _from_table(path: Path, source: str) -> list[Prompt]:
    try:
        rows = _TABLES[path.suffix](path).to_pylist()
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise UserError(
            f"prompts file {source!r} could not be read as {path.suffix}: {error}; save it again"
        ) from error
    if not rows:
        raise UserError(f"prompts file {source!r} holds no prompt; write one a row, in a column 'prompt'")
    return [_from_row(row, f"{source}, row {number}", row) for number, row in enumerate(rows, 1)]


def _from_json(line: str, place: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error}); write one object a line") from error
    return _from_row(row, place, line)


def _from_row(row: Any, place: str, found: object) -> Prompt:
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise UserError(
            f'{place}: found {found!r}; allowed: an object with a text "prompt", e.g. {{"prompt": "a cat"}}'
        )
    metadata = {key: value for key, value in row.items() if key not in ("prompt", *STAGES)}
    return Prompt(row["prompt"].strip(), metadata, _stages(row, place))


def _stages(row: dict[str, Any], place: str) -> tuple[str, str, str] | None:
    """What each stage sees; None if the row says nothing of stages."""
    found = [row.get(stage) for stage in STAGES]
    if all(text is None for text in found):
        return None
    if any(not isinstance(text, str) or not text.strip() for text in found):
        raise UserError(
            f"{place}: found {dict(zip(STAGES, found, strict=True))}; allowed: a text in each of 'coarse', 'mid' and "
            "'fine', or none of them"
        )
    coarse, mid, fine = (str(text).strip() for text in found)
    return coarse, mid, fine


def prompt_order(count: int, slot: int, *seed: int | str) -> int:
    """Which of `count` prompts serves as number `slot`: every prompt once, in random order, then all again."""
    round_number, position = divmod(slot, count)
    return permutation(count, *seed, "prompts", round_number)[position]
