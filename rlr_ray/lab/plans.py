"""The plans that the laboratory compares: points of the design space, as keys of `estimator`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from rlr_ray.config.base import read_yaml
from rlr_ray.config.estimator import merge
from rlr_ray.config.recipe import parse_config
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError

Estimator = dict[str, Any]  # keys of config.estimator

FULL: Estimator = {"preset": "full_bp"}
DDPO: Estimator = {"preset": "ddpo"}
CLIPPED: Estimator = {"preset": "full_bp", "first_order": {"clip": 2.0}}
BRANCHES: Estimator = {"preset": "branches"}
FORWARD: Estimator = {  # with the steps and draws of its defaults
    "preset": "custom",
    "first_order": {"steps": 0},
    "sub_chain": {"length": 0},
    "rest": "none",
    "half_order": {"score": "forward", "weight": 1.0},
}
NEUTRAL: Estimator = {"preset": "measure"}  # no plan yet, which every recipe allows, to build an engine with
RLR: Estimator = {"preset": "rlr", "zeroth_order": {"count": 4, "chunk_size": 4}}  # with its own number of pairs
BLACK_BOX: Estimator = {"preset": "black-box"}
_NO_SUB_CHAIN = {"length": 0}
_UNWEIGHTED = {"preset": "custom", "half_order": {"weight": 1.0}, "checkpoint_steps": True}


def reinforce(first_order_steps: int) -> Estimator:
    """First order on the last K steps, REINFORCE on all others; unbiased."""
    steps = {"first_order": {"steps": first_order_steps}, "sub_chain": _NO_SUB_CHAIN, "rest": "half_order"}
    return _UNWEIGHTED | steps


def covered(first_order_steps: int, length: int) -> Estimator:
    """First order on the last K steps, sub-chains of h steps on all others; unbiased."""
    steps = {"first_order": {"steps": first_order_steps}, "sub_chain": {"length": length, "place": "cover"}}
    return _UNWEIGHTED | steps


def roulette(least: int) -> Estimator:
    """First order on at least K steps, on earlier ones at random, divided by its probability; unbiased."""
    return {"preset": "russian-roulette", "first_order": {"steps": least}}


def paper(length: int) -> Estimator:
    """The paper's split with a sub-chain of h steps; unbiased."""
    return {"preset": "rlr-paper", "checkpoint_steps": True, "sub_chain": {"length": length}}


def truncated(first_order_steps: int) -> Estimator:
    return {"preset": "alignprop", "checkpoint_steps": True, "first_order": {"steps": first_order_steps}}


def default_plans(config: RunConfig) -> dict[str, Estimator]:
    """The recipe's own plan, and one of every kind beside it."""
    steps = config.sampler.steps
    middle = max(steps // 2, 1)
    plans = recipes_own(config)
    plans |= {"full_bp": FULL}
    plans |= {f"russian-roulette, at least {k}": roulette(k) for k in sorted({1, middle})}
    plans |= {f"FO({k}) + REINFORCE": reinforce(k) for k in sorted({1, min(3, steps - 1), middle})}
    plans |= {"ddpo": DDPO}
    plans |= {f"FO(1) + HO, h = {h} cover": covered(1, h) for h in (2, 3, 5) if h < steps}
    plans |= {f"rlr-paper, h = {h}": paper(h) for h in (2, 3) if h < steps}
    plans |= {"rlr-paper, h = 2, importance": merge(paper(2), {"sub_chain": {"place": "importance"}})}
    plans |= {"es": {"preset": "es"}}
    plans |= {f"alignprop, K = {k}": truncated(k) for k in sorted({1, min(3, steps)})}
    plans |= {"alignprop-random": {"preset": "alignprop-random"}}
    return plans


def recipes_own(config: RunConfig) -> dict[str, Estimator]:
    """The recipe's own plan; none if that is to be chosen, or has a surrogate, which only a run can learn."""
    if config.chooses_plan or config.estimator.surrogate:
        return {}
    return {"the recipe's": {**config.estimator.model_dump(mode="json"), "preset": "custom"}}


def parse_plans(texts: list[str]) -> dict[str, Estimator]:
    """`name={key: value}` from the command line. Raises UserError for what is not that."""
    plans = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            keys = read_yaml(value)
        except yaml.YAMLError as error:
            raise UserError(f"--plan {text!r}: the value is not YAML: {error}") from error
        if not isinstance(keys, dict):
            raise UserError(
                f"--plan {text!r} holds no keys; write --plan 'name={{key: value}}' with keys of `estimator`, "
                "e.g. --plan 'mine={preset: rlr, first_order: {steps: 5}}'"
            )
        if keys.get("preset") == "measure":
            raise UserError(
                f"--plan {text!r}: preset 'measure' is a choice between plans, not one of them; name the plan, e.g. "
                "preset: rlr-paper"
            )
        plans[name.strip()] = keys
    return plans


def with_plan(config: RunConfig, plan: Mapping[str, Any]) -> RunConfig:
    """The recipe under another plan; what the plan does not say of perturbations and baselines stays the recipe's.

    Raises UserError if the plan does not work with the rest of the recipe.
    """
    estimator = config.estimator
    kept: Estimator = {
        "half_order": {"baseline": estimator.half_order.baseline},
        "zeroth_order": estimator.zeroth_order.model_dump(
            mode="json", include={"count", "chunk_size", "scale", "span"}
        ),
        "weight_averaging": estimator.weight_averaging,
        "smoothing": estimator.smoothing,
    }
    return parse_config(config.model_dump(mode="json") | {"estimator": merge(kept, dict(plan))})
