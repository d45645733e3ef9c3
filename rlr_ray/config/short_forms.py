"""Short forms of a recipe, written out before its keys are checked."""

from __future__ import annotations

from typing import Any

from rlr_ray.config.rewards import spelled_out


def written_out(values: Any) -> Any:
    """`estimator: measure` is short for its preset, `reward` for `rewards` of one; auto may be es.

    `train.group_size` is short for chains of a prompt and half order's baseline.
    """
    if isinstance(values, dict) and isinstance(values.get("estimator"), str):
        values = values | {"estimator": {"preset": values["estimator"]}}
    return spelled_out(_grouped(_without_gradients(values)), "reward", "rewards")


def by_name(loggers: Any) -> dict[str, Any]:
    """`[parquet, wandb: {project: p}]` is short for `{parquet: {}, wandb: {project: p}}`."""
    parts = loggers if isinstance(loggers, list) else [loggers]
    named = [part if isinstance(part, dict) else {str(part): {}} for part in parts]
    return {name: options or {} for part in named for name, options in part.items()}


def _without_gradients(values: Any) -> Any:
    """Unchecked values of a run, with preset es for auto if its denoiser has no gradients."""
    model, estimator = (values.get(key) if isinstance(values, dict) else None for key in ("model", "estimator"))
    if not isinstance(model, dict) or model.get("differentiable", True) is not False:
        return values
    keys = estimator if isinstance(estimator, dict) else {}
    return values | {"estimator": keys | {"preset": "es"}} if keys.get("preset", "auto") == "auto" else values


def _grouped(values: Any) -> Any:
    """Unchecked values with `train.group_size` written out. Raises ValueError beside keys that say otherwise."""
    train, estimator = (values.get(key) if isinstance(values, dict) else None for key in ("train", "estimator"))
    if not isinstance(train, dict) or train.get("group_size") is None:
        return values
    size, rest = train["group_size"], {key: value for key, value in train.items() if key != "group_size"}
    keys = estimator if isinstance(estimator, dict) else {}
    half_order = keys.get("half_order") or {}
    stated = {
        "train.chains_per_prompt": (rest.get("chains_per_prompt", 1), (1, size)),
        "estimator.half_order.baseline": (half_order.get("baseline", "running"), ("running", "group")),
    }
    for key, (value, allowed) in stated.items():
        if value not in allowed:
            raise ValueError(
                f"train.group_size {size} says {key}: {allowed[1]}, found {value!r}; leave out one of the two"
            )
    half_order = half_order | {"baseline": "group"}
    return values | {
        "train": rest | {"chains_per_prompt": size},
        "estimator": keys | {"half_order": half_order},
    }
