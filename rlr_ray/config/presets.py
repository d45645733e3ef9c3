"""Plans by their names: defaults for the keys of `estimator`."""

from __future__ import annotations

from typing import Any

_NO_SUB_CHAIN = {"length": 0}
_NO_FIRST = {"first_order": {"steps": 0}, "sub_chain": _NO_SUB_CHAIN}
_LAST = {"first_order": {"steps": 1}, "sub_chain": _NO_SUB_CHAIN, "rest": "none"}
_FULL = {"first_order": {"steps": "all"}, "checkpoint_steps": True, "sub_chain": _NO_SUB_CHAIN, "rest": "none"}
_ISOTROPIC = {"directions": "isotropic", "weight": 1.0}

PRESETS: dict[str, dict[str, Any]] = {
    # Three orders, guided directions, weights of least mean squared error: what works for small adapters.
    "rlr": {},
    # Nothing but the keys themselves: for plans that are spelled out.
    "custom": {},
    # The plan that `rlr-ray plan` would choose, measured at the start of the run. Until then no order owns a step.
    "measure": _NO_FIRST | {"rest": "none"},
    # The paper's equation 6 as written: one first-order step, one sub-chain (its j .. j+1), isotropic, weights 1.
    "rlr-paper": {
        "first_order": {"steps": 1},
        "sub_chain": {"length": 2},
        "half_order": {"weight": 1.0},
        "zeroth_order": _ISOTROPIC,
    },
    # Truncated backpropagation (AlignProp, Prabhudesai et al. 2023). Biased; set first_order.steps to its K.
    "alignprop": _LAST,
    # The same with a random K (AlignProp's randomized truncation): less biased, since every step is reached.
    "alignprop-random": _LAST | {"truncation": "random", "checkpoint_steps": True},
    # DRaFT (Clark et al. 2023) backpropagates every step, DRaFT-K the last K.
    "draft": _FULL,
    "draft-1": _LAST,
    # A random K with inverse-probability weights: unbiased, at about half of full backpropagation's cost.
    "russian-roulette": _LAST | {"truncation": "russian_roulette", "checkpoint_steps": True},
    # REINFORCE on every step (Black et al. 2023, without its importance weights).
    "ddpo": _NO_FIRST | {"rest": "half_order", "half_order": {"weight": 1.0}},
    # A black-box reward that is learned meanwhile: backpropagation of a surrogate, REINFORCE on what it misses.
    "surrogate": _FULL | {"rest": "half_order", "surrogate": {"name": "online", "use": "residual"}},
    # Evolution strategies: parameter perturbations on every step.
    "es": _NO_FIRST | {"zeroth_order": _ISOTROPIC},
    # Backpropagation through the whole chain, step by step.
    "full_bp": _FULL,
}
