"""The base of everything that a recipe may hold: strict models, which keys may change, and YAML."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict
from pydantic.fields import FieldInfo


class Strict(BaseModel):
    """Refuses unknown keys, and never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


@dataclass(frozen=True)
class Free:
    """Metadata of a key that may change when a run is resumed, with all that lies in it: no update depends on it.

    Or next to none: a quorum below 1, whose updates do not repeat anyway; what a score that is not finite counts for;
    and the last bits of what is computed on another device, compiled, or in other slices.
    """

    only: tuple[str, ...] = ()  # these keys of a dictionary; none: all


FREE = Free()


def numeric(value: Any) -> Any:
    """A number for a text like 1e-8, which YAML 1.1 takes for no number; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def holder(annotation: Any) -> Any:
    """The kind of value that holds keys of its own, of those that a key allows; None if there is none."""
    for kind in (annotation, *get_args(annotation)):
        if get_origin(kind) is dict or (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return kind
    return None


def is_free(model: type[BaseModel], path: Sequence[str]) -> bool:
    """Whether the key at a path may change when a run is resumed."""
    place: Any = model
    for depth, key in enumerate(path, 1):
        if get_origin(place) is dict:
            place = holder(get_args(place)[1])
            continue
        field = getattr(place, "model_fields", {}).get(key)
        for free in field.metadata if field else ():
            if isinstance(free, Free) and (not free.only or (depth < len(path) and path[depth] in free.only)):
                return True
        place = field and holder(field.annotation)
    return False


def free_keys(model: type[BaseModel]) -> list[str]:
    """All keys that may change when a run is resumed, for people."""
    names: list[tuple[str, ...]] = []
    for path, field in keys_of(model):
        for free in field.metadata:
            if isinstance(free, Free) and not any(path[: len(name)] == name for name in names):
                names += [(*path, key) for key in free.only] or [path]
    return sorted(".".join(name) for name in names)


def keys_of(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every key of a model and of those in it, with its field; `*` stands for a label."""
    for attribute, field in model.model_fields.items():
        name = field.alias or attribute
        path, kind = (*above, name), holder(field.annotation)
        yield path, field
        if get_origin(kind) is dict:
            path, kind = (*path, "*"), get_args(kind)[1]
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys_of(kind, path)


def flat(values: dict[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Values by the keys that lead to them, since a label may hold dots itself."""
    leaves: dict[tuple[str, ...], Any] = {}
    for key, value in values.items():
        path = (*above, str(key))
        leaves |= flat(value, path) if isinstance(value, dict) else {path: value}
    return leaves


def read_yaml(text: str) -> Any:
    """Raises yaml.YAMLError for what is no YAML, or has a key twice in one section."""
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a section, of which the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in first:
                    raise yaml.constructor.ConstructorError(
                        problem=f"key {key.value!r} stands twice, in line {first[key.value].line + 1} and again; "
                        "allowed: each key once in a section; put all under one, or drop one",
                        problem_mark=key.start_mark,
                    )
                first[key.value] = key.start_mark
        return super().construct_mapping(node, deep)
