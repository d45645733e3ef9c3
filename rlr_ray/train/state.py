"""What changes from update to update: theta, the optimizer, and the statistics that weigh and guide the terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlr_ray.config.estimator import EstimatorConfig
from rlr_ray.config.run import TrainConfig
from rlr_ray.core.gradient import GradientEstimate
from rlr_ray.core.plan import Plan
from rlr_ray.core.positions import softmax_of_norms
from rlr_ray.core.weighting import Moments, TermEstimate, correlation_and_slope, moments, mse_weight
from rlr_ray.core.zeroth_order import Directions, orthonormal_span, principal_span
from rlr_ray.errors import UserError

_STATISTICS = ("step", "signals", "guides", "guided", "half_order_rows", "place_norms", "agreement", "average")
_ROWS_PER_UPDATE = 4  # half-order gradients kept of an update: means over quarters of its chunks
_ROWS_PER_COMPONENT = 4  # and of all updates: so many newest for each principal component


class TrainState:
    """One run's state; `update` is one step of AdamW on the weighted sum of the terms, upwards."""

    def __init__(self, theta: Tensor, train: TrainConfig, estimator: EstimatorConfig, averaging: float | None = None):
        self.step = 0  # updates done
        self.initial_theta = theta.clone()
        self.theta = torch.nn.Parameter(theta.clone())
        self.train, self.estimator = train, estimator
        self.optimizer = torch.optim.AdamW(
            [self.theta], train.learning_rate, betas=train.betas, weight_decay=train.weight_decay, maximize=True
        )
        self.signals: dict[str, float] = {}  # each term's smoothed signal, in units of its variance
        self.guides: dict[str, Tensor] = {}  # smoothed first-order and half-order gradients [P]
        self.guided: dict[str, int] = {}  # updates in each half-order guide
        self.half_order_rows: list[Tensor] = []  # the newest half-order gradients [P], of parts of updates
        self.place_norms: dict[int, float] = {}  # first step of a sub-chain -> smoothed norm of its gradient
        self.agreement: list[Moments] = []  # of surrogate and reward in the last updates
        self.average = self.initial_theta if averaging else None  # moving average of theta
        self.averaging = averaging

    @property
    def kept(self) -> Tensor:  # [P]
        """What is evaluated and left: theta, or its moving average."""
        return self.theta.detach() if self.average is None else self.average

    def _average(self) -> None:
        """Follow theta, closely at first, as diffusers' EMAModel does."""
        if self.average is not None and self.averaging is not None:
            earlier = self.step - 1
            decay = min(self.averaging, (1 + earlier) / (10 + earlier)) if earlier else 0.0
            self.average = decay * self.average + (1 - decay) * self.theta.detach()

    def directions(self) -> Directions:
        """Where this update's perturbations are drawn. Guided ones lie in a span that earlier updates left:

        the principal components of their half-order gradients, or, without half order, the smoothed first-order
        gradient, Adam's first moment and the way come so far. Before the first update there is none, and directions
        are isotropic.
        """
        zeroth = self.estimator.zeroth_order
        basis = None
        if zeroth.directions == "guided" and self.half_order_rows:
            basis = principal_span(self.half_order_rows, zeroth.components)
        elif zeroth.directions == "guided" and self.step:
            moment = self.optimizer.state[self.theta].get("exp_avg")  # None while no update had a term
            way = self.theta.detach() - self.initial_theta
            guides = [self.guides.get("first_order"), moment, way, self.guides.get("half_order")]
            basis = orthonormal_span([guide.cpu() for guide in guides if guide is not None])
        return Directions(len(self.theta), zeroth.scale, basis)

    @property
    def rows_wanted(self) -> int:
        """How many half-order gradients of an update, means over parts of its chunks, later directions may span."""
        zeroth = self.estimator.zeroth_order
        return _ROWS_PER_UPDATE if zeroth.directions == "guided" else 0

    def place_weights(self, steps: int) -> list[float] | None:  # [T]
        """The law of the next sub-chain's first step; None: uniform."""
        sub_chain = self.estimator.sub_chain
        if sub_chain.place != "importance":
            return None
        return softmax_of_norms([self.place_norms.get(k) for k in range(steps)])

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

        A signal is smoothed in units of its update's variance, which changes by orders of magnitude between updates
        (the first directions are isotropic): otherwise a single noisy update decides for dozens. It is smoothed from 0:
        a term earns its weight. What it was when the term carried the whole reward says nothing of the `residual`.
        """
        stated = {"half_order": self.estimator.half_order.weight, "zeroth_order": self.estimator.zeroth_order.weight}
        weights = {}
        for name, term in terms.items():
            key = f"{name}_of_residual" if residual else name
            signal = self._half_order_signal(key, term) if name == "half_order" else term.signal
            ratio = signal / term.variance if term.variance > 0 else 0.0
            self.signals[key] = self._smooth(self.signals.get(key, 0.0), ratio)
            weights[name] = self._weight(key, stated.get(name, 1.0))
        return weights

    def _half_order_signal(self, key: str, term: TermEstimate) -> float:
        """Squared norm of half order's expectation: its inner product with the mean of earlier estimates.

        Its own `term.signal` has an error of about its variance, which comes from a few chunks of chains. The inner
        product's is several times less, since earlier estimates' noise is averaged and independent.
        """
        updates, guide = self.guided.get(key, 0), self.guides.get(key)
        self.guides[key] = self._smooth(0.0 if guide is None else guide, term.gradient)
        self.guided[key] = updates + 1
        return 0.0 if guide is None else float(term.gradient @ guide) / (1 - self.estimator.smoothing**updates)

    def _weight(self, key: str, stated: float | str) -> float:
        if isinstance(stated, str):
            return mse_weight(self.signals[key], self.estimator.weight_averaging)
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
            if name == "first_order":
                self.guides[name] = self._smooth(self.guides.get(name, 0.0), term.gradient)
        if "zeroth_order" in estimate.terms and estimate.half_order_rows:
            newest = [*self.half_order_rows, *estimate.half_order_rows]
            self.half_order_rows = newest[-_ROWS_PER_COMPONENT * self.estimator.zeroth_order.components :]
        self.theta.grad = gradient
        norm = float(gradient.norm())
        if self.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([self.theta], self.train.max_grad_norm)
        self.optimizer.step()
        self.step += 1
        self._average()
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
        self.half_order_rows = [row.cpu() for row in self.half_order_rows]  # where directions are made
