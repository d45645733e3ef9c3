"""Values of several keys that do not work together, refused when the config loads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rlr_ray.config.cluster_checks import check_cluster
from rlr_ray.config.estimator import STAGES
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.utils.environment import VARIABLE, names_secret


def check_together(config: RunConfig) -> None:
    """Raise UserError for the first combination that does not work."""
    of_plan = (_denoiser, _plan_owns_something, _ahead, _surrogate, _half_order, _zeroth_order)
    for check in (_secrets, _adapter, _dcot, _labels, _guards, *of_plan, check_cluster):
        check(config)


_LOGIN = re.compile(r"://[^/@]*:([^/@]+)@|https?://([^/@:]+)@")  # a password, or a token in place of a name
_QUERY = re.compile(r"[?&]([^=&]+)=([^&]+)")


def _secrets(config: RunConfig) -> None:
    """Recipes are written to a run's folder, its checkpoints and results, so nothing secret may stand in one."""
    sections: dict[str, Any] = {f"loggers.{name}": options for name, options in config.loggers.items()}
    for key, rewards in (("rewards", config.rewards), ("evaluation.judges", config.evaluation.judges)):
        for label, reward in rewards.items():
            sections[f"{key}.{label}.options"] = reward.options
            sections[f"{key}.{label}.actors.runtime_env"] = reward.actors.runtime_env if reward.actors else {}
    if config.estimator.surrogate is not None:
        sections["estimator.surrogate.options"] = config.estimator.surrogate.options
    clear = next((where for name, values in sections.items() for where in _in_clear(values, name, False)), None)
    if clear:
        raise UserError(
            f"{clear} holds a secret in the clear, which would be written to files; name a variable of the environment "
            f"instead, which is read where it is needed and stored nowhere: --set '{clear}=${{NAME}}'"
        )


def _in_clear(value: Any, where: str, secret: bool) -> Iterator[str]:
    """Places of texts that may be secret: any header, keys by their names, and the login or key in a URL."""
    if isinstance(value, dict):
        for key, one in value.items():
            name = str(key)
            yield from _in_clear(one, f"{where}.{key}", secret or name.lower() == "headers" or names_secret(name))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _in_clear(one, where, secret)
    elif isinstance(value, str):
        parts = [part for login in _LOGIN.findall(value) for part in login if part]
        parts += [argument for name, argument in _QUERY.findall(value) if name == "key" or names_secret(name)]
        if any(not VARIABLE.search(part) for part in [*parts, *([value] if secret else [])]):
            yield where


def check_first_order(config: RunConfig) -> None:
    """Raise UserError if first order would pass through black boxes alone, or a surrogate has none to stand in for."""
    black_box, surrogate = config.black_box, config.estimator.surrogate
    if surrogate is not None and surrogate.use == "switch" and not black_box:
        raise UserError(
            "estimator.surrogate stands in for rewards without a gradient (use: switch), and every reward has one; "
            "leave estimator.surrogate out, or set gradient: surrogate on a reward whose own is dear"
        )
    if surrogate is None and config.plan_shape.first_order_steps and len(black_box) == len(config.rewards):
        auto = config.estimator.preset == "auto"
        raise UserError(
            f"reward {', '.join(map(repr, black_box))} is black-box (differentiable: false), but "
            f"estimator.first_order.steps is {config.estimator.first_order.steps}; set estimator.first_order.steps: 0, "
            f"{'leave estimator.surrogate out' if auto else 'estimator.preset: auto'}, or set the reward's "
            "differentiable: true if it is made of torch operations"
        )


def _adapter(config: RunConfig) -> None:
    adapter = config.adapter
    if adapter.from_ is None and adapter.strength != 1:
        raise UserError(f"adapter.strength is {adapter.strength:g}, but there is no adapter.from; leave it out")
    if adapter.from_ is not None and adapter.type != "LORA":
        raise UserError(f"adapter.from is for adapter.type LORA, found {adapter.type!r}; leave one of the two out")
    if config.save_also and adapter.type != "LORA":
        raise UserError(
            f"save_also: {', '.join(config.save_also)} is a format of LoRA, and adapter.type is {adapter.type!r}; "
            "leave save_also out (PEFT reads the adapter), or train a LORA"
        )
    if config.model.merge and config.model.quantization:
        raise UserError(
            "model.merge adds to weights that model.quantization has rounded; allowed: one of the two; fuse the LoRA "
            "first and give model.path the pipeline, or leave model.quantization out"
        )


def _guards(config: RunConfig) -> None:
    guards, every = config.guards, config.evaluation.every
    if guards.kl_steps is not None and not guards.kl_penalty:
        raise UserError("guards.kl_steps says where the penalty is measured, and guards.kl_penalty is 0; set it too")
    if isinstance(guards.kl_steps, int) and not 1 <= guards.kl_steps <= config.sampler.steps:
        raise UserError(f"guards.kl_steps is {guards.kl_steps}; allowed: 1 to {config.sampler.steps}, or all")
    watching = [key for key in ("kl_stop", "patience") if getattr(guards, key) is not None]
    if watching and every is None:
        raise UserError(
            f"guards.{watching[0]} is set, but nothing is evaluated during the run; set evaluation.every, e.g. 10"
        )
    if guards.patience is not None and not config.evaluation.judges:
        raise UserError(
            "guards.patience waits for a judge to fall, and there is none; add evaluation.judges, rewards that are "
            "never trained on"
        )
    if not any(config.sampler.etas) and (guards.kl_penalty or guards.kl_stop is not None):
        raise UserError(
            "sampler.eta is 0, so chains have no noise and their KL is infinite; set sampler.eta: 1, or leave out "
            "guards.kl_penalty and guards.kl_stop"
        )


def _labels(config: RunConfig) -> None:
    labels = {*config.rewards, *config.evaluation.judges}
    taken = sorted(label for label in labels if label == "reward" or label.removesuffix("_se") in labels - {label})
    if taken:
        raise UserError(
            f"the label {taken[0]!r} is the name of another column of the metrics; give the reward another one: "
            "{LABEL: {name: ...}}"
        )
    both = sorted(config.rewards.keys() & config.evaluation.judges.keys())
    if both:
        raise UserError(
            f"{', '.join(both)} is both a reward and a judge; a judge tells whether a reward is gamed, so it must be "
            "another one: give it a label and options of its own, {label: {name: ..., options: {...}}}"
        )


def _dcot(config: RunConfig) -> None:
    steps, dcot, place = config.sampler.steps, config.dcot, config.estimator.sub_chain.place
    if dcot is None and place in STAGES:
        raise UserError(
            f"estimator.sub_chain.place is {place!r}, but no dcot says which steps that is; set "
            "dcot: {mid: FIRST_STEP, fine: FIRST_STEP}, or place: [first, last]"
        )
    if dcot is not None and dcot.fine >= steps:
        raise UserError(
            f"dcot.fine begins at step {dcot.fine}, but the last of the {steps} steps is {steps - 1}; allowed: "
            "0 < mid < fine < sampler.steps; lower dcot.fine or raise sampler.steps"
        )


def _denoiser(config: RunConfig) -> None:
    """A denoiser without gradients can be perturbed, and nothing else."""
    if config.model.differentiable:
        return
    if config.chooses_plan:
        raise UserError(
            "model.differentiable is false, so there are no gradients that plans could be compared by "
            "(estimator.preset: measure, and `rlr-ray plan`, `lab` and `tune`); set estimator.preset: auto, which is es"
        )
    shape, guards = config.plan_shape, config.guards
    differentiates = {
        "first order": shape.first_order_steps,
        "half order": shape.has_half_order,
        "a surrogate": config.estimator.surrogate,
        "guards.kl_penalty": guards.kl_penalty,
    }
    wrong = [name for name, part in differentiates.items() if part]
    if wrong:
        raise UserError(
            f"model.differentiable is false, but {', '.join(wrong)} would differentiate the denoiser; allowed: zeroth "
            "order alone; set estimator.preset: auto or es and leave the rest out, or model.differentiable: true"
        )


def _plan_owns_something(config: RunConfig) -> None:
    """Not asked of a plan that waits for what a user's own reward says of itself."""
    shape = config.plan_shape
    waits = config.estimator.preset == "auto" and any(one.differentiable is None for one in config.rewards.values())
    if not (config.chooses_plan or waits or shape.first_order_steps or shape.has_half_order or shape.has_zeroth_order):
        raise UserError(
            "the plan leaves every step out (no first order, no sub-chain, rest: none), so there is no gradient; set "
            "estimator.rest: half_order or zeroth_order, or estimator.first_order.steps above 0"
        )


def _ahead(config: RunConfig) -> None:
    if config.train.ahead and not config.samples:
        raise UserError(
            "train.ahead is 1, but this plan backpropagates every step, so that nothing is sampled ahead; allowed: 0; "
            "leave it out, or lower estimator.first_order.steps"
        )


def _surrogate(config: RunConfig) -> None:
    surrogate = config.estimator.surrogate
    if surrogate is None:
        return
    if surrogate.use == "switch":
        if surrogate.name != "online":
            raise UserError(
                f"estimator.surrogate.use 'switch' learns each reward's own surrogate, found the name "
                f"{surrogate.name!r}; set estimator.surrogate.name: online, or use: residual"
            )
        if not config.plan_shape.first_order_steps:
            raise UserError(
                "estimator.surrogate is for first order to pass through (use: switch), but estimator.first_order.steps "
                "is 0; set estimator.surrogate: null, or raise estimator.first_order.steps"
            )
        return
    if surrogate.name == "online" and config.plan_shape.has_zeroth_order:
        raise UserError(
            "zeroth order would carry what the surrogate 'online' leaves of the reward, but rollout actors do not hold "
            "its weights; set estimator.rest: half_order, estimator.sub_chain.place: cover, or name a differentiable "
            "reward in estimator.surrogate.name"
        )
    if surrogate.coefficient == "auto" and config.baseline_size < 2:
        raise UserError(
            "estimator.surrogate.coefficient 'auto' compares chains that share a baseline, found 1 of a prompt; raise "
            "train.chains_per_prompt, set estimator.half_order.baseline: batch, or give the coefficient as a number"
        )


def _half_order(config: RunConfig) -> None:
    train, half_order = config.train, config.estimator.half_order
    if not config.plan_shape.has_half_order:
        return
    if not any(config.sampler.etas) and half_order.score != "forward":
        raise UserError(
            "sampler.eta is 0, so the chain has no noise for half order; allowed: eta above 0; set sampler.eta: 1, "
            "estimator.half_order.score: forward, or estimator.sub_chain.length: 0 with rest: zeroth_order"
        )
    if config.baseline_size < 2 and (half_order.score != "branches" or half_order.baseline == "group"):
        raise UserError(
            f"estimator.half_order.baseline {half_order.baseline!r} needs 2 chains or more that share it, found 1; "
            "raise train.chains_per_prompt (baselines 'prompt' and 'group') or train.chains ('batch' and 'running')"
        )
    if half_order.baseline == "group" and config.plan_shape.residual:
        raise UserError(
            "estimator.half_order.baseline 'group' standardises each reward, but half order carries what a surrogate "
            "leaves of their sum (estimator.surrogate.use: residual); set the baseline to running, prompt or batch, or "
            "leave estimator.surrogate out, for which use: switch stands where a reward has no gradient"
        )
    if half_order.pull and half_order.pull_to == "ema" and config.guards.ema is None:
        raise UserError(
            "estimator.half_order.pull is to the average of theta (pull_to: ema), and none is kept; set guards.ema, "
            "e.g. 0.95, or estimator.half_order.pull_to: base"
        )
    if half_order.weight == "auto" and train.chains == train.chunk_size:
        raise UserError(
            "estimator.half_order.weight 'auto' compares chunks, found one; lower train.chunk_size below "
            f"train.chains ({train.chains}) or set the weight to 1"
        )


def _zeroth_order(config: RunConfig) -> None:
    shape, zeroth_order = config.plan_shape, config.estimator.zeroth_order
    if not shape.has_zeroth_order:
        return
    if zeroth_order.weight == "auto" and zeroth_order.count < 2:
        raise UserError(
            "estimator.zeroth_order.weight 'auto' compares perturbations, found one; raise "
            "estimator.zeroth_order.count or set the weight to 1"
        )
    if zeroth_order.directions == "guided" and not shape.first_order_steps and not shape.has_half_order:
        raise UserError(
            "estimator.zeroth_order.directions 'guided' follows the first-order and half-order gradients, and the plan "
            "has neither; set directions: isotropic, or give some steps to the other orders"
        )
