"""What changes from update to update: theta, the optimizer, and the statistics that weigh and guide the terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlr_ray.config import EstimatorConfig, TrainConfig
from rlr_ray.core.agreement import Moments, correlation_and_slope, moments
from rlr_ray.core.gradient import GradientEstimate
from rlr_ray.core.place import softmax_of_norms
from rlr_ray.core.plan import Plan
from rlr_ray.core.terms import TermEstimate, mse_weight
from rlr_ray.core.zeroth_order import Directions, orthonormal_span
from rlr_ray.errors import UserError

_STATISTICS = ("step", "signals", "variances", "guides", "place_norms", "agreement")


class TrainState:
    """One run's state; `update` is one step of AdamW on the weighted sum of the terms, upwards."""

    def __init__(self, theta: Tensor, train: TrainConfig, estimator: EstimatorConfig):
        self.step = 0  # updates done
        self.initial_theta = theta.clone()
        self.theta = torch.nn.Parameter(theta.clone())
        self.train, self.estimator = train, estimator
        self.optimizer = torch.optim.AdamW(
            [self.theta], train.learning_rate, betas=train.betas, weight_decay=train.weight_decay, maximize=True
        )
        self.signals: dict[str, float] = {}  # smoothed squared norm of each term's expectation
        self.variances: dict[str, float] = {}  # smoothed variance of each term
        self.guides: dict[str, Tensor] = {}  # smoothed first-order and half-order gradients [P]
        self.place_norms: dict[int, float] = {}  # first step of a sub-chain -> smoothed norm of its gradient
        self.agreement: list[Moments] = []  # of surrogate and reward in the last updates

    def directions(self) -> Directions:
        """Where this update's perturbations are drawn. Guided ones lie in the span of what earlier updates left:

        the smoothed first-order gradient, Adam's first moment, the way come so far, the smoothed half-order gradient.
        Before the first update there is none, and directions are isotropic.
        """
        zeroth = self.estimator.zeroth_order
        basis = None
        if zeroth.directions == "guided" and self.step:
            moment = self.optimizer.state[self.theta].get("exp_avg")  # None while no update had a term
            way = self.theta.detach() - self.initial_theta
            guides = [self.guides.get("first_order"), moment, way, self.guides.get("half_order")]
            basis = orthonormal_span([guide.cpu() for guide in guides if guide is not None])
        return Directions(len(self.theta), zeroth.scale, basis)

    def place_weights(self, steps: int) -> list[float] | None:  # [T]
        """The law of the next sub-chain's first step; None: uniform."""
        sub_chain = self.estimator.sub_chain
        if sub_chain.place != "importance":
            return None
        return softmax_of_norms([self.place_norms.get(k) for k in range(steps)], sub_chain.temperature)

    def note_place(self, plan: Plan, estimate: GradientEstimate) -> None:
        """Remember the norm of the half-order gradient at the place that the plan drew."""
        if self.estimator.sub_chain.place == "importance" and self.estimator.rest != "half_order":
            start, norm = plan.sub_chains[0].start, float(estimate.terms["half_order"].gradient.norm())
            self.place_norms[start] = self._smooth(self.place_norms.get(start, norm), norm)

    def coefficient(self) -> float:
        """The surrogate's share c of the next update's reward, 0 for none.

        From earlier updates' chains only: a c that was fitted to the chains it is used on would bias the sum.
        """
        surrogate = self.estimator.surrogate
        if surrogate is None:
            return 0.0
        if surrogate.coefficient != "auto":
            return surrogate.coefficient
        correlation, slope = correlation_and_slope(self.agreement)
        return slope if correlation >= surrogate.threshold else 0.0

    def note_agreement(self, scores: Tensor, rewards: Tensor, groups: Tensor) -> float:
        """Remember how the surrogate's scores [B] of an update's chains, not yet learned from, follow the rewards.

        Returns their correlation.
        """
        assert self.estimator.surrogate is not None
        measured = moments(scores, rewards, groups)
        self.agreement = [*self.agreement, measured][-self.estimator.surrogate.window :]
        return correlation_and_slope([measured])[0]

    def weights(self, terms: Mapping[str, TermEstimate], *, residual: bool = False) -> dict[str, float]:
        """Each term's factor: 1 for first order, the configured or the least-mean-squared-error one for the others.

        What a term's signal and noise were when it carried the whole reward says nothing of the `residual`.
        """
        stated = {"half_order": self.estimator.half_order.weight, "zeroth_order": self.estimator.zeroth_order.weight}
        weights = {}
        for name, term in terms.items():
            key = f"{name}_of_residual" if residual else name
            self.signals[key] = self._smooth(self.signals.get(key, 0.0), term.signal)
            self.variances[key] = self._smooth(self.variances.get(key, 0.0), term.variance)
            weights[name] = self._weight(key, stated.get(name, 1.0))
        return weights

    def _weight(self, key: str, stated: float | str) -> float:
        if isinstance(stated, str):
            return mse_weight(self.signals[key], self.variances[key], self.estimator.weight_averaging)
        return stated

    def _smooth(self, old: Any, new: Any) -> Any:
        return self.estimator.smoothing * old + (1 - self.estimator.smoothing) * new

    def update(self, estimate: GradientEstimate, weights: Mapping[str, float]) -> float:
        """Take one optimizer step and return the gradient's norm before clipping. Raises UserError if not finite.

        Without a term (a plan of nothing but a surrogate that is not trusted) theta stays as it is.
        """
        if not estimate.terms:
            self.step += 1
            return 0.0
        gradient = estimate.total(weights)
        for name, term in estimate.terms.items():
            if not bool(torch.isfinite(term.gradient).all()):
                raise UserError(
                    f"update {self.step}: the {name.replace('_', '-')} gradient is not finite, though the rewards are; "
                    "start a run of another name with a lower train.learning_rate, with train.max_grad_norm, or with "
                    "model.dtype: float32"
                )
            if name in ("first_order", "half_order"):
                self.guides[name] = self._smooth(self.guides.get(name, 0.0), term.gradient)
        self.theta.grad = gradient
        norm = float(gradient.norm())
        if self.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([self.theta], self.train.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {
            "theta": self.theta.detach(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in _STATISTICS},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        with torch.no_grad():
            self.theta.copy_(saved["theta"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name in _STATISTICS:
            setattr(self, name, saved[name])
