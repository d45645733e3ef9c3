"""A run in words: its plan before, its results after."""

from __future__ import annotations

from collections.abc import Mapping

from rlr_ray.config.run import RunConfig
from rlr_ray.config.train import TrainConfig


def describe_plan(config: RunConfig) -> str:
    """The plan in words: the steps of each order, an update's cost, and notes on bias and variance."""
    estimator, train = config.estimator, config.train
    if config.chooses_plan:
        return f"plan: chosen by measurement at the start, as by `rlr-ray plan`; {train.iterations} updates"
    shape = config.plan_shape
    chunks = range(train.chains // train.chunk_size)
    plans = [shape.draw(config.seed, 0, chunk=c) for c in chunks]
    forwards, backwards = config.cost(plans)
    pairs = estimator.zeroth_order.count if plans[0].zeroth_order else 0
    varies = shape.truncation != "fixed" or shape.switch
    roughly = ", if every update's plan is as long as the first's" if varies else ""
    lines = [
        f"plan: {shape}",
        f"update: {train.chains} chains, {pairs} perturbation pairs: {forwards} denoiser forwards, "
        f"{backwards} backwards; {train.iterations} updates",
        f"run: {forwards * train.iterations:,} forwards, {backwards * train.iterations:,} backwards{roughly}; "
        "evaluations apart",
        f"learning rate: {_learning_rate(train)}",
        *(f"note: {note}" for note in _notes(config)),
    ]
    return "\n".join(lines)


def _learning_rate(train: TrainConfig) -> str:
    auto = "auto, measured at the start by how much an update then changes predictions"
    parts = [auto if train.learning_rate == "auto" else f"{train.learning_rate:g}"]
    parts += [f"rising over the first {train.warmup} updates"] if train.warmup else []
    parts += [] if train.schedule == "constant" else [f"falling to {train.schedule_final:g} of it ({train.schedule})"]
    return ", ".join(parts)


def _notes(config: RunConfig) -> list[str]:
    shape, estimator = config.plan_shape, config.estimator
    notes = _surrogate_notes(config) if shape.residual else bias_notes(config)
    unknown = [label for label, reward in config.rewards.items() if reward.differentiable is None]
    if unknown:
        notes.append(
            f"{', '.join(unknown)}: code of your own, which a dry run does not import; shown as if it were "
            "differentiable, unless the recipe says `differentiable: false`"
        )
    notes += _clip_notes(config)
    if config.train.ahead:
        corrected = shape.has_half_order and shape.score == "path"
        notes.append(
            "ahead: chains are sampled at the theta of the update before, so "
            + ("half order weighs each step by its ratio, and what else reads them is" if corrected else "updates are")
            + " off-policy (biased)"
        )
    if shape.has_half_order and estimator.half_order.baseline == "group":
        notes.append(
            f"half order: each reward is standardised among {config.train.chains_per_prompt} chains of a prompt, so "
            "prompts and rewards count by their own spread (biased); other orders carry rewards as they are"
        )
    used = {"half_order": shape.has_half_order, "zeroth_order": shape.has_zeroth_order}
    weighed = [name for name in used if used[name] and getattr(estimator, name).weight == "auto"]
    if weighed and not shape.residual:
        notes.append(
            f"weight auto on {' and '.join(weighed)}: least mean squared error, so the sum is biased towards the "
            "other terms until their noise falls"
        )
    if shape.has_zeroth_order and estimator.zeroth_order.directions == "guided":
        components = estimator.zeroth_order.components if shape.has_half_order else 0
        span = f"{components} principal components of earlier half-order" if components else "3 or 4 earlier"
        notes.append(f"guided directions: zeroth order estimates its part's projection on {span} gradients")
    if shape.has_zeroth_order and config.cluster != "none" and config.cluster.rollouts.quorum < 1:
        notes.append(
            f"quorum {config.cluster.rollouts.quorum:g}: an update may go on without its last rollouts, so a run does "
            "not repeat bit for bit, and is biased if what makes them late has to do with their rewards"
        )
    if shape.has_zeroth_order and estimator.zeroth_order.directions == "isotropic":
        notes.append("isotropic directions: the variance of zeroth order grows with the number of trained numbers")
    return notes


def _clip_notes(config: RunConfig) -> list[str]:
    """Notes on clipping, which a plan's words leave out."""
    estimator, shape, notes = config.estimator, config.plan_shape, []
    if estimator.first_order.clip is not None and shape.first_order_steps:
        notes.append(
            f"biased: a chain's first-order gradient is cut to {estimator.first_order.clip:g} times the batch's median"
        )
    if estimator.zeroth_order.clip is not None and shape.has_zeroth_order:
        notes.append(
            f"biased: a pair's difference of rewards is cut to {estimator.zeroth_order.clip:g} times the median"
        )
    return notes


def clipped_words(shares: Mapping[str, float]) -> str:
    """The shares of each term that were clipped, in words; medians over updates."""
    kinds = {"first_order": "of first order's chains", "zeroth_order": "of zeroth order's pairs"}
    parts = [f"{shares[name]:.0%} {kind}" for name, kind in kinds.items() if name in shares]
    return f"{' and '.join(parts)} (median over updates)"


def bias_notes(config: RunConfig) -> list[str]:
    """Notes if no number of updates and no weight would make the estimate's expectation the whole gradient."""
    shape = config.plan_shape
    if not shape.biased:
        return []
    if shape.residual:
        return _surrogate_notes(config)[:1]
    notes = []
    if shape.first_order_steps and shape.linear:
        notes.append("biased: linear adjoints leave out how a step moves what later ones predict; for experiments")
    if shape.score == "forward" and shape.has_half_order:
        notes.append(
            "biased: the forward term is a denoising loss towards good chains' ends, not the gradient of their reward; "
            "`rlr-ray plan` says how far the two agree here"
        )
    elif not shape.linear:
        notes.append("biased: the gradient through the steps that nothing owns is dropped")
    if shape.switch:
        bar = config.estimator.surrogate.trust if config.estimator.surrogate else 0.0
        notes.append(
            f"{', '.join(config.black_box)}: black-box; a surrogate learns each meanwhile, and first order climbs it "
            f"while it explains {bar:.0%} of what can be explained of chains that it has not learned from"
        )
    return notes


def _surrogate_notes(config: RunConfig) -> list[str]:
    """Notes on what a plan with a surrogate estimates, and on the bias of its weights."""
    shape, estimator = config.plan_shape, config.estimator
    surrogate = estimator.surrogate
    assert surrogate is not None
    names = [name for name in ("half_order", "zeroth_order") if getattr(shape, f"has_{name}")]
    carriers = " and ".join(name.replace("_", " ") for name in names)
    weights = [getattr(estimator, name).weight for name in names]
    if shape.biased:
        bias = "biased towards its gradient: nothing carries what it misses of the reward at some or all steps"
    elif "auto" in weights:
        bias = f"{carriers} what it leaves of the reward: weight auto, so the sum is biased towards the surrogate's "
        bias += "gradient until the residual's noise falls"
    elif all(weight == 1 for weight in weights):
        bias = f"{carriers} what it leaves of the reward: weight 1, so the sum is unbiased, whatever it misses"
    else:
        bias = f"{carriers} what it leaves of the reward: weight {weights}, so the sum is biased by what it misses"
    notes = [f"first order carries the surrogate {surrogate.name!r}, {bias}"]
    if surrogate.coefficient == "auto":
        otherwise = f"the whole reward is left to {carriers}" if carriers else "theta stays as it is"
        notes.append(f"while the surrogate's correlation is below {surrogate.threshold:g}, {otherwise}")
    return notes
