# ruff: noqa: F401
"""Fine-tune diffusion models to a reward with the Recursive Likelihood Ratio estimator.

The names below are the public API (docs/api.md). Each is imported when it is first used, so that `import rlr_ray` costs
nothing, and the estimator needs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers; ruff does not see that __all__ has them
    from rlr_ray.cluster.run import run_recipe as run
    from rlr_ray.config.recipe import load_config
    from rlr_ray.core.gradient import GradientEstimate, estimate_gradient
    from rlr_ray.core.plan import Plan
    from rlr_ray.core.plan_shape import PlanShape
    from rlr_ray.core.sampler import Chains, Sampler
    from rlr_ray.core.schedule import Schedule, ddim_schedule, flow_schedule
    from rlr_ray.core.weighting import TermEstimate
    from rlr_ray.core.zeroth_order import Directions, rollout, zeroth_order

_PLACES = {
    "Chains": "core.sampler:Chains",
    "Directions": "core.zeroth_order:Directions",
    "GradientEstimate": "core.gradient:GradientEstimate",
    "Plan": "core.plan:Plan",
    "PlanShape": "core.plan_shape:PlanShape",
    "Sampler": "core.sampler:Sampler",
    "Schedule": "core.schedule:Schedule",
    "TermEstimate": "core.weighting:TermEstimate",
    "ddim_schedule": "core.schedule:ddim_schedule",
    "estimate_gradient": "core.gradient:estimate_gradient",
    "flow_schedule": "core.schedule:flow_schedule",
    "load_config": "config.recipe:load_config",
    "rollout": "core.zeroth_order:rollout",
    "run": "cluster.run:run_recipe",
    "zeroth_order": "core.zeroth_order:zeroth_order",
}
__all__ = list(_PLACES)


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'rlr_ray' has no attribute {name!r}; it has {', '.join(_PLACES)}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(f"rlr_ray.{module}"), attribute)
