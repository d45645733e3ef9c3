"""The `evaluation` key of a recipe: held-out chains, and who judges them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlr_ray.config.base import FREE, Strict
from rlr_ray.config.rewards import Judges, spelled_out


class EvaluationConfig(Strict):
    chains: int = Field(200, ge=2)  # held-out seeds, the same before and after
    seed: int | None = None  # that these follow from; None: the run's
    # Chains sampled at once, without gradients; None: as in training
    chunk_size: Annotated[int | None, FREE] = Field(None, ge=1)
    # Updates between two evaluations; auto: a quarter of the run; null: only before and after
    every: Annotated[Literal["auto"] | Annotated[int, Field(ge=1)] | None, FREE] = "auto"
    # Second opinions that are never trained on; or one, as `judge`
    judges: Annotated[Judges, FREE] = Field(default_factory=dict)
    pictures: Annotated[int, FREE] = Field(20, ge=1)  # held-out chains that the grids show
    # Folder or hub name of the CLIP whose features pictures are compared by; None: those of the first judge or reward
    # that has `features(images)`, else pixels
    clip: Annotated[str | None, FREE] = None
    # Real pictures that held-out ones are compared with: a folder, or digits (shipped); None: the base model's alone
    reference: Annotated[str | None, FREE] = None

    @model_validator(mode="before")
    @classmethod
    def _one_or_several(cls, values: Any) -> Any:
        return spelled_out(values, "judge", "judges")
