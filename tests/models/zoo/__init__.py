"""Tiny pipelines of many classes with random weights, and how they are called.

`CASES[name]()` gives (pipeline, call, arguments): `arguments(n)` are those of n chains, each of its own prompt.
"""

from __future__ import annotations

from tests.models.zoo import flows, flux, kin, ltx, qwen, stable, videos, wan, xl
from tests.models.zoo.parts import CASES

__all__ = ["CASES", "flows", "flux", "kin", "ltx", "qwen", "stable", "videos", "wan", "xl"]
