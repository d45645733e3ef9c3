"""docs/recipe.md: every key of a recipe, from the fields of rlr_ray/config and the comments beside them.

python -m scripts.recipe_page writes it; tests/config/test_recipe_page.py holds that it is as written.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlr_ray.config.base import holder, is_free, keys_of
from rlr_ray.config.run import RunConfig

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
HEAD = """# Every key of a recipe

Written by `python -m scripts.recipe_page` from the fields of `rlr_ray/config` and the comments beside them, to which a
test holds it. A recipe is YAML; `--set key.sub=value` overrides a key. Ranges are checked when a recipe loads, and keys
that are not here are refused. *Resume*: a run that is resumed may change the key. `LABEL` is any name.
"""
_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", NoneType: "null", Any: "any"}
_SIGNS = {annotated_types.Ge: "≥", annotated_types.Gt: ">", annotated_types.Le: "≤", annotated_types.Lt: "<"}


def page() -> str:
    """The whole text."""
    sections: dict[str, list[str]] = {}
    for path, field, model in _keys():
        section = ".".join(path[:-1])
        free = "yes" if is_free(RunConfig, path) else ""
        cells = (f"`{path[-1]}`", _values(field), _default(field), free, meanings(model)[path[-1]])
        sections.setdefault(section, []).append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    head = "| key | value | default | resume | meaning |\n| --- | --- | --- | --- | --- |"
    titles = {name: f"`{name}`".replace("*", "LABEL") if name else "The recipe" for name in sections}
    return HEAD + "".join("\n".join(["", f"## {titles[name]}", "", head, *rows, ""]) for name, rows in sections.items())


def _keys() -> Iterator[tuple[tuple[str, ...], FieldInfo, type[BaseModel]]]:
    """Every key with its field and the model that has it."""
    models: dict[tuple[str, ...], type[BaseModel]] = {(): RunConfig}
    for path, field in keys_of(RunConfig):
        kind = holder(field.annotation)
        inner = (*path, "*") if get_origin(kind) is dict else path
        models[inner] = get_args(kind)[1] if get_origin(kind) is dict else kind
        yield path, field, models[path[:-1]]


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """What the comments beside a model's keys or above them say; else the docstring of what the key holds."""
    found: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if not issubclass(kind, BaseModel) or kind is BaseModel:
            continue
        above: list[str] = []
        for line in inspect.getsource(kind).splitlines():
            if key := re.match(r"    (\w+): ", line):
                beside = [text for text in line.split("  # ")[1:] if not text.startswith(("noqa", "type:"))]
                section = holder(kind.model_fields[key[1]].annotation) if key[1] in kind.model_fields else None
                name = key[1].rstrip("_")  # of a word of Python's own
                told = (getattr(section, "__doc__", "") or "").split("\n")[0] if isinstance(section, type) else ""
                found[name] = _sentence(" ".join([*above, *beside]) or told)
            above = [*above, line.strip()[2:]] if line.startswith("    # ") else []
    return found


def _sentence(text: str) -> str:
    text = text.removesuffix(".").replace("None", "null")
    return text[:1].upper() + text[1:] if re.match(r"[a-z]+ ", text) and text[1] != " " else text


def _values(field: FieldInfo) -> str:
    kind = _kind(field.annotation)
    ranged = " ".join([kind.removesuffix(" or null"), *_ranges(field.metadata)])
    return ranged + " or null" * kind.endswith(" or null")


def _kind(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        ranges = [limit for one in inner[1:] for limit in getattr(one, "metadata", [one])]
        return " ".join([_kind(inner[0]), *_ranges(ranges)])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin is list:
        return f"list of {_kind(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_kind, inner))}]"
    if origin is dict:
        return "LABEL: ..." if isinstance(inner[1], type) and issubclass(inner[1], BaseModel) else "keys and values"
    if isinstance(annotation, type):
        return "keys, below" if issubclass(annotation, BaseModel) else _NAMES[annotation]
    return " or ".join(dict.fromkeys(map(_kind, inner))) if inner else _NAMES[annotation]


def _ranges(metadata: Any) -> list[str]:
    known = [one for one in metadata if type(one) in _SIGNS]
    limits = [f"{_SIGNS[type(one)]} {getattr(one, type(one).__name__.lower()):g}" for one in known]
    return [", ".join(limits)] if limits else []


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        return "required"
    return "" if isinstance(value, BaseModel) else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
