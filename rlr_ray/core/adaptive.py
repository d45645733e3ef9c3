"""Running statistics of the estimator: they choose where the next update perturbs and how its terms are weighed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from rlr_ray.core.gradient import GradientEstimate
from rlr_ray.core.plan import Plan
from rlr_ray.core.positions import softmax_of_norms
from rlr_ray.core.trust import RunningMeans
from rlr_ray.core.weighting import Moments, TermEstimate, correlation_and_slope, moments, mse_weight
from rlr_ray.core.zeroth_order import Directions, orthonormal_span, principal_span

_ROWS_PER_UPDATE = 4  # half-order gradients kept of an update: means over quarters of its chunks
_ROWS_PER_COMPONENT = 4  # and of all updates: so many newest for each principal component
_SPIKE = 3.0  # times its running norm, beyond which a term's norm counts for no more
_STATISTICS = (
    "signals",
    "norms",
    "guides",
    "guided_updates",
    "half_order_rows",
    "position_norms",
    "agreement",
    "typical",
)


@dataclass(frozen=True)
class Proposal:
    """Choices for one update, made from earlier updates' chains alone: its own chains would bias the estimate."""

    directions: Directions
    position_weights: list[float] | None  # [T] law of the sub-chain's first step; None: uniform
    control_variate: float  # the surrogate's coefficient c; 0: not trusted
    half_order_rows: int  # means over parts of its chunks that later directions may span


@dataclass
class Adaptive:
    """The estimator's running statistics: `propose`, then `observe` what came of it, update by update."""

    parameters: int  # P
    scale: float  # of perturbations, see `Directions`
    guided: bool = False  # directions in a span that earlier updates left; else isotropic
    components: int = 8  # principal components of half order's gradients in it, at most
    weights: Mapping[str, float | Literal["auto", "even"]] = field(default_factory=dict)  # of the terms; 1 if not given
    averaging: float = 8.0  # m of the auto weights
    smoothing: float = 0.9
    importance: bool = False  # a sub-chain's position by half order's norm there; else uniform
    control_variate: float | Literal["auto"] = 0.0
    threshold: float = 0.3  # correlation below which an auto control variate is 0
    window: int = 4  # updates that give correlation and slope
    running: bool = False  # half order's baseline is the mean of a prompt's chains in earlier updates

    def __post_init__(self) -> None:
        self.signals: dict[str, float] = {}  # each term's smoothed signal, in units of its variance
        self.norms: dict[str, float] = {}  # each term's smoothed norm
        self.guides: dict[str, Tensor] = {}  # smoothed first-order and half-order gradients [P]
        self.guided_updates: dict[str, int] = {}  # in each half-order guide
        self.half_order_rows: list[Tensor] = []  # [P] on the CPU, the newest half-order gradients of parts of updates
        self.position_norms: dict[int, float] = {}  # first step of a sub-chain -> smoothed norm of its gradient
        self.agreement: list[Moments] = []  # of surrogate and reward in the last updates
        self.typical: float | None = None  # smoothed median norm of a chain's first-order gradient
        self.means = RunningMeans()  # of each prompt's rewards

    def propose(self, steps: int, others: Sequence[Tensor | None] = ()) -> Proposal:
        """The next of T `steps`; `others` [P] are further guides of directions, e.g. the optimizer's momentum."""
        weights = None
        if self.importance:
            weights = softmax_of_norms([self.position_norms.get(k) for k in range(steps)])
        rows = _ROWS_PER_UPDATE if self.guided else 0
        return Proposal(self._directions(others), weights, self._control_variate(), rows)

    def baseline(self, prompts: Sequence[str], parts: int) -> Tensor | None:  # [B] -> [m, B]
        """Running mean of each of m `parts` of the reward over earlier updates' chains; None where none is kept.

        It does not depend on an update's own chains, so that it leaves half order unbiased.
        """
        if not self.running or not self.means.means:
            return None
        return self.means.before(prompts, parts)[0]

    def observe_rewards(self, prompts: Sequence[str], parts: Tensor) -> None:  # [B], [m, B]
        """Learn what chains of these prompts get."""
        if self.running:
            self.means.add(prompts, parts.detach().cpu())

    def observe(self, plan: Plan, estimate: GradientEstimate) -> dict[str, float]:
        """Learn from an update's estimate under its first chunk's plan; the terms' weights."""
        weights = self._weights(estimate, residual=plan.residual)
        first, half = (estimate.terms.get(name) for name in ("first_order", "half_order"))
        if first is not None:
            self.guides["first_order"] = self._smooth(self.guides.get("first_order", 0.0), first.gradient)
        if half is not None and self.importance and len(plan.sub_chains) == 1:
            start, norm = plan.sub_chains[0].start, float(half.gradient.norm())
            self.position_norms[start] = self._smooth(self.position_norms.get(start, norm), norm)
        if estimate.median is not None:
            self.typical = self._smooth(self.typical or estimate.median, estimate.median)
        if estimate.half_order_rows:
            newest = [*self.half_order_rows, *estimate.half_order_rows]
            self.half_order_rows = newest[-_ROWS_PER_COMPONENT * self.components :]
        return weights

    def observe_surrogate(self, scores: Tensor, rewards: Tensor, groups: Tensor) -> float:
        """Learn how the surrogate's scores [B] of an update's chains follow the rewards; their correlation.

        The surrogate must not have learned from these chains yet.
        """
        measured = moments(scores, rewards, groups)
        self.agreement = [*self.agreement, measured][-self.window :]
        return correlation_and_slope([measured])[0]

    def _directions(self, others: Sequence[Tensor | None]) -> Directions:
        """Guided ones lie in the span of half order's principal components or, without those, of the guides.

        Before the first update there is none, and directions are isotropic.
        """
        basis = None
        if self.guided and self.half_order_rows:
            basis = principal_span(self.half_order_rows, self.components)
        elif self.guided:
            guides = [self.guides.get("first_order"), *others, self.guides.get("half_order")]
            basis = orthonormal_span([guide.cpu() for guide in guides if guide is not None])
        return Directions(self.parameters, self.scale, basis)

    def _control_variate(self) -> float:
        if isinstance(self.control_variate, float):
            return self.control_variate
        correlation, slope = correlation_and_slope(self.agreement)
        return slope if correlation >= self.threshold else 0.0

    def _weights(self, estimate: GradientEstimate, *, residual: bool) -> dict[str, float]:
        """Each term's factor: stated, of least mean squared error (auto), or for first order's length (even).

        A signal is smoothed in units of its update's variance, which changes by orders of magnitude between updates
        (the first directions are isotropic): otherwise a single noisy update decides for dozens. It is smoothed from 0:
        a term earns its weight. What it was when the term carried the whole reward says nothing of the `residual`.
        """
        weights, lengths = {}, self._lengths(estimate)
        for name, term in estimate.terms.items():
            key, stated = f"{name}_of_residual" if residual else name, self.weights.get(name, 1.0)
            signal = self._half_order_signal(key, term) if name == "half_order" else term.signal
            ratio = signal / term.variance if term.variance > 0 else 0.0
            self.signals[key] = self._smooth(self.signals.get(key, 0.0), ratio)
            fitting = {"auto": mse_weight(self.signals[key], self.averaging), "even": lengths[name]}
            weights[name] = fitting[stated] if isinstance(stated, str) else stated
        return weights

    def _lengths(self, estimate: GradientEstimate) -> dict[str, float]:
        """Factors that make each term as long as first order on average over updates; 1 where either length is 0.

        A term whose expectation is not its part of the gradient (the forward term) has no length of its own. Where
        terms carry different rewards, a length is one by the spread of these: rewards keep their weights.
        """
        norms = {}
        for name, term in estimate.terms.items():
            key = f"{name} of a surrogate" if estimate.of_surrogate else name
            norm = float(term.gradient.norm()) / (estimate.spreads.get(name) or 1.0)
            before = self.norms.get(key) or norm
            norms[name] = self.norms[key] = self._smooth(before, min(norm, _SPIKE * before))
        first = norms.get("first_order", 0.0)
        return {name: first / norm if first and norm else 1.0 for name, norm in norms.items()}

    def _half_order_signal(self, key: str, term: TermEstimate) -> float:
        """Squared norm of half order's expectation: its inner product with the mean of earlier estimates.

        Its own `term.signal` has an error of about its variance, which comes from a few chunks of chains. The inner
        product's is several times less, since earlier estimates' noise is averaged and independent.
        """
        updates, guide = self.guided_updates.get(key, 0), self.guides.get(key)
        self.guides[key] = self._smooth(0.0 if guide is None else guide, term.gradient)
        self.guided_updates[key] = updates + 1
        return 0.0 if guide is None else float(term.gradient @ guide) / (1 - self.smoothing**updates)

    def _smooth(self, old: Any, new: Any) -> Any:
        return self.smoothing * old + (1 - self.smoothing) * new

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATISTICS} | {"means": self.means.means}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        for name in _STATISTICS:
            setattr(self, name, saved[name])
        self.means.means = saved["means"]
        self.half_order_rows = [row.cpu() for row in self.half_order_rows]  # where directions are made
