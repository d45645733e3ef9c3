"""The `prompts` key of a recipe."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, field_validator

from rlr_ray.config.base import Strict

# A file, the name of a shipped list, or the prompts themselves.
Text = Annotated[str, Field(min_length=1)]
Source = Text | Annotated[list[Text], Field(min_length=1)]


def check_texts(source: Any) -> Any:
    """Refuse what YAML takes for no text, with the quotes that it needs."""
    for number, entry in enumerate(source if isinstance(source, list) else (), 1):
        if not isinstance(entry, str):
            pairs = ", ".join(f"{key}: {value}" for key, value in entry.items()) if isinstance(entry, dict) else ""
            remedy = f"write it in quotes: - {json.dumps(pairs)}" if pairs else "put what stands there in quotes"
            raise ValueError(f"entry {number} is {entry!r} to YAML; allowed: a text; {remedy}")
    return source


class PromptsConfig(Strict):
    source: Source  # A file of prompts, the name of a shipped list, or the prompts themselves
    # Which prompts held-out chains have: a share of the source's, which training then lacks; others; None: the same
    held_out: Annotated[float, Field(gt=0, lt=1)] | Source | None = None
    column: str | None = None  # of a table or of JSON that has the prompts; None: prompt, prompts, caption or text

    @field_validator("source", "held_out", mode="before")
    @classmethod
    def _are_texts(cls, source: Any) -> Any:
        return check_texts(source)
