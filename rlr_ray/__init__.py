"""Fine-tune diffusion models to a reward with the Recursive Likelihood Ratio estimator.

The names below are the public API (docs/api.md). Each is imported when it is first used, so that `import rlr_ray` costs
nothing, and the estimator needs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlr_ray.cluster.run import run
    from rlr_ray.config.recipe import load_config
    from rlr_ray.core.gradient import Chains, GradientEstimate, estimate_gradient, rollout
    from rlr_ray.core.plan import Plan, PlanShape
    from rlr_ray.core.sampler import Sampler
    from rlr_ray.core.schedule import Schedule, ddim_schedule, flow_schedule
    from rlr_ray.core.weighting import TermEstimate
    from rlr_ray.core.zeroth_order import Directions, zeroth_order

__all__ = [
    "Chains",
    "Directions",
    "GradientEstimate",
    "Plan",
    "PlanShape",
    "Sampler",
    "Schedule",
    "TermEstimate",
    "ddim_schedule",
    "estimate_gradient",
    "flow_schedule",
    "load_config",
    "rollout",
    "run",
    "zeroth_order",
]

_HOMES = {
    "rlr_ray.cluster.run": ("run",),
    "rlr_ray.config.recipe": ("load_config",),
    "rlr_ray.core.gradient": ("Chains", "GradientEstimate", "estimate_gradient", "rollout"),
    "rlr_ray.core.plan": ("Plan", "PlanShape"),
    "rlr_ray.core.sampler": ("Sampler",),
    "rlr_ray.core.schedule": ("Schedule", "ddim_schedule", "flow_schedule"),
    "rlr_ray.core.weighting": ("TermEstimate",),
    "rlr_ray.core.zeroth_order": ("Directions", "zeroth_order"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'rlr_ray' has no attribute {name!r}; it has {', '.join(__all__)}")
