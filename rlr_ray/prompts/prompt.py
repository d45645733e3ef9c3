"""A prompt, and how one is read from the columns of a row."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlr_ray.config.estimator import STAGES
from rlr_ray.errors import UserError

TEXT = ("prompt", "prompts", "caption", "text")  # the first of these that a row has; the rest is for public lists
NEGATIVE, WEIGHT = "negative_prompt", "weight"
# Columns that a pipeline's call may take besides: pictures by their paths, and texts.
PICTURES = ("image", "mask_image", "control_image", "last_image", "mask", "control_mask", "ip_adapter_image", "video")
TEXTS = tuple(f"{kind}prompt_{i}" for kind in ("", "negative_") for i in (2, 3, 4))
_DRAWN = {*PICTURES, *TEXTS}
COLUMNS = (*TEXT, NEGATIVE, WEIGHT, *STAGES)


@dataclass(frozen=True, slots=True)  # there may be a million
class Prompt:
    text: str
    negative: str = ""
    stages: tuple[str, str, str] | None = None  # coarse, mid and fine prompt of a Diffusive Chain-of-Thought
    weight: float = 1.0  # its share of training, over the sum of all
    metadata: dict[str, Any] = field(default_factory=dict)  # handed to the reward

    @property
    def drawn_columns(self) -> dict[str, Any]:
        """Its columns that a pipeline's call may take."""
        return {name: value for name, value in self.metadata.items() if name in _DRAWN or is_tensor(value)}

    @property
    def request(self) -> dict[str, Any]:
        """The prompt as it is given to a model that learns its shapes from one."""
        return {"prompt": self.text, "negative": self.negative, "columns": self.drawn_columns}

    @property
    def drawn(self) -> tuple[object, ...]:
        """All that its pictures depend on; prompts that differ in the rest alone are the same to a model."""
        texts = (self.text, self.negative, self.stages)
        return (*texts, repr(sorted(self.drawn_columns.items()))) if self.drawn_columns else texts

    def seen_from(self, folder: Path) -> Prompt:
        """This prompt with its pictures as paths, where the folder has files of the names that it states."""
        files = {name: value for name, value in self.drawn_columns.items() if name not in TEXTS}
        files = {name: _in_folder(value, folder) for name, value in files.items()}
        return replace(self, metadata=self.metadata | files) if files else self

    @property
    def texts(self) -> tuple[str, ...]:
        """All that a model may be given of it."""
        return tuple(text for text in (self.text, self.negative, *(self.stages or ())) if text)


def is_tensor(value: object) -> bool:
    """Whether a column is a file of one tensor, as an embedding that was computed before."""
    return isinstance(value, str) and value.endswith(".safetensors")


def prompt_of(row: object, place: str, column: str | None = None) -> Prompt | None:
    """The prompt of a text or of a row, whose further columns are metadata; None if its text is empty.

    `column` has the text; None: the first that is there of those that are known. Columns are found whatever their case.
    Raises UserError, which names the place.
    """
    _check_encodes(row, place)
    if isinstance(row, str):
        return _of_text(row, place, column)
    columns = _Columns(row if isinstance(row, Mapping) else {}, place)
    name = next((name for name in ((column.lower(),) if column else TEXT) if name in columns.keys), None)
    if name is None:
        wanted = f'"{column}" (prompts.column)' if column else '"prompt" (or "prompts", "caption", "text")'
        raise UserError(
            f'{place}: found {_short(row)}; allowed: a text {wanted}, e.g. {{"{column or "prompt"}": "a cat"}}; name '
            "that column so, or set prompts.column to the one that has the texts"
        )
    text, negative = columns.text(name), columns.text(NEGATIVE)
    stages = tuple([columns.text(name) for name in STAGES])
    if any(stages) and not all(stages):
        missing = ", ".join(name for name, stage in zip(STAGES, stages, strict=True) if not stage)
        raise UserError(f"{place}: {missing} is empty; allowed: coarse, mid and fine, all three or none; fill it in")
    weight = columns.weight()
    assert len(stages) == 3
    return Prompt(text, negative, stages if all(stages) else None, weight, columns.left) if text else None


def _in_folder(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_in_folder(one, folder) for one in value]
    return str(folder / value) if isinstance(value, str) and (folder / value).is_file() else value


def _of_text(text: str, place: str, column: str | None) -> Prompt | None:
    if column and text:
        raise UserError(
            f"{place}: found a text, {_short(text)}, where prompts.column is {column!r}; allowed: rows with columns, "
            "as CSV, TSV, JSON and Parquet have them; leave prompts.column out"
        )
    text = text.strip()
    return Prompt(text) if text else None


def _check_encodes(row: object, place: str) -> None:
    """Refuse half a character, which JSON's and YAML's escapes can write, but neither a tokenizer nor a file takes."""
    for text in _texts_in(row):
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{place}: {_short(text)} has half a character, \\u{ord(text[error.start]):x} (a lone surrogate, as of "
                "an emoji cut in two); allowed: text that UTF-8 can hold; write the whole character, or take the "
                "half out"
            ) from error


def _texts_in(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in ([part] if isinstance(part, str) else _texts_in(part) if part else ())]


@functools.lru_cache(maxsize=8)  # a file's rows mostly have the same
def _spelled(*names: str) -> dict[str, str]:
    """Columns by their names in lower case; of those alike, the first."""
    return {name.lower(): name for name in reversed(names)}


class _Columns:
    """A row's columns, which leave `left` as they are read."""

    def __init__(self, row: Mapping[str, Any], place: str):
        self.left, self.place = dict(row), place
        self.keys = _spelled(*row)

    def take(self, name: str) -> Any:
        return self.left.pop(self.keys[name], None) if name in self.keys else None

    def text(self, name: str) -> str:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{self.place}: {name} is {_short(value)}; allowed: a text; write it in quotes")
        return (value or "").strip()

    def weight(self) -> float:
        value = self.take(WEIGHT)
        try:
            weight = 1.0 if value is None or value == "" else float(value)
        except (TypeError, ValueError, OverflowError):
            weight = math.nan
        if not 0 < weight < math.inf or isinstance(value, bool):
            raise UserError(
                f"{self.place}: weight is {_short(value)}; allowed: a finite number above 0; leave the row out to "
                "never draw it"
            )
        return weight


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else shown[:200] + " ..."
