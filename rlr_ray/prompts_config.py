"""Where a run's prompts come from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlr_ray.strict import Strict

Text = Annotated[str, Field(min_length=1)]
# A file, the name of a shipped list, or the prompts themselves.
Source = Text | Annotated[list[Text], Field(min_length=1)]


class PromptsConfig(Strict):
    source: Source
    # Which prompts held-out chains have: a share of the source's, which training then lacks; others; None: the same
    held_out: Annotated[float, Field(gt=0, lt=1)] | Source | None = None
