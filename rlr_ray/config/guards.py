"""The `guards` key of a recipe: against rewards that fall, and rewards that are gamed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from rlr_ray.config.base import FREE, Strict


class StepBackConfig(Strict):
    """When a run returns to its best average, halves the learning rate and clears the optimizer's moments."""

    window: int = Field(4, ge=1)  # updates whose mean reward is compared with the best mean of so many
    limit: int = Field(5, ge=1)  # steps back, after which the run ends


class GuardsConfig(Strict):
    """Against runs that fall, and rewards that are gamed."""

    kl_penalty: float = Field(0.0, ge=0, allow_inf_nan=False)  # reward taken per nat of divergence from the base model
    # Steps drawn each update, of which the penalty's gradient is taken; None: 2
    kl_steps: int | Literal["all"] | None = None
    # Nats a chain, on held-out chains; beyond it the run steps back below it, or ends where it may not step back
    kl_stop: Annotated[float | None, FREE] = Field(None, gt=0)
    # Evaluations in a row at which the reward rises and a judge falls, beyond their errors, until the run ends
    patience: Annotated[int | None, FREE] = Field(None, ge=1)
    # What the run leaves; best: by the held-out reward, of all evaluations, the start's among them
    keep: Annotated[Literal["last", "best"], FREE] = "best"
    ema: float | None = Field(0.95, gt=0, lt=1)  # decay of the average of theta that is evaluated and left
    # To the best average, when the reward falls below its best by more than its noise; true, false, or its keys
    step_back: Annotated[StepBackConfig | None, FREE] = StepBackConfig()

    @field_validator("step_back", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        return {} if value is True else None if value is False else value

    @property
    def may_stop(self) -> bool:
        return any(limit is not None for limit in (self.kl_stop, self.patience, self.step_back))
