"""What is installed, and what a process sets for itself."""

from __future__ import annotations

import platform
from importlib.metadata import distributions

_VERSIONS = ("rlr-ray", "torch", "diffusers", "transformers", "peft", "ray")


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run's numbers may depend on."""
    installed = {item.name.lower().replace("_", "-"): item.version for item in distributions()}
    return {"python": platform.python_version()} | {name: installed[name] for name in _VERSIONS if name in installed}
