"""A run in words: its plan before, its results after."""

from __future__ import annotations

from math import prod

from rlr_ray.config import RunConfig
from rlr_ray.memory import GIB
from rlr_ray.prompts import prompt_sets
from rlr_ray.rewards.view import view_of
from rlr_ray.run_folder import RunFolder


def describe_plan(config: RunConfig) -> str:
    """Which order owns what, what an update costs, and what the estimate is not."""
    estimator, train = config.estimator, config.train
    if estimator.preset == "auto":
        return f"plan: chosen by measurement at the start, as by `rlr-ray plan`; {train.iterations} updates"
    shape = config.plan_shape
    chunks = range(train.chains // train.chunk_size)
    forwards, backwards = config.cost([shape.draw(config.seed, 0, chunk=c) for c in chunks])
    pairs = estimator.zeroth_order.count if shape.has_zeroth_order else 0
    roughly = ", if every update's plan is as long as the first's" if shape.truncation != "fixed" else ""
    lines = [
        f"plan: {shape}",
        f"update: {train.chains} chains, {pairs} perturbation pairs: {forwards} denoiser forwards, "
        f"{backwards} backwards; {train.iterations} updates",
        f"run: {forwards * train.iterations:,} forwards, {backwards * train.iterations:,} backwards{roughly}; "
        "evaluations apart",
        *(f"note: {note}" for note in _notes(config)),
    ]
    return "\n".join(lines)


def describe_sizes(config: RunConfig) -> str:
    """What the model, the adapter and a chain take in memory, as far as the pipeline's config files tell.

    Raises UserError if model and adapter do not go together, or if half order may end at a step without noise.
    """
    from rlr_ray.models.sizes import Unknown, sizes_of  # here: diffusers takes seconds to import

    unmeasured = (
        "not known without a measurement: activations of denoiser, VAE and reward, and the reward's own weights; "
        "`rlr-ray plan` and `rlr-ray lab` measure memory, memory_budget_gib holds a run to a limit"
    )
    try:
        sizes = sizes_of(config)
    except Unknown as unknown:
        return f"sizes: unknown; {unknown}\n{unmeasured}"
    model, dtype = sizes.model, config.model.dtype
    if config.estimator.preset != "auto":
        config.plan_shape.check_noise(model.schedule)
    for label, reward in {**config.rewards, **config.evaluation.judges}.items():
        view_of(label, reward, model.frames)
    latent, steps, chunk = 4 * prod(model.latent_shape), len(model.schedule), config.train.chunk_size
    rows = {**sizes.parts, "together": tuple(map(sum, zip(*sizes.parts.values(), strict=True)))}
    width = max(map(len, rows))
    trained = f"{sizes.trained:,} numbers in {model.trained}"
    return "\n".join(
        [
            f"sizes, from the pipeline's config files, weights in {dtype}, in every process that draws pictures:",
            *(f"  {name:{width}}  {count:>16,} parameters  {_size(size)}" for name, (count, size) in rows.items()),
            f"trained: {trained} (P), float32: {_size(4 * sizes.trained)}; AdamW's state {_size(8 * sizes.trained)}",
            f"latent: {' x '.join(map(str, model.latent_shape))}, float32; a chain of {steps} steps, with its noises, "
            f"{_size((2 * steps + 1) * latent)}; {chunk} at once (train.chunk_size): "
            f"{_size(chunk * (2 * steps + 1) * latent)}",
            unmeasured,
        ]
    )


def _size(count: float) -> str:  # of bytes
    unit, name = next((u, n) for u, n in ((GIB, "GiB"), (2**20, "MiB"), (1024, "KiB")) if count >= u / 10 or u == 1024)
    return f"{count / unit:.2f} {name}"


def describe_prompts(config: RunConfig) -> str:
    """How many prompts are trained on and held out, and which were left out. Raises UserError for bad ones."""
    notes: list[str] = []
    sets = prompt_sets(config, notes.append)
    held_out = "held-out chains have the same" if sets.held_out is sets.train else f"{len(sets.held_out)} held out"
    return "\n".join([f"prompts: {len(sets.train)} to train on; {held_out}", *(f"note: {note}" for note in notes)])


def _notes(config: RunConfig) -> list[str]:
    shape, estimator = config.plan_shape, config.estimator
    notes = _surrogate_notes(config) if shape.residual else bias_notes(config)
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


def bias_notes(config: RunConfig) -> list[str]:
    """One if no number of updates and no weight would make the estimate's expectation the whole gradient."""
    shape = config.plan_shape
    if not shape.biased:
        return []
    if shape.residual:
        return _surrogate_notes(config)[:1]
    return ["biased: the gradient through the steps that nothing owns is dropped"]


def _surrogate_notes(config: RunConfig) -> list[str]:
    """What a plan with a surrogate estimates, and which bias its weights bring."""
    shape, estimator = config.plan_shape, config.estimator
    surrogate = estimator.surrogate
    assert surrogate is not None
    names = [name for name in ("half_order", "zeroth_order") if getattr(shape, f"has_{name}")]
    carriers = " and ".join(name.replace("_", " ") for name in names)
    weights = [getattr(estimator, name).weight for name in names]
    if shape.biased:
        said = "biased towards its gradient: nothing carries what it misses of the reward at some or all steps"
    elif "auto" in weights:
        said = f"{carriers} what it leaves of the reward: weight auto, so the sum is biased towards the surrogate's "
        said += "gradient until the residual's noise falls"
    elif all(weight == 1 for weight in weights):
        said = f"{carriers} what it leaves of the reward: weight 1, so the sum is unbiased, whatever it misses"
    else:
        said = f"{carriers} what it leaves of the reward: weight {weights}, so the sum is biased by what it misses"
    notes = [f"first order carries the surrogate {surrogate.name!r}, {said}"]
    if surrogate.coefficient == "auto":
        otherwise = f"the whole reward is left to {carriers}" if carriers else "theta stays as it is"
        notes.append(f"while the surrogate's correlation is below {surrogate.threshold:g}, {otherwise}")
    return notes


def describe_results(folder: RunFolder) -> str:
    """What came of a finished run, and where to look."""
    summary = folder.load_summary()
    lines = [
        f"report:   {folder.report}",
        f"held-out reward {summary['reward_before']:.3f} -> {summary['reward_after']:.3f}: "
        f"gain {summary['gain']:.3f} +- {summary['gain_se']:.3f} (standard error over paired seeds)",
    ]
    for label, scores in summary["scores"].items():
        kind = "judge (never trained on)" if label in summary["judges"] else "reward"
        change = f"{scores['gain']:+.3f} +- {scores['gain_se']:.3f}"
        lines.append(f"{kind} {label}: {scores['before']:.3f} -> {scores['after']:.3f}: {change}")
    if summary["kl"] is not None:
        lines.append(f"KL to the base model: {summary['kl']:.3g} nats a chain")
    if summary["kept_update"] < summary["steps"]:
        lines.append(f"kept: what update {summary['kept_update']} had left, the best (guards.keep)")
    surrogate = summary["surrogate"]
    if surrogate is not None:
        lines.append(
            f"surrogate: correlation {surrogate['correlation']:.2f} with the reward on chains that it had not learned "
            f"from (median of the last quarter), used in {surrogate['share_of_updates']:.0%} of updates"
        )
    lines += [f"warning: {text}" for text in summary["warnings"]]
    lines += [
        f"{summary['steps']} updates, {summary['denoiser_forwards']} denoiser forwards, {summary['seconds']:.0f} s, "
        f"on {summary['ran_on']}",
        *(f"pictures: {path}" for path in sorted(folder.samples.glob("before_after.*"))),
        f"curve:    {folder.path / 'reward_curve.png'}",
        f"adapter:  {folder.path / summary['adapter']}",
    ]
    if not summary["adapter"].startswith("lora/"):
        lines.append(
            "          (in PEFT's own format, which diffusers' load_lora_weights does not read; "
            "load it with peft.PeftModel.from_pretrained(pipeline.unet, folder), or pipeline.transformer)"
        )
    return "\n".join(lines)
