"""What a recipe says of the estimator: which order owns which step, and how each is estimated."""

from __future__ import annotations

from math import isqrt
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlr_ray.core.plan import Truncation
from rlr_ray.dcot_config import Stage
from rlr_ray.presets import PRESETS, merge
from rlr_ray.reward_config import JudgeConfig
from rlr_ray.strict import Strict

Weight = Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)]


class SubChainConfig(Strict):
    length: int = Field(3, ge=0)  # h; 0: none
    count: int = Field(1, ge=1)
    # importance: by measured gradient norms; cover: as many as cover the steps; a stage of dcot; or [first, last], both
    # included
    place: Literal["uniform", "importance", "cover"] | Stage | tuple[int, int] = "uniform"
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)  # of importance; higher is nearer to uniform

    @field_validator("place")
    @classmethod
    def _ordered(cls, place: str | tuple[int, int]) -> str | tuple[int, int]:
        if not isinstance(place, str) and not 0 <= place[0] <= place[1]:
            raise ValueError(
                f"found {list(place)}; allowed: 'uniform', 'importance', 'cover', 'coarse', 'mid', 'fine', or "
                "[first, last] with 0 <= first <= last"
            )
        return place


class HalfOrderConfig(Strict):
    baseline: Literal["prompt", "batch"] = "prompt"  # chains that share a leave-one-out baseline
    weight: Weight = "auto"  # auto: least mean squared error


class ZerothOrderConfig(Strict):
    directions: Literal["guided", "isotropic"] = "guided"
    count: int = Field(80, ge=1)  # N perturbation pairs an update, each on a chain of its own
    chunk_size: int = Field(8, ge=1)  # pairs in one rollout call
    # Of guided directions: how many principal components of earlier half-order gradients (auto: by count), or the
    # smoothed gradients themselves, as always without half order
    span: Literal["auto", "guides"] | Annotated[int, Field(ge=1)] = "auto"
    scale: float = Field(0.01, gt=0, allow_inf_nan=False)  # standard deviation of a trained number's displacement
    weight: Weight = "auto"

    @property
    def components(self) -> int:
        """How many principal components span guided directions; 0: the smoothed gradients do."""
        if isinstance(self.span, int):
            return self.span
        return 0 if self.span == "guides" else min(max(isqrt(self.count), 4), 32)

    @model_validator(mode="after")
    def _chunks(self) -> ZerothOrderConfig:
        if self.count % self.chunk_size:
            raise ValueError(f"count {self.count} must be a multiple of chunk_size {self.chunk_size}")
        return self


class SurrogateConfig(Strict):
    """A differentiable Q of which first order carries c Q, while the other orders carry R - c Q on every step."""

    name: str = "online"  # learned during the run, or a differentiable reward
    options: dict[str, Any] = Field(default_factory=dict)  # of that reward, as the next two
    video: bool | None = None
    frames: int | None = Field(None, ge=1)
    # c; auto: slope of R on Q over earlier updates, 0 while their correlation is below the threshold
    coefficient: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = "auto"
    threshold: float = Field(0.3, ge=0, lt=1)
    window: int = Field(4, ge=1)  # updates that give correlation and slope
    replay: int = Field(2000, ge=1)  # samples that online keeps, and writes to every checkpoint
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)
    steps_per_update: int = Field(50, ge=1)
    batch_size: int = Field(64, ge=1)

    @property
    def reward(self) -> JudgeConfig:
        """The named reward."""
        return JudgeConfig(name=self.name, options=self.options, video=self.video, frames=self.frames)

    @model_validator(mode="after")
    def _read(self) -> SurrogateConfig:
        if self.name == "online" and self.options:
            raise ValueError(f"the surrogate 'online' takes no options, found {sorted(self.options)}; leave them out")
        return self


def _check_auto(given: dict[str, Any]) -> None:
    """The planner decides the plan; raise ValueError for keys that would decide it too."""
    kept: dict[str, set[str]] = {"half_order": {"baseline"}, "zeroth_order": {"count", "chunk_size", "scale", "span"}}
    free = {"preset", "weight_averaging", "smoothing"}
    wrong = [key for key in given if key not in free | kept.keys()]
    wrong += [f"{key}.{name}" for key, names in kept.items() for name in given.get(key, {}) if name not in names]
    if wrong:
        raise ValueError(
            f"preset 'auto' chooses the plan, found {', '.join(wrong)} beside it; allowed: {', '.join(sorted(free))}, "
            "half_order.baseline, zeroth_order.count, .chunk_size, .scale and .span; leave the others out"
        )


class EstimatorConfig(Strict):
    preset: Literal[tuple(PRESETS)] = "rlr"  # type: ignore[valid-type]  # defaults for the keys below
    first_order_steps: int | Literal["all"] = 3  # K
    # Beyond K a random number of steps, uniform up to all: with inverse-probability weights, or without (biased)
    truncation: Truncation = "fixed"
    checkpoint_steps: bool = False  # trade one more forward a first-order step for one step's memory
    sub_chain: SubChainConfig = SubChainConfig()
    rest: Literal["zeroth_order", "half_order", "none"] = "zeroth_order"
    half_order: HalfOrderConfig = HalfOrderConfig()
    zeroth_order: ZerothOrderConfig = ZerothOrderConfig()
    surrogate: SurrogateConfig | None = None  # for rewards that are black-box
    weight_averaging: float = Field(8, ge=1)  # m of the auto weights: updates that the optimizer averages
    smoothing: float = Field(0.9, ge=0, lt=1)  # of the auto weights' statistics and the guides

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        preset = given.get("preset", "rlr") if isinstance(given, dict) else None
        if preset == "auto":
            _check_auto(given)
        if isinstance(preset, str) and preset in PRESETS:
            return merge(PRESETS[preset], given)
        return given

    @field_validator("first_order_steps")
    @classmethod
    def _not_negative(cls, steps: int | str) -> int | str:
        if isinstance(steps, int) and steps < 0:
            raise ValueError(f"found {steps}; allowed: 0 to sampler.steps, or 'all'")
        return steps
