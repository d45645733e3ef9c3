"""Diffusive Chain-of-Thought: the chain in three ranges, each with a prompt of its own."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from rlr_ray.strict import Strict

Stage = Literal["coarse", "mid", "fine"]
STAGES: tuple[str, ...] = get_args(Stage)  # in the order of the steps


class DcotConfig(Strict):
    """`coarse` has steps 0 .. mid-1, `mid` has mid .. fine-1, `fine` has fine .. T-1."""

    mid: int = Field(ge=1)  # its first step
    fine: int = Field(ge=2)

    @model_validator(mode="after")
    def _ordered(self) -> DcotConfig:
        if self.mid >= self.fine:
            raise ValueError(
                f"mid begins at step {self.mid} and fine at {self.fine}; allowed: 0 < mid < fine < sampler.steps; "
                "raise fine or lower mid"
            )
        return self

    def ranges(self, steps: int) -> dict[str, tuple[int, int]]:
        """First and last step of each stage, of T `steps`."""
        bounds = (0, self.mid, self.fine, steps)
        return {stage: (bounds[i], bounds[i + 1] - 1) for i, stage in enumerate(STAGES)}

    def stage_of_step(self, steps: int) -> list[int]:  # [T]
        """Which of the three each step belongs to."""
        return [(k >= self.mid) + (k >= self.fine) for k in range(steps)]
