"""YAML as recipes have it: no key twice, of which the one before would be lost without a word."""

from __future__ import annotations

from typing import Any

import yaml


def read_yaml(text: str) -> Any:
    """Raises yaml.YAMLError for what is no YAML, or has a key twice in one section."""
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
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
