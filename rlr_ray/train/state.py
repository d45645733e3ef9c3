"""The state of training: theta and its average, the optimizer, and the estimator's statistics."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rlr_ray.config.estimator import EstimatorConfig
from rlr_ray.config.guards import GuardsConfig
from rlr_ray.config.train import TrainConfig
from rlr_ray.core.adaptive import Adaptive, Proposal
from rlr_ray.core.gradient import GradientEstimate
from rlr_ray.errors import UserError
from rlr_ray.train.engine import RolloutBatch
from rlr_ray.train.steady import Sizes, StepBack

# Learning rate at a part 0 <= t < 1 of the run, as a factor that falls from 1 towards `final`.
SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": lambda t, final: 1.0,
    "linear": lambda t, final: 1 + (final - 1) * t,
    "cosine": lambda t, final: final + (1 - final) * (1 + math.cos(math.pi * t)) / 2,
}


def _adam8bit() -> Any:
    try:
        return import_module("bitsandbytes.optim").Adam8bit
    except ImportError as error:
        raise UserError(
            "train.optimizer 'Adam8bit' needs bitsandbytes, which cannot be imported; pip install bitsandbytes, or set "
            "train.optimizer: AdamW"
        ) from error


# Of train.max_change, for an update without first order: its noise walks predictions away that gain nothing
SCORES_ALONE = 1 / 3
AUTO = 1.0  # of train.max_change, by which an update of learning_rate: auto changes predictions at the warm-up's end
OPTIMIZERS: dict[str, Callable[[], Any]] = {"Adam8bit": _adam8bit}  # beside the classes of torch.optim
_UNFIT = {"Optimizer", "LBFGS", "SparseAdam", "Muon"}  # of those: no optimizer, or not of a dense vector


def optimizer_of(theta: torch.nn.Parameter, train: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer, which goes downhill, at a rate that each update sets.

    Raises UserError if there is none or it does not take an option.
    """
    name, classes = train.optimizer, {name for name, kind in vars(torch.optim).items() if inspect.isclass(kind)}
    if name not in OPTIMIZERS and name not in classes - _UNFIT:
        raise UserError(f"train.optimizer is {name!r}; allowed: {', '.join(sorted({*classes, *OPTIMIZERS} - _UNFIT))}")
    kind = OPTIMIZERS[name]() if name in OPTIMIZERS else getattr(torch.optim, name)
    takes = inspect.signature(kind).parameters.keys() - {"params", "maximize"}
    keys = {"lr": 1.0, "betas": train.betas, "weight_decay": train.weight_decay}
    for key in ("betas", "weight_decay"):
        if key not in takes and keys.pop(key) != TrainConfig.model_fields[key].default:
            raise UserError(f"train.{key} is set, but {name} has no {key}; leave it out")
    wrong, allowed = sorted(train.optimizer_options.keys() - (takes - keys.keys())), sorted(takes - keys.keys())
    if wrong:
        raise UserError(
            f"train.optimizer_options has {', '.join(wrong)}; allowed for {name}: {', '.join(allowed)}; learning rate, "
            "betas and weight decay are keys of train"
        )
    try:
        optimizer: torch.optim.Optimizer = kind([theta], **keys, **train.optimizer_options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"train.optimizer_options do not suit {name}: {error}; change or leave out the value"
        ) from error
    return optimizer


def check_optimizer(train: TrainConfig) -> None:
    """Raise UserError if the recipe's optimizer cannot be, before a run begins."""
    optimizer_of(torch.nn.Parameter(torch.zeros(1)), train)


def adaptive_of(parameters: int, estimator: EstimatorConfig) -> Adaptive:
    """The statistics that a recipe's estimator keeps."""
    zeroth, sub_chain, surrogate = estimator.zeroth_order, estimator.sub_chain, estimator.surrogate
    gate: dict[str, Any] = {} if surrogate is None else {"threshold": surrogate.threshold, "window": surrogate.window}
    return Adaptive(
        parameters,
        zeroth.scale,
        guided=zeroth.directions == "guided",
        components=zeroth.components,
        weights={"half_order": estimator.half_order.weight, "zeroth_order": zeroth.weight},
        averaging=estimator.weight_averaging,
        smoothing=estimator.smoothing,
        importance=sub_chain.place == "importance",
        running=estimator.half_order.baseline == "running",
        control_variate=0.0 if surrogate is None else surrogate.coefficient,
        **gate,
    )


@dataclass(frozen=True)
class Sampling:
    """The theta that an update's chains are drawn at, and all else that decides its plan beside the seed."""

    theta: Tensor  # [P] on the CPU
    position_weights: Sequence[float] | None  # [T] law of a sub-chain's place
    control_variate: float  # the surrogate's coefficient
    trusted: tuple[int, ...]  # heads of an online surrogate


class TrainState:
    """State of a run; `update` is an optimizer step on the weighted sum of the terms, upwards.

    An update's learning rate follows from its number, train.iterations and the steps back before it, so a run that is
    resumed goes on exactly; with more iterations than it was begun with, it goes on along the longer schedule.
    """

    def __init__(
        self,
        theta: Tensor,  # [P]
        train: TrainConfig,
        estimator: EstimatorConfig,
        guards: GuardsConfig | None = None,  # None: theta is neither averaged nor steps back
    ):
        self.step = 0  # updates done
        self.initial_theta = theta.clone()
        self.theta = torch.nn.Parameter(theta.clone())
        self.train = train
        # What the schedule starts from; None until it is measured, where the recipe says auto
        self.rate = None if train.learning_rate == "auto" else train.learning_rate
        self.optimizer = optimizer_of(self.theta, train)
        self.adaptive = adaptive_of(len(theta), estimator)
        self.sizes = Sizes(own_norms=train.own_norms, clip=train.clip_update)
        self.averaging = guards.ema if guards else None
        self.average = self.initial_theta if self.averaging else None  # moving average of theta
        # train.ahead: what the update before sampled by, as the next one's chains are; and these, on their way
        self.sampling: Sampling | None = None
        self.pending: RolloutBatch | None = None  # in no checkpoint: they can be asked for again
        self.step_back = StepBack(guards.step_back, self.initial_theta) if guards and guards.step_back else None

    @property
    def theta_to_save(self) -> Tensor:  # [P]
        """The theta that is evaluated and saved: theta itself, or its moving average."""
        return self.theta.detach() if self.average is None else self.average

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        assert self.rate is not None, "train.learning_rate: auto was not measured; see train/learning_rate.py"
        rate = self.rate * self._scheduled
        warm = min(1.0, (self.step + 1) / self.train.warmup) if self.train.warmup else 1.0
        return rate * warm * (self.step_back.cut if self.step_back else 1.0)

    @property
    def _scheduled(self) -> float:
        """The schedule's factor of the next update's rate."""
        return SCHEDULES[self.train.schedule](self.step / self.train.iterations, self.train.schedule_final)

    def propose(self, steps: int) -> Proposal:
        """Choices for the next update; directions may also follow the optimizer's momentum and theta's way so far."""
        memory = self.optimizer.state[self.theta]
        momentum = memory.get("exp_avg", memory.get("momentum_buffer"))  # None while no update had a term
        return self.adaptive.propose(steps, [momentum, self.theta.detach() - self.initial_theta])

    def update(
        self,
        estimate: GradientEstimate,
        weights: Mapping[str, float],
        change: Callable[[Tensor, Tensor], float] | None = None,
    ) -> float:
        """Take one optimizer step and return the gradient's norm before clipping. Raises UserError if not finite.

        `change` says by how much predictions differ between two thetas [P]: a step that changes them by more than
        train.max_change allows is shortened. Without a term (a plan of nothing but a surrogate that is not trusted)
        theta stays as it is.
        """
        if not estimate.terms:
            self.step += 1
            return 0.0
        self._check(estimate)
        self.theta.grad = estimate.total(weights).neg_()
        norm = float(self.theta.grad.norm())
        if self.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([self.theta], self.train.max_grad_norm)
        longest = self.train.max_grad_norm or math.inf
        self.theta.grad.mul_(self.sizes.factor(estimate.kind, min(norm, longest), len(self.theta)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        before = self.theta.detach().clone() if change else None
        self.optimizer.step()
        self.theta.grad = None  # [P], which the next update has no use for
        if change is not None and before is not None:
            part = 1.0 if "first_order" in estimate.terms else SCORES_ALONE
            self._heed(change(before, self.theta.detach()), before, part)
        self.step += 1
        self._average()
        return norm

    @torch.no_grad()
    def _heed(self, change: float, before: Tensor, part: float) -> None:
        """Shorten a step from `before` [P] that changed predictions by more than its part of what is allowed; fit auto.

        Along the warm-up such a rate moves towards the one whose updates change predictions by AUTO of what is allowed:
        by at most twice an update, since a single change is noisy. Raises UserError if predictions are not finite.
        """
        assert self.train.max_change is not None and self.rate is not None
        if not math.isfinite(change):
            raise UserError(
                f"update {self.step}: after its step the denoiser's predictions are not finite, though the gradient "
                "is; start a run of another name with a lower train.learning_rate, or with model.dtype: float32"
            )
        most = self.train.max_change * self._scheduled
        if change > part * most:
            self.theta.copy_(torch.lerp(before, self.theta.detach(), part * most / change))
        if self.train.learning_rate == "auto" and self.step < self.train.warmup and change:
            wanted = AUTO * most * (self.step + 1) / self.train.warmup
            self.rate *= math.sqrt(min(max(wanted / change, 0.25), 4.0))

    def watch(self, rewards: Tensor) -> bool:  # [B] of the update just taken, chains of a prompt together
        """Step back to the best average if they fell by more than their noise; whether that was done."""
        if self.step_back is None:
            return False
        groups = rewards.double().cpu().view(-1, self.train.chains_per_prompt)  # sums alike on whatever device
        return self._return_to(self.step_back.note_rewards(self.step, groups, self.theta_to_save))

    def watch_divergence(self, *, too_far: bool) -> bool:
        """Step back to the last average within guards.kl_stop if held-out chains went beyond; whether that was done."""
        if self.step_back is None:
            return False
        return self._return_to(self.step_back.note_divergence(self.step, self.theta_to_save, too_far=too_far))

    @torch.no_grad()
    def _return_to(self, theta: Tensor | None) -> bool:  # [P]
        if theta is None:
            return False
        self.theta.copy_(theta)
        self.average = None if self.average is None else theta.clone()
        self.optimizer.state.clear()
        self.sampling = None
        return True

    def _check(self, estimate: GradientEstimate) -> None:
        for name, term in estimate.terms.items():
            if not bool(torch.isfinite(term.gradient).all()):
                raise UserError(
                    f"update {self.step}: the {name.replace('_', '-')} gradient is not finite, though the rewards are; "
                    "start a run of another name with a lower train.learning_rate, with train.max_grad_norm, or with "
                    "model.dtype: float32"
                )

    def _average(self) -> None:
        """Follow theta, closely at first, as diffusers' EMAModel does."""
        if self.average is not None and self.averaging is not None:
            earlier = self.step - 1
            decay = min(self.averaging, (1 + earlier) / (10 + earlier)) if earlier else 0.0
            self.average = decay * self.average + (1 - decay) * self.theta.detach()

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "theta": self.theta.detach(),
            "rate": self.rate,
            "average": self.average,
            "sizes": self.sizes.state_dict(),
            "step_back": self.step_back.state_dict() if self.step_back else None,
            "optimizer": self.optimizer.state_dict(),
            "adaptive": self.adaptive.state_dict(),
        } | ({"sampling": self.sampling and vars(self.sampling)} if self.train.ahead else {})

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.theta.copy_(saved["theta"])
        self.step, self.average = saved["step"], saved["average"]
        self.rate = saved["rate"] if self.rate is None else self.rate
        self.sizes.load_state_dict(saved["sizes"])
        if self.step_back is not None and saved["step_back"] is not None:
            self.step_back.load_state_dict(saved["step_back"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.adaptive.load_state_dict(saved["adaptive"])
        if self.train.ahead and saved["sampling"] is not None:
            self.sampling = Sampling(**saved["sampling"] | {"theta": saved["sampling"]["theta"].cpu()})
