"""Plans by their names: defaults for the keys of `estimator`."""

from __future__ import annotations

from typing import Any

_NO_SUB_CHAIN = {"length": 0}
_NO_FIRST = {"first_order": {"steps": 0}, "sub_chain": _NO_SUB_CHAIN}
_LAST = {"first_order": {"steps": 1}, "sub_chain": _NO_SUB_CHAIN, "rest": "none"}
_FULL = {"first_order": {"steps": "all"}, "checkpoint_steps": True, "sub_chain": _NO_SUB_CHAIN, "rest": "none"}
_ISOTROPIC = {"directions": "isotropic", "weight": 1.0}
_EVERY_STEP = {"signal": (1e-6, 1 - 1e-6)}

# What preset auto is, by what the rewards are.
GRADIENT: dict[str, Any] = {  # all of them have one
    "first_order": {"steps": "all", "clip": 2.0},
    "checkpoint_steps": "auto",
    "sub_chain": _NO_SUB_CHAIN,
    "rest": "none",
}
BLACK_BOX: dict[str, Any] = {  # some have none: the forward term, until a surrogate is trusted to stand in for them
    **GRADIENT,
    "half_order": {"score": "forward", "weight": "even"},  # even: beside first order, if some rewards have a gradient
    "surrogate": {"name": "online", "use": "switch"},
}

PRESETS: dict[str, dict[str, Any]] = {
    # By what the rewards say of themselves: clipped first order where they have gradients, black-box where not.
    "auto": GRADIENT,
    # The forward term until a surrogate explains fresh chains, then clipped first order through that; and back.
    "black-box": BLACK_BOX,
    # Three orders, each in its best form: clipped first order, the forward term, guided and clipped zeroth order.
    "rlr": {
        "first_order": {"steps": 3, "clip": 0.5},
        "half_order": {"score": "forward", "weight": "even"},
        "zeroth_order": {"count": 4, "chunk_size": 4, "clip": 1.0},
    },
    # Nothing but the keys themselves: for plans that are spelled out.
    "custom": {},
    # The plan that `rlr-ray plan` would choose, measured at the start of the run. Until then no order owns a step.
    "measure": _NO_FIRST | {"rest": "none"},
    # The paper's equation 6 as written: one first-order step, one sub-chain (its j .. j+1), isotropic, weights 1.
    "rlr-paper": {
        "first_order": {"steps": 1},
        "sub_chain": {"length": 2},
        "zeroth_order": {**_ISOTROPIC, "count": 80},
    },
    # What its authors' code runs: backpropagation of the last step, then policy gradients at single steps drawn at
    # random. Updates here are on-policy, each batch used once, so that the code's clipped ratios are 1.
    "rlr-released": {
        "first_order": {"steps": 1},
        "sub_chain": {"length": 1},
        "half_order": {"baseline": "batch"},
        "rest": "none",
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
    "ddpo": _NO_FIRST | {"rest": "half_order"},
    # The same by antithetic pairs that part at each step: unbiased, with a fraction of its noise.
    "branches": _NO_FIRST | {"rest": "half_order", "half_order": {"score": "branches"}},
    # The forward term over every step in a velocity's units (advantage-weighted matching, Xue et al. 2025), and with
    # the weights of the likelihood's bound.
    "awm": _NO_FIRST | {"rest": "none", "half_order": {"score": "forward", "weighting": "velocity", **_EVERY_STEP}},
    "elbo-pg": _NO_FIRST | {"rest": "none", "half_order": {"score": "forward", "weighting": "elbo", **_EVERY_STEP}},
    # A black-box reward that is learned meanwhile: backpropagation of a surrogate, REINFORCE on what it misses.
    "surrogate": _FULL
    | {
        "rest": "half_order",
        "surrogate": {"name": "online", "use": "residual"},
    },
    # Evolution strategies: parameter perturbations on every step.
    "es": _NO_FIRST | {"zeroth_order": {**_ISOTROPIC, "count": 80}},
    # Backpropagation through the whole chain, step by step.
    "full_bp": _FULL,
}
