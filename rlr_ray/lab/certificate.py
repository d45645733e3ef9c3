"""The unbiasedness certificate: every kind of plan on the toy chain, each term alone and their sum.

A z-score is the mean difference from the exact gradient on the same chains over its standard error; the largest along
the exact gradient and along 20 random directions must stay below 3.5 for every plan that claims to be unbiased. One
that does not is shown by the cosine and length of its expectation beside the exact gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlr_ray.core.first_order import step_gradients
from rlr_ray.core.sampler import Objective
from rlr_ray.lab.agreement import Agreement, agreement
from rlr_ray.lab.measure import Samples, sample, summarise
from rlr_ray.lab.toy import PARAMETERS, toy_chains, toy_reward, toy_sampler, toy_theta
from rlr_ray.lab.toy_cases import CHAINS, Case

LIMIT = 3.5  # one score in a hundred exceeds it by chance; seeds are fixed, so the default's do not
SURELY_SEEN = 5.0  # standard errors: a bias of so many exceeds the limit in 93 % of seeds


@dataclass(frozen=True)
class Certified:
    """Scores of a plan. `claims` says what its expectation is held against."""

    name: str
    plan: str
    claims: str
    z: dict[str, float]  # of each term against its own part, and of the sum
    relative_bias: float
    relative_bias_se: float
    seen: float  # relative bias along the gradient that would be seen
    agreement: Agreement  # with the exact gradient
    variance: float
    cost: float
    biased: bool  # claims nothing
    ok: bool  # True also for plans that claim nothing


class Truth:
    """The exact gradient of each batch's chains by step, computed once for all plans."""

    def __init__(self, batches: int):
        self.batches = batches
        self.known: dict[Objective, Tensor] = {}

    def steps(self, objective: Objective = toy_reward) -> Tensor:  # [n, T, P]
        """By backpropagation through the whole chain."""
        if objective not in self.known:
            sampler, theta, rows = toy_sampler(), toy_theta(), []
            for number in range(self.batches):
                start = toy_chains(CHAINS, number).start
                trajectory = sampler.sample(theta, *start, stop=0)
                rows.append(step_gradients(sampler, theta, trajectory, objective)[0])
            self.known[objective] = torch.stack(rows)
        return self.known[objective]


def certify(case: Case, truth: Truth) -> Certified:
    """Compare a plan's terms and their sum with the exact gradient on the same chains."""
    candidate, steps = case.candidate, truth.steps()
    samples = sample(case.subject, candidate, truth.batches)
    apart = _differences(case, samples, _first_and_rest(case, truth))
    apart["sum"] = torch.stack(list(apart.values())).sum(0)
    reference = steps.sum(1)
    z = {name: worst_z(difference, reference.mean(0)) for name, difference in apart.items()}
    measured = summarise(candidate, samples, reference, CHAINS)
    return Certified(
        candidate.name,
        str(candidate.shape),
        case.claims,
        z,
        measured.relative_bias,
        measured.relative_bias_se,
        SURELY_SEEN * measured.relative_bias_se,
        agreement(torch.stack(list(samples.terms.values())).sum(0), reference),
        measured.variance,
        measured.cost,
        case.claims_nothing,
        case.claims_nothing or all(value <= LIMIT for value in z.values()),
    )


def _first_and_rest(case: Case, truth: Truth) -> tuple[Tensor, Tensor]:  # 2 [n, T, P]
    """The exact gradient of each step that first order estimates, and that the other orders estimate."""
    steps, start = truth.steps(), case.candidate.shape.residual_from
    if case.carried is None or start is None:
        return steps, steps
    carried = truth.steps(case.carried)
    return carried, torch.cat([steps[:, :start], (steps - carried)[:, start:]], dim=1)


def _differences(case: Case, samples: Samples, exact: tuple[Tensor, Tensor]) -> dict[str, Tensor]:  # each [n, P]
    """Each term minus its own part of the exact gradient, batch by batch."""
    candidate = case.candidate
    basis = candidate.directions.basis if candidate.directions is not None else None
    projection = torch.eye(PARAMETERS, dtype=torch.float64) if basis is None else basis.T @ basis
    every = replace(candidate, shape=replace(candidate.shape, branch_steps=None))  # whatever steps are drawn
    parts: dict[str, list[Tensor]] = {"first_order": [], "half_order": [], "zeroth_order": []}
    for number, (plan, first, rest) in enumerate(zip(samples.plans, *exact, strict=True)):
        owned = range(plan.steps) if plan.step_weights else plan.first_order  # roulette: all of them on average
        parts["first_order"].append(first[list(owned)].sum(0))
        branched = every.plan(number).sub_chains
        parts["half_order"].append(rest[[k for sub_chain in branched for k in sub_chain]].sum(0))
        parts["zeroth_order"].append(rest[list(plan.zeroth_order)].sum(0) @ projection)
    return {name: rows - torch.stack(parts[name]) for name, rows in samples.terms.items()}


def worst_z(differences: Tensor, g: Tensor, random_directions: int = 20) -> float:  # [n, P], [P]
    """Largest |z| of the mean difference along g and along random directions; 0 for differences of rounding errors."""
    source = torch.Generator().manual_seed(99)
    random = torch.randn(random_directions, len(g), generator=source, dtype=g.dtype)
    along = differences @ torch.cat([g[None], random]).T  # [n, 21]
    if float(differences.abs().max()) <= 1e-9 * float(g.norm()):
        return 0.0
    z = along.mean(0) / (along.std(0) / len(along) ** 0.5)
    return float(z.abs().max())
