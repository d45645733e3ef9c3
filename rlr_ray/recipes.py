"""Reading a run's configuration: a YAML recipe, overrides from the command line, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rlr_ray.config import RunConfig
from rlr_ray.errors import UserError


def load_config(path: str, overrides: list[str]) -> RunConfig:
    """Read a YAML recipe, apply `key.sub=value` overrides and check it. Raises UserError naming every bad key."""
    if not Path(path).is_file():
        raise UserError(f"config {path!r} was not found (looked in {Path.cwd()}); write its path from there")
    try:
        values = yaml.safe_load(Path(path).read_text("utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"config {path!r} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"config {path!r} holds {type(values).__name__}; allowed: keys and values, as in configs/")
    for override in overrides:
        _override(values, override)
    return parse_config(values)


def parse_config(values: dict[str, Any]) -> RunConfig:
    """Check values. Raises UserError naming every bad key."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(_describe(item) for item in error.errors())) from error


def _override(values: dict[str, Any], override: str) -> None:
    """Set one key, in place; whatever was there goes, also if it was a dictionary."""
    path, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"--set {override!r} has no '='; write --set key.sub=value, e.g. --set train.iterations=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not YAML: {error}") from error
    *parents, key = path.strip().split(".")
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    values[key] = value


def _describe(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        allowed = ", ".join(_fields_at(item["loc"][:-1]))
        return f"{place}: no such key; allowed here: {allowed}"
    message = item["msg"].removeprefix("Value error, ")
    found = item["input"]
    shown = "" if item["type"] in ("value_error", "missing") or isinstance(found, dict) else f"found {found!r}; "
    return f"{place}: {shown}{message}" if place else message


def _fields_at(location: tuple[Any, ...]) -> list[str]:
    model: Any = RunConfig
    for part in location:
        if part in ("ClusterConfig",):
            continue
        annotation = model.model_fields[part].annotation
        options = getattr(annotation, "__args__", (annotation,))
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return sorted(model.model_fields)
