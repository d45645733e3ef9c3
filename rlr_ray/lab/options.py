"""The planner's choice and the plans that it is of, each with what decides: noise scale, cost, cosine, memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.lab.agreement import Agreement
from rlr_ray.lab.cost import Probe
from rlr_ray.lab.judge import LEAST_COSINE, sure_cosine
from rlr_ray.lab.plans import Estimator
from rlr_ray.lab.reference import Spread


@dataclass(frozen=True)
class PlanStatistics:
    """A plan's statistics, whatever the budget; each with its standard error."""

    name: str
    keys: Estimator
    variance: Spread  # per chain
    signal: float  # |E estimate|^2
    bias: Spread = (0.0, 0.0)  # relative, along the gradient
    agreement: Agreement | None = None  # with an unbiased reference; None: not measured, or unbiased
    beside_clipped: Agreement | None = None  # with clipped backpropagation, of what learns from rewards alone
    shape: PlanShape | None = None  # of a phase of the plan; None: it has one


@dataclass(frozen=True)
class Option:
    """A plan with its cost for this recipe."""

    name: str
    keys: Estimator
    plan: str
    unbiased: bool
    variance: float  # per chain
    variance_se: float
    relative_bias: float
    relative_bias_se: float
    signal: float  # |E estimate|^2
    agreement: Agreement | None  # of a biased plan with an unbiased reference, if measured
    beside_clipped: Agreement | None  # with clipped backpropagation
    cost: float  # denoiser forwards a chain, a backward as two
    peak_gib: float  # predicted
    seconds: float  # an update in one process, predicted
    fits: bool

    @property
    def noise_scale(self) -> float:
        """Chains whose mean has as much noise as signal."""
        return self.variance / self.signal

    @property
    def cosine(self) -> float:
        """Cosine of the expectation with the gradient, a standard error less than measured; 1 if unbiased."""
        return 1.0 if self.unbiased else 0.0 if self.agreement is None else sure_cosine(self.agreement)

    @property
    def can_be_chosen(self) -> bool:
        return self.fits and self.cosine > LEAST_COSINE

    @property
    def price(self) -> float:
        """Denoiser forwards to equal alignment with the gradient: noise scale x cost / cosine^2."""
        return self.noise_scale * self.cost / self.cosine**2 if self.cosine else math.inf


@dataclass(frozen=True)
class PaperRule:
    """The paper's closed form with its inputs as measured here."""

    length: int  # h*
    memory_half_gib: float  # B_h, of one more step in a sub-chain
    memory_zeroth_gib: float  # B_z, of a rollout, per step
    variance_half: float  # V_h, mean over steps, per chain
    variance_zeroth: float  # V_z, the same for isotropic perturbations, one pair a chain


@dataclass(frozen=True)
class Choice:
    """The best plan, and all that were looked at."""

    budget_gib: float | None
    best: Option
    options: list[Option]
    rule: PaperRule | None
    batches: int
    reference: str  # what biased plans were held against
    probe: Probe
    measured_gib: float  # peak of a real update under the best plan
    seconds: float  # that measuring took

    @property
    def error(self) -> float:
        """Error of the predicted peak, relative to the measured one."""
        return self.best.peak_gib / self.measured_gib - 1
