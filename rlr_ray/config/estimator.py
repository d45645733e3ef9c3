"""What a recipe says of the estimator: which order owns which step, and how each is estimated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import isqrt
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from rlr_ray.config.base import FREE, Strict, flat
from rlr_ray.config.rewards import JudgeConfig
from rlr_ray.core.plan import Truncation
from rlr_ray.errors import UserError

_NO_SUB_CHAIN = {"length": 0}
_LAST = {"first_order_steps": 1, "sub_chain": _NO_SUB_CHAIN, "rest": "none"}
_FULL = {"first_order_steps": "all", "checkpoint_steps": True, "sub_chain": _NO_SUB_CHAIN, "rest": "none"}
_ISOTROPIC = {"directions": "isotropic", "weight": 1.0}

PRESETS: dict[str, dict[str, Any]] = {
    # Three orders, guided directions, weights of least mean squared error: what works for small adapters.
    "rlr": {},
    # The plan that `rlr-ray plan` would choose, measured at the start of the run. Until then no order owns a step.
    "auto": {"first_order_steps": 0, "sub_chain": _NO_SUB_CHAIN, "rest": "none"},
    # The paper's equation 6 as written: one first-order step, one sub-chain (its j .. j+1), isotropic, weights 1.
    "rlr-paper": {
        "first_order_steps": 1,
        "sub_chain": {"length": 2},
        "half_order": {"weight": 1.0},
        "zeroth_order": _ISOTROPIC,
    },
    # Truncated backpropagation (AlignProp, Prabhudesai et al. 2023). Biased; set first_order_steps to its K.
    "alignprop": _LAST,
    # The same with a random K (AlignProp's randomized truncation): less biased, since every step is reached.
    "alignprop-random": _LAST | {"truncation": "random", "checkpoint_steps": True},
    # DRaFT (Clark et al. 2023) backpropagates every step, DRaFT-K the last K.
    "draft": _FULL,
    "draft-1": _LAST,
    # A random K with inverse-probability weights: unbiased, at about half of full backpropagation's cost.
    "russian-roulette": _LAST | {"truncation": "russian_roulette", "checkpoint_steps": True},
    # REINFORCE on every step (Black et al. 2023, without its importance weights).
    "ddpo": {"first_order_steps": 0, "sub_chain": _NO_SUB_CHAIN, "rest": "half_order", "half_order": {"weight": 1.0}},
    # A black-box reward that is learned meanwhile: backpropagation of a surrogate, REINFORCE on what it misses.
    "surrogate": _FULL | {"rest": "half_order", "surrogate": {"name": "online"}},
    # Evolution strategies: parameter perturbations on every step.
    "es": {"first_order_steps": 0, "sub_chain": _NO_SUB_CHAIN, "zeroth_order": _ISOTROPIC},
    # Backpropagation through the whole chain, step by step.
    "full_bp": _FULL,
}


# What the core's parameters, which its errors name in backquotes, are called in a recipe.
KEYS = {
    "steps": "sampler.steps",
    "eta": "sampler.eta",
    "first_order_steps": "estimator.first_order_steps",
    "truncation": "estimator.truncation",
    "checkpoint_steps": "estimator.checkpoint_steps",
    "sub_chain_length": "estimator.sub_chain.length",
    "sub_chain_count": "estimator.sub_chain.count",
    "position": "estimator.sub_chain.place",
    "rest": "estimator.rest",
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
        """Which of the three each step belongs to."""
        return [(k >= self.mid) + (k >= self.fine) for k in range(steps)]


Weight = Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)]


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


class HalfOrderConfig(Strict):
    baseline: Literal["prompt", "batch"] = "prompt"  # chains that share a leave-one-out baseline
    weight: Weight = "auto"  # of the term; auto: least mean squared error


class ZerothOrderConfig(Strict):
    # guided: in the span of earlier gradients; isotropic: in all directions
    directions: Literal["guided", "isotropic"] = "guided"
    count: int = Field(80, ge=1)  # N perturbation pairs an update, each on a chain of its own
    chunk_size: int = Field(8, ge=1)  # pairs in one rollout call
    # How many principal components of earlier half-order gradients span guided directions; auto: by count
    span: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    scale: float = Field(0.01, gt=0, allow_inf_nan=False)  # standard deviation of a trained number's displacement
    weight: Weight = "auto"  # of the term; auto: least mean squared error

    @property
    def components(self) -> int:
        """How many principal components of earlier half-order gradients span guided directions."""
        if isinstance(self.span, int):
            return self.span
        return min(max(isqrt(self.count), 4), 32)

    @model_validator(mode="after")
    def _chunks(self) -> ZerothOrderConfig:
        if self.count % self.chunk_size:
            raise ValueError(f"count {self.count} must be a multiple of chunk_size {self.chunk_size}")
        return self


class SurrogateConfig(Strict):
    """A differentiable Q of which first order carries c Q, while the other orders carry R - c Q on every step."""

    name: str = "online"  # learned during the run, or a differentiable reward
    options: dict[str, Any] = Field(default_factory=dict)  # of the reward that stands in
    video: bool | None = None  # whether that reward sees videos; None: what it says of itself
    frames: int | None = Field(None, ge=1)  # of a video, evenly spaced, that it sees; None: all
    # c; auto: slope of R on Q over earlier updates, 0 while their correlation is below the threshold
    coefficient: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = "auto"
    threshold: float = Field(0.3, ge=0, lt=1)  # correlation with the reward from which the surrogate is used
    window: int = Field(4, ge=1)  # updates that give correlation and slope
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


# Keys beside preset auto; the planner decides all others.
_BESIDE_AUTO = ["weight_averaging", "smoothing", "half_order.baseline"]
_BESIDE_AUTO += [f"zeroth_order.{key}" for key in ("count", "chunk_size", "scale", "span")]


def _check_auto(given: dict[str, Any]) -> None:
    """Raise ValueError for keys that would decide the plan too; a config that was written out has those of no plan."""
    keys = {".".join(path): value for path, value in flat(given).items()}
    others = keys.keys() - {"preset", *_BESIDE_AUTO}
    none = flat(EstimatorConfig(preset="auto").model_dump(mode="json")) if others else {}
    wrong = sorted(key for key in others if (path := tuple(key.split("."))) not in none or none[path] != keys[key])
    if wrong:
        raise ValueError(
            f"preset 'auto' chooses the plan, found {', '.join(wrong)} beside it; allowed: {', '.join(_BESIDE_AUTO)}; "
            "leave the others out"
        )


class EstimatorConfig(Strict):
    # A plan by its name: defaults for the keys below (docs/estimators.md); auto: chosen by measurement
    preset: Literal[tuple(PRESETS)] = "rlr"  # type: ignore[valid-type]
    first_order_steps: int | Literal["all"] = 3  # K, the last steps, through which the gradient is backpropagated
    # fixed: K steps; else beyond K a random number of them, uniform up to all: with inverse-probability weights, or
    # without (biased)
    truncation: Truncation = "fixed"
    checkpoint_steps: Annotated[bool, FREE] = False  # trade one more forward a first-order step for one step's memory
    sub_chain: SubChainConfig = SubChainConfig()  # steps in a row that half order carries together
    # Who estimates the steps that first order and sub-chains leave
    rest: Literal["zeroth_order", "half_order", "none"] = "zeroth_order"
    half_order: HalfOrderConfig = HalfOrderConfig()  # REINFORCE on a step's noise
    zeroth_order: ZerothOrderConfig = ZerothOrderConfig()  # perturbations of the trained numbers
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
