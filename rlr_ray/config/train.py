"""The `train` key of a recipe: number and size of updates, and the optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlr_ray.config.base import FREE, Strict, numeric

Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Strict):
    iterations: Annotated[int, FREE] = Field(100, ge=1)  # updates of the run
    chains: int = Field(10, ge=1)  # B, of an update
    # Chains of an update that share a prompt; chains is a multiple of it. `group_size` is short for this and
    # estimator.half_order.baseline: group
    chains_per_prompt: int = Field(1, ge=1)
    chunk_size: int = Field(10, ge=1)  # chains computed at once; chains is a multiple of it
    # Chains sampled at once, in whole chunks, before gradients are taken chunk by chunk; None: chunk_size
    sampling_size: Annotated[int | None, FREE] = Field(None, ge=1)
    # 1: chains are sampled at the theta of the update before, while that backpropagates (off-policy; half order by path
    # weighs them by their ratio, the forward term, branches and the steps before first order's do not)
    ahead: Literal[0, 1] = 0
    # By how much an update moves each number; auto: by how much that changes predictions, measured at the start and,
    # where there are max_change and a warm-up, along that
    learning_rate: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = "auto"
    warmup: int = Field(10, ge=0)  # first updates, along which the learning rate rises
    # Of the learning rate, over `iterations`; a run resumed with others goes on along the new ones' schedule
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    schedule_final: float = Field(0.1, ge=0, le=1)  # what a schedule falls to, as a part of learning_rate
    # Each kind of gradient (which terms it has, and whose reward they carry) by its own running size, so that numbers
    # have 1 in the mean square: SGD then moves them by the learning rate, too, and no kind starves another in Adam
    own_norms: bool = True
    clip_update: float | None = Field(1.5, gt=0)  # to so many times their running size, updates are cut; null: none is
    # An update changes the denoiser's predictions at its own chains by at most so large a part, times what `schedule`
    # says; a longer one is shortened; null: none is
    max_change: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 0.03
    # A class of torch.optim by its name, e.g. AdamW or SGD, or Adam8bit, which needs bitsandbytes
    optimizer: str = "AdamW"
    betas: tuple[Beta, Beta] = (0.9, 0.99)  # of AdamW and its like: decay of the first and second moment
    weight_decay: float = Field(0.0, ge=0)  # of most optimizers
    optimizer_options: dict[str, Any] = Field(default_factory=dict)  # further arguments of the optimizer's class
    max_grad_norm: float | None = Field(None, gt=0)  # to which a longer gradient is cut; None: none is
    checkpoint_every: Annotated[int, FREE] = Field(10, ge=1)  # updates between two checkpoints
    keep_checkpoints: Annotated[int, FREE] = Field(2, ge=1)  # newest checkpoints that stay

    @field_validator("optimizer_options")
    @classmethod
    def _numbers(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {name: numeric(value) for name, value in options.items()}

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        for name in ("chunk_size", "chains_per_prompt"):
            if self.chains % getattr(self, name):
                raise ValueError(f"chains {self.chains} must be a multiple of {name} {getattr(self, name)}")
        return self

    @property
    def looked_at(self) -> int:
        """Chains at which an update's change of the predictions is measured."""
        return min(self.chunk_size, 4)

    @property
    def sampled_together(self) -> int:
        """Chunks in a row that are sampled in one batch, by one process."""
        return max((self.sampling_size or 0) // self.chunk_size, 1)
