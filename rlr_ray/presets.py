"""Named points of the design space, as defaults for the keys of `estimator`."""

from __future__ import annotations

from typing import Any

_NO_SUB_CHAIN = {"length": 0}
_FULL = {"first_order_steps": "all", "checkpoint_steps": True, "sub_chain": _NO_SUB_CHAIN, "rest": "none"}
_ISOTROPIC = {"directions": "isotropic", "weight": 1.0}

PRESETS: dict[str, dict[str, Any]] = {
    # Three orders, guided directions, weights of least mean squared error: what works for small adapters.
    "rlr": {},
    # The plan that `rlr-ray plan` would choose, measured at the start of the run.
    "auto": {},
    # The paper's equation 6 as written: one first-order step, one sub-chain (its j .. j+1), isotropic, weights 1.
    "rlr-paper": {
        "first_order_steps": 1,
        "sub_chain": {"length": 2},
        "half_order": {"weight": 1.0},
        "zeroth_order": _ISOTROPIC,
    },
    # Truncated backpropagation (AlignProp, Prabhudesai et al. 2023). Biased; set first_order_steps to its K.
    "alignprop": {"first_order_steps": 1, "sub_chain": _NO_SUB_CHAIN, "rest": "none"},
    # The same with a random K (AlignProp's randomized truncation): less biased, since every step is reached.
    "alignprop-random": {
        "first_order_steps": 1,
        "truncation": "random",
        "checkpoint_steps": True,
        "sub_chain": _NO_SUB_CHAIN,
        "rest": "none",
    },
    # DRaFT (Clark et al. 2023) backpropagates every step, DRaFT-K the last K.
    "draft": _FULL,
    "draft-1": {"first_order_steps": 1, "sub_chain": _NO_SUB_CHAIN, "rest": "none"},
    # A random K with inverse-probability weights: unbiased, at about half of full backpropagation's cost.
    "russian-roulette": {
        "first_order_steps": 1,
        "truncation": "russian_roulette",
        "checkpoint_steps": True,
        "sub_chain": _NO_SUB_CHAIN,
        "rest": "none",
    },
    # REINFORCE on every step (Black et al. 2023, without its importance weights).
    "ddpo": {
        "first_order_steps": 0,
        "sub_chain": _NO_SUB_CHAIN,
        "rest": "half_order",
        "half_order": {"weight": 1.0},
    },
    # A black-box reward that is learned meanwhile: backpropagation of a surrogate, REINFORCE on what it misses.
    "surrogate": _FULL | {"rest": "half_order", "surrogate": {"name": "online"}},
    # Evolution strategies: parameter perturbations on every step.
    "es": {"first_order_steps": 0, "sub_chain": _NO_SUB_CHAIN, "zeroth_order": _ISOTROPIC},
    # Backpropagation through the whole chain, step by step.
    "full_bp": _FULL,
}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` put on top, dictionary inside dictionary."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
