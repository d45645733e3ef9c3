"""What is installed, and what a process sets for itself."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import distributions
from typing import Any

from rlr_ray.errors import UserError

_VERSIONS = ("rlr-ray", "torch", "diffusers", "transformers", "peft", "ray")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run's numbers may depend on."""
    installed = {item.name.lower().replace("_", "-"): item.version for item in distributions()}
    return {"python": platform.python_version()} | {name: installed[name] for name in _VERSIONS if name in installed}


VARIABLE = re.compile(r"\$\{(\w+)\}")  # in a recipe: a variable of the environment, so that no file holds its value


def expanded(value: Any, whose: str) -> Any:
    """A value with what the environment of this process has in place of each `${NAME}`.

    Raises UserError for one that is not set; `whose` is what that calls the value.
    """
    if isinstance(value, dict):
        return {key: expanded(one, whose) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [expanded(one, whose) for one in value]
    if not isinstance(value, str):
        return value
    missing = [name for name in VARIABLE.findall(value) if name not in os.environ]
    if missing:
        raise UserError(
            f"{whose} names ${{{missing[0]}}}, which the environment on {platform.node()} lacks; export {missing[0]} "
            "wherever it is built before the run starts"
        )
    return VARIABLE.sub(lambda match: os.environ[match[1]], value)
