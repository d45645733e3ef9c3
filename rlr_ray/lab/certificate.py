"""The unbiasedness certificate: every kind of plan on the toy chain, each term alone and their sum.

A z-score is the mean difference from the exact gradient on the same chains over its standard error; the largest along
the exact gradient and along 20 random directions must stay below 3.5 for every plan that claims to be unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlr_ray.core.first_order import step_gradients
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.sampler import Chains, Objective
from rlr_ray.core.zeroth_order import Directions, orthonormal_span
from rlr_ray.lab.measure import Candidate, Samples, Subject, sample, summarise
from rlr_ray.lab.toy import PARAMETERS, STEPS, toy_chains, toy_reward, toy_sampler, toy_theta

LIMIT = 3.5  # one score in a hundred exceeds it by chance; seeds are fixed, so the default's do not
SCALE = 0.003  # of perturbations: their smoothing error is below 0.2 %
CHAINS = 256  # in a chunk


@dataclass(frozen=True)
class Certified:
    """One plan's scores. `claims` says what its expectation is held against."""

    name: str
    plan: str
    claims: str
    z: dict[str, float]  # of each term against its own part, and of the sum
    relative_bias: float
    relative_bias_se: float
    variance: float
    cost: float
    biased: bool  # claims nothing
    ok: bool  # True also for plans that claim nothing


def toy_subject() -> Subject:
    """The toy chain with a baseline over groups of 4."""
    groups = torch.arange(CHAINS) // 4
    return Subject(toy_sampler(), toy_theta(), lambda c: [toy_chains(CHAINS, c)], groups)


def toy_surrogate(latent: Tensor) -> Tensor:  # [B]
    """Like the toy's reward, but not it; already multiplied by its coefficient, 0.7."""
    x, y = latent.flatten(1).unbind(1)
    return 0.7 * (torch.sin(1.2 * x) + 0.6 * y)


def _guides() -> Tensor:  # [3, P]
    """A span that no chain of the measurement helped to choose."""
    vectors = torch.randn(3, PARAMETERS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    basis = orthonormal_span(list(vectors))
    assert basis is not None
    return basis


def toy_candidates() -> list[Candidate]:
    """At least one plan of every kind; the biased ones show what the certificate would find."""
    isotropic, guided = Directions(PARAMETERS, SCALE), Directions(PARAMETERS, SCALE, _guides())
    weights = (0.4, 0.1, 0.2, 0.1, 0.1, 0.1)
    reinforce: dict[str, Any] = {"rest": "half_order"}

    def plan(name: str, *shape: Any, directions: Directions = isotropic, **options: Any) -> Candidate:
        drawn = PlanShape(STEPS, *shape, **options)
        biased = drawn.biased or directions.basis is not None
        return Candidate(name, drawn, directions, position_weights=weights, biased=biased)

    return [
        plan("full_bp", STEPS, 0, rest="none"),
        plan("russian-roulette", 1, 0, rest="none", truncation="russian_roulette"),
        plan("russian-roulette, at least 3", 3, 0, rest="none", truncation="russian_roulette"),
        plan("ddpo", 0, 0, **reinforce),
        plan("FO(1) + REINFORCE", 1, 0, **reinforce),
        plan("FO(3) + REINFORCE", 3, 0, **reinforce),
        *(plan(f"FO(1) + HO, sub-chains of {h} that cover", 1, h, "cover", rest="none") for h in (2, 3, 5)),
        plan("two sub-chains of 2 + REINFORCE", 1, 2, sub_chain_count=2, **reinforce),
        plan("a sub-chain of 2 at steps 1-3 + REINFORCE", 1, 2, (1, 3), **reinforce),
        plan("importance-sampled j, h = 2, + REINFORCE", 1, 2, "importance", **reinforce),
        plan("importance-sampled j, h = 2, + ZO", 1, 2, "importance"),
        *(plan(f"rlr-paper, h = {h}", 1, h) for h in (2, 3)),
        plan("es", 0, 0),
        plan("guided directions, h = 2", 1, 2, directions=guided),
        plan("surrogate + REINFORCE on R - cQ", STEPS, 0, residual=True, **reinforce),
        plan("surrogate + sub-chains of 2 on R - cQ", STEPS, 2, "cover", rest="none", residual=True),
        plan("surrogate + ZO on R - cQ", STEPS, 0, residual=True),
        plan("two rewards, one black-box: FO(3) + HO, h = 2 cover", 3, 2, "cover", rest="none", mixed=True),
        plan("two rewards, one black-box: FO(1) + REINFORCE", 1, 0, mixed=True, **reinforce),
        plan("alignprop, K = 1", 1, 0, rest="none"),
        plan("alignprop, K = 3", 3, 0, rest="none"),
    ]


def certify(candidate: Candidate, batches: int) -> Certified:
    """Compare a plan's terms and their sum with the exact gradient on the same chains."""
    subject = _shared(toy_subject(), candidate.shape) if candidate.shape.residual_from is not None else toy_subject()
    samples = sample(subject, candidate, batches)
    steps = torch.stack([_exact(subject, subject.batch(number)[0]) for number in range(batches)])  # [n, T, P]
    apart = _differences(candidate, samples, _first_and_rest(subject, candidate, steps))
    apart["sum"] = torch.stack(list(apart.values())).sum(0)
    reference = steps.sum(1)
    z = {name: worst_z(difference, reference.mean(0)) for name, difference in apart.items()}
    measured = summarise(candidate, samples, reference, CHAINS)
    return Certified(
        candidate.name,
        str(candidate.shape),
        "nothing" if candidate.shape.biased else "the projection on its span" if candidate.biased else "g",
        z,
        measured.relative_bias,
        measured.relative_bias_se,
        measured.variance,
        measured.cost,
        candidate.shape.biased,
        candidate.shape.biased or all(value <= LIMIT for value in z.values()),
    )


def _shared(subject: Subject, shape: PlanShape) -> Subject:
    """Chains of which first order carries a part only: a surrogate, or one of two rewards whose sum is the toy's."""

    def parts(latent: Tensor) -> Tensor:  # [2, B]
        differentiable = toy_surrogate(latent)
        return torch.stack([differentiable, (toy_reward(latent) - differentiable).detach()])

    def batch(number: int) -> list[Chains]:
        chains = subject.batch(number)[0]
        if shape.residual:
            return [replace(chains, surrogate=toy_surrogate)]
        return [replace(chains, parts=parts, black_box=(1,))]

    return replace(subject, batch=batch)


def _exact(subject: Subject, chains: Chains, objective: Objective | None = None) -> Tensor:  # [T, P]
    """Each step's part of the chunk's gradient, by backpropagation through the whole chain."""
    start = chains.start
    trajectory = subject.sampler.sample(subject.theta, *start, stop=0)
    objective = objective or chains.objective
    return step_gradients(subject.sampler, subject.theta, trajectory, objective)[0]


def _first_and_rest(subject: Subject, candidate: Candidate, steps: Tensor) -> tuple[Tensor, Tensor]:  # 2 [n, T, P]
    """What first order, and what the other orders estimate of each step."""
    start = candidate.shape.residual_from
    if start is None:
        return steps, steps
    carried = torch.stack([_exact(subject, subject.batch(c)[0], toy_surrogate) for c in range(len(steps))])
    return carried, torch.cat([steps[:, :start], (steps - carried)[:, start:]], dim=1)


def _differences(
    candidate: Candidate, samples: Samples, exact: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:  # each [n, P]
    """Each term minus its own part of the exact gradient, chunk by chunk."""
    basis = candidate.directions.basis if candidate.directions is not None else None
    projection = torch.eye(PARAMETERS, dtype=torch.float64) if basis is None else basis.T @ basis
    parts: dict[str, list[Tensor]] = {"first_order": [], "half_order": [], "zeroth_order": []}
    for plan, first, rest in zip(samples.plans, *exact, strict=True):
        owned = range(plan.steps) if plan.step_weights else plan.first_order  # roulette: all of them on average
        parts["first_order"].append(first[list(owned)].sum(0))
        parts["half_order"].append(rest[[k for sub_chain in plan.sub_chains for k in sub_chain]].sum(0))
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
