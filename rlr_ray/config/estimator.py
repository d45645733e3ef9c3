"""The `estimator` key of a recipe: which order owns which step, and how each is estimated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ModelWrapValidatorHandler, field_validator, model_validator

from rlr_ray.config.base import FREE, Strict, flat
from rlr_ray.config.presets import PRESETS
from rlr_ray.config.rewards import JudgeConfig
from rlr_ray.core.plan import Truncation
from rlr_ray.errors import UserError

# What the core's parameters, which its errors name in backquotes, are called in a recipe.
KEYS = {
    "steps": "sampler.steps",
    "eta": "sampler.eta",
    "first_order_steps": "estimator.first_order.steps",
    "truncation": "estimator.truncation",
    "checkpoint_steps": "estimator.checkpoint_steps",
    "sub_chain_length": "estimator.sub_chain.length",
    "sub_chain_count": "estimator.sub_chain.count",
    "position": "estimator.sub_chain.place",
    "rest": "estimator.rest",
    "score": "estimator.half_order.score",
    "adjoint": "estimator.first_order.adjoint",
    "use": "estimator.surrogate.use",
    "signal": "estimator.half_order.signal",
    "weighting": "estimator.half_order.weighting",
}


@contextmanager
def in_keys() -> Iterator[None]:
    """Have what the core refuses say which keys of a recipe are meant."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub("`(.+?)`", lambda name: KEYS[name[1]], str(error))) from error


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` put on top, dictionary inside dictionary."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


Stage = Literal["coarse", "mid", "fine"]
STAGES: tuple[str, ...] = get_args(Stage)  # in the order of the steps


class DcotConfig(Strict):
    """`coarse` has steps 0 .. mid-1, `mid` has mid .. fine-1, `fine` has fine .. T-1."""

    mid: int = Field(ge=1)  # first step of the stage mid
    fine: int = Field(ge=2)  # first step of the stage fine

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
        """Number of the stage that each step belongs to."""
        return [(k >= self.mid) + (k >= self.fine) for k in range(steps)]


Weight = Literal["auto", "even"] | Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FirstOrderConfig(Strict):
    """Backpropagation of the reward through the last steps of the chain."""

    steps: int | Literal["all"] = 3  # K, the last steps, through which the gradient is backpropagated
    # A chain's gradient is cut to so many times the batch's median norm (biased); None: none is
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    # linear: the reward's slope at the end, carried back without the denoiser's own slopes (biased; for experiments)
    adjoint: Literal["exact", "linear"] = "exact"

    @field_validator("steps")
    @classmethod
    def _not_negative(cls, steps: int | str) -> int | str:
        if isinstance(steps, int) and steps < 0:
            raise ValueError(f"found {steps}; allowed: 0 to sampler.steps, or 'all'")
        return steps


class SubChainConfig(Strict):
    length: int = Field(3, ge=0)  # h, steps of a sub-chain; 0: none
    count: int = Field(1, ge=1)  # sub-chains of an update
    # importance: by measured gradient norms; cover: as many as cover the steps; a stage of dcot; or [first, last], both
    # included
    place: Literal["uniform", "importance", "cover"] | Stage | tuple[int, int] = "uniform"

    @field_validator("place")
    @classmethod
    def _ordered(cls, place: str | tuple[int, int]) -> str | tuple[int, int]:
        if not isinstance(place, str) and not 0 <= place[0] <= place[1]:
            raise ValueError(
                f"found {list(place)}; allowed: 'uniform', 'importance', 'cover', 'coarse', 'mid', 'fine', or "
                "[first, last] with 0 <= first <= last"
            )
        return place


Signal = Annotated[float, Field(gt=0, lt=1)]


class HalfOrderConfig(Strict):
    """Estimation from the rewards and the chain's own noise, without a gradient of the reward."""

    # path: REINFORCE on the chain's noises; branches: on pairs that part at a step; forward: a denoising loss towards
    # the chain's last latent, weighted by its advantage (biased)
    score: Literal["path", "branches", "forward"] = "path"
    # What a chain's reward is compared with. prompt, batch: the others that share it, in this update; running: the mean
    # of its prompt in earlier updates, then the others of this one; group: as prompt, each reward standardised among
    # the train.chains_per_prompt chains of a prompt before they are weighted and summed, as GRPO has it (biased)
    baseline: Literal["running", "prompt", "batch", "group"] = "running"
    # Of the term. auto: least mean squared error; even: what makes it as long as first order, over updates, by the
    # spread of the rewards that each carries (biased)
    weight: Weight = 1.0
    # branches: of its steps, how many are drawn each update, with the inverse probability as weight
    branch_steps: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    draws: int = Field(3, ge=1)  # forward: steps drawn a chain, each with a noise of its own
    signal: tuple[Signal, Signal] = (0.03, 0.4)  # forward: alpha-bar, the share of signal, at the drawn steps' inputs
    # forward: of a drawn step. elbo: the likelihood bound's; velocity: errors counted as those of a velocity
    weighting: Literal["uniform", "elbo", "velocity"] = "uniform"
    # forward: weight of the squared distance of its prediction to another model's, which is added to the loss
    pull: float = Field(0.0, ge=0, allow_inf_nan=False)
    pull_to: Literal["ema", "base"] = "ema"  # that model: the average that is evaluated (guards.ema), or the base model

    @property
    def by_prompt(self) -> bool:
        """Whether chains are compared with those of their own prompt alone."""
        return self.baseline in ("prompt", "group")

    @field_validator("signal")
    @classmethod
    def _rises(cls, signal: tuple[float, float]) -> tuple[float, float]:
        if signal[0] >= signal[1]:
            raise ValueError(f"found {list(signal)}; allowed: [low, high] with 0 < low < high < 1, e.g. [0.03, 0.4]")
        return signal


class ZerothOrderConfig(Strict):
    # guided: in the span of earlier gradients; isotropic: in all directions
    directions: Literal["guided", "isotropic"] = "guided"
    count: int = Field(8, ge=1)  # N perturbation pairs an update, each on a chain of its own
    chunk_size: int = Field(8, ge=1)  # pairs in one rollout call
    # How many principal components of earlier half-order gradients span guided directions; auto: by count
    span: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    scale: float = Field(0.01, gt=0, allow_inf_nan=False)  # standard deviation of a trained number's displacement
    weight: Weight = "auto"  # of the term; auto: least mean squared error; even: as long as first order
    # A pair's difference of rewards is cut to so many times the median of their sizes (biased); None: none is
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @property
    def components(self) -> int:
        """Number of principal components of earlier half-order gradients that span guided directions."""
        if isinstance(self.span, int):
            return self.span
        return min(max(isqrt(self.count), 4), 32)

    @model_validator(mode="after")
    def _chunks(self) -> ZerothOrderConfig:
        if self.count % self.chunk_size:
            raise ValueError(f"count {self.count} must be a multiple of chunk_size {self.chunk_size}")
        return self


class SurrogateConfig(Strict):
    """A differentiable Q that stands in for black-box rewards where first order carries them."""

    name: str = "online"  # learned during the run, or a differentiable reward
    # switch: first order carries Q, clipped, once it is trusted, and half order the reward until then; residual: first
    # order carries c Q, and the other orders R - c Q on every step
    use: Literal["switch", "residual"] = "switch"
    # switch: share of the rewards' explainable variance on fresh chains that Q must explain
    trust: float = Field(0.3, gt=0, lt=1)
    # Of online, what it reads: the last latent, or the frozen base denoiser's middle features at low noise
    features: Literal["latent", "denoiser"] = "latent"
    options: dict[str, Any] = Field(default_factory=dict)  # of the reward that stands in
    video: bool | None = None  # whether that reward sees videos; None: what it says of itself
    frames: int | None = Field(None, ge=1)  # of a video, evenly spaced, that it sees; None: all
    # residual: c; auto: slope of R on Q over earlier updates, 0 while their correlation is below the threshold
    coefficient: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = "auto"
    threshold: float = Field(0.3, ge=0, lt=1)  # residual: correlation with the reward from which Q is used
    window: int = Field(5, ge=1)  # updates that give correlation, slope and trust
    replay: int = Field(2000, ge=1)  # samples that online keeps, and writes to every checkpoint
    learning_rate: float = Field(1e-3, gt=0, allow_inf_nan=False)  # of what online learns
    steps_per_update: int = Field(50, ge=1)  # in which online learns
    batch_size: int = Field(64, ge=1)  # samples of such a step

    @property
    def reward(self) -> JudgeConfig:
        """The named reward."""
        facts = {"differentiable": True, "video": self.video, "frames": self.frames}
        return JudgeConfig(name=self.name, options=self.options, **facts)

    @model_validator(mode="after")
    def _read(self) -> SurrogateConfig:
        if self.name == "online" and self.options:
            raise ValueError(f"the surrogate 'online' takes no options, found {sorted(self.options)}; leave them out")
        return self


# Keys beside preset measure; the planner decides all others.
_BESIDE_MEASURE = ["weight_averaging", "smoothing", "half_order.baseline"]
_BESIDE_MEASURE += [f"zeroth_order.{key}" for key in ("count", "chunk_size", "scale", "span")]


def _check_measure(stated: dict[str, Any]) -> None:
    """Raise ValueError for keys that would decide the plan too; a config that was written out has those of no plan."""
    keys = {".".join(path): value for path, value in flat(stated).items()}
    others = keys.keys() - {"preset", *_BESIDE_MEASURE}
    none = flat(EstimatorConfig(preset="measure").model_dump(mode="json")) if others else {}
    wrong = sorted(key for key in others if (path := tuple(key.split("."))) not in none or none[path] != keys[key])
    if wrong:
        raise ValueError(
            f"preset 'measure' chooses the plan, found {', '.join(wrong)} beside it; allowed: "
            f"{', '.join(_BESIDE_MEASURE)}; leave the others out"
        )


class EstimatorConfig(Strict):
    # A plan by its name: defaults for the keys below (docs/estimators.md). auto: by what the rewards say of themselves;
    # measure: chosen by measurement
    preset: Literal[tuple(PRESETS)] = "auto"  # type: ignore[valid-type]
    first_order: FirstOrderConfig = FirstOrderConfig()
    # fixed: K steps; else beyond K a random number of them, uniform up to all: with inverse-probability weights, or
    # without (biased)
    truncation: Truncation = "fixed"
    # Trade one more forward a first-order step for one step's memory; auto: if the others would not fit
    checkpoint_steps: Annotated[bool | Literal["auto"], FREE] = False
    sub_chain: SubChainConfig = SubChainConfig()  # steps in a row that half order carries together
    # Who estimates the steps that first order and sub-chains leave
    rest: Literal["zeroth_order", "half_order", "none"] = "zeroth_order"
    half_order: HalfOrderConfig = HalfOrderConfig()
    zeroth_order: ZerothOrderConfig = ZerothOrderConfig()  # perturbations of the trained numbers
    surrogate: SurrogateConfig | None = None  # for rewards that are black-box
    weight_averaging: float = Field(8, ge=1)  # m of the auto weights: updates that the optimizer averages
    smoothing: float = Field(0.9, ge=0, lt=1)  # of the auto weights' statistics and the guides

    @property
    def checkpointed(self) -> bool:
        """Whether steps are checkpointed, as far as is known before an engine has measured: auto counts as not."""
        return self.checkpoint_steps is True

    @model_validator(mode="wrap")
    @classmethod
    def _fill_from_preset(cls, stated: Any, validate: ModelWrapValidatorHandler[EstimatorConfig]) -> EstimatorConfig:
        preset = stated.get("preset", "auto") if isinstance(stated, dict) else None
        if preset == "measure":
            _check_measure(stated)
        if not isinstance(preset, str) or preset not in PRESETS:
            return validate(stated)
        config = validate(merge(PRESETS[preset], stated))
        _unset_defaults(config, stated)
        return config

    def decided(self, *, black_box: bool) -> EstimatorConfig:
        """Preset auto, once it is known whether a reward has no gradient; every key beside it in a recipe stays."""
        if self.preset != "auto":
            return self
        stated = self.model_dump(mode="json", exclude_unset=True)
        preset = "black-box" if black_box else "auto"
        return EstimatorConfig.model_validate(stated | {"preset": preset}).model_copy(update={"preset": "auto"})


def _unset_defaults(section: BaseModel, stated: dict[str, Any]) -> None:
    """Let `model_fields_set` be the keys that a recipe states, without those that a preset filled in."""
    section.model_fields_set.intersection_update(stated)
    for key, value in stated.items():
        part = getattr(section, key)
        if isinstance(part, BaseModel) and isinstance(value, dict):
            _unset_defaults(part, value)
