"""The keys `reward` and `rewards` of a recipe, and their like for judges."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlr_ray.config.base import FREE, Free, Strict
from rlr_ray.config.cluster import Role

# Options by which a reward says the same, asked otherwise. Another url may be another reward; ${NAME} lets it move.
HOW_ASKED = Free(("headers", "timeout_s", "patience_s", "concurrency", "batch_size"))
Finite = Annotated[float, Field(allow_inf_nan=False)]


class RewardActorsConfig(Role):
    """Ray actors of a reward's own, which workers and rollout actors share."""

    replicas: int = Field(1, ge=1)  # actors that share the calls
    batch_size: int | None = Field(None, ge=1)  # images of several calls at once, at most; None: every call by itself
    timeout_s: float = Field(300, gt=0, allow_inf_nan=False)  # of one call; below the rollouts'
    runtime_env: dict[str, Any] = Field(default_factory=dict)  # Ray's


class JudgeConfig(Strict):
    """A reward that is never trained on; higher is better."""

    name: str  # one of the rewards of docs/rewards.md, or your own as module:name
    # What an image gets whose score is not finite; each is counted
    invalid: Annotated[Literal["stop"] | Finite, FREE] = "stop"
    differentiable: bool | None = None  # whether scores have gradients; None: what the reward says of itself
    video: bool | None = None  # whether it sees videos, or their frames one by one; None: what it says of itself
    # What a reward is shown: images as a tensor in [0, 1], or as a list of PIL's, which have no gradients
    input: Literal["tensor", "pil"] = "tensor"
    frames: int | None = Field(None, ge=1)  # of a video, evenly spaced, that it sees; None: all
    # Arguments of the reward's class or function; `${NAME}` is a variable of the environment
    options: Annotated[dict[str, Any], HOW_ASKED] = Field(default_factory=dict)
    actors: Annotated[RewardActorsConfig | None, FREE] = None  # None: in every process that needs it

    @property
    def has_gradient(self) -> bool:
        """As far as is known: a reward that is not imported yet has one."""
        return self.differentiable is not False and self.input == "tensor"

    @model_validator(mode="after")
    def _sees_tensors_for_gradients(self) -> Self:
        if self.input == "pil" and self.differentiable:
            raise ValueError(
                "found differentiable: true with input: pil; allowed: one of them, as PIL's images have no gradients"
            )
        return self

    @property
    def sees_video(self) -> bool:
        return bool(self.video)


class RewardConfig(JudgeConfig):
    # surrogate: its own, which may be dear, is not asked for: it is trained on as a black box is
    gradient: Literal["own", "surrogate"] = "own"
    weight: Finite = 1.0  # in the sum
    normalize: bool | None = None  # by mean and deviation over the base model's held-out chains; None: if several

    @property
    def has_gradient(self) -> bool:
        """As far as is known and asked for."""
        return self.gradient == "own" and super().has_gradient

    @field_validator("weight")
    @classmethod
    def _counts(cls, weight: float) -> float:
        if not weight:
            raise ValueError("found 0; to look at a reward without training on it, put it under evaluation.judges")
        return weight


Label = Annotated[str, Field(min_length=1)]
Rewards = dict[Label, RewardConfig]
Judges = dict[Label, JudgeConfig]


def spelled_out(values: Any, singular: str, plural: str) -> Any:
    """Unchecked values with their rewards as a dictionary of dictionaries, whichever short form they have.

    `reward: {name: x, ...}` is short for `rewards: {x: {...}}`, `rewards: {x: 0.5}` for `rewards: {x: {weight: 0.5}}`;
    a reward's name is its label if it does not say another.
    """
    if not isinstance(values, dict):
        return values
    values = dict(values)
    single, several = values.pop(singular, None), values.pop(plural, None)
    if single is not None and several:
        raise ValueError(f"found both {singular!r} and {plural!r}; allowed: one of them; put all under {plural!r}")
    if isinstance(single, str):
        single = {"name": single}
    if single is not None:
        if not isinstance(single, dict) or not isinstance(single.get("name"), str):
            raise ValueError(f"{singular}: found {single!r}; allowed: {{name: ..., options: {{...}}}}; give its name")
        return values | {plural: {single["name"]: single}}
    if isinstance(several, dict):
        _check_labels(several, singular, plural)
        several = {label: _spelled(label, reward) for label, reward in several.items()}
    return values if several is None else values | {plural: several}


def _check_labels(several: dict[Any, Any], singular: str, plural: str) -> None:
    """Raise ValueError for keys of a single reward where labels belong."""
    keys = [label for label in several if label in RewardConfig.model_fields]
    if keys:
        raise ValueError(
            f"{plural}: found the keys of one reward, {', '.join(keys)}, where labels belong; allowed: any label that "
            f"is no such key; write `{singular}: {{name: ...}}` for one, or `{plural}: {{LABEL: {{name: ...}}}}`"
        )


def _spelled(label: Any, reward: Any) -> Any:
    if isinstance(reward, int | float):
        return {"name": label, "weight": reward}
    return {"name": label} | reward if isinstance(reward, dict) else reward
