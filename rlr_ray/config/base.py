"""The base of everything that a recipe may hold."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Refuses unknown keys, and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def flat(values: dict[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Values by the keys that lead to them, since a label may hold dots itself."""
    leaves: dict[tuple[str, ...], Any] = {}
    for key, value in values.items():
        path = (*above, str(key))
        leaves |= flat(value, path) if isinstance(value, dict) and value else {path: value}
    return leaves
