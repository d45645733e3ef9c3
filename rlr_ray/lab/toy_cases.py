"""The certificate's cases: at least one plan of every kind, on chains of the toy whose reward it shares as it should.

T steps, P trained numbers, B chains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlr_ray.core.chunk import Forms
from rlr_ray.core.forward_term import Weighting
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.sampler import Chains, Objective
from rlr_ray.core.zeroth_order import Directions, orthonormal_span
from rlr_ray.lab.measure import Candidate, Subject, estimate_batch
from rlr_ray.lab.toy import PARAMETERS, STEPS, toy_chains, toy_reward, toy_sampler, toy_theta

SCALE = 0.003  # of perturbations: their smoothing error is below 0.2 %
CHAINS = 256  # in a batch
NOT_CUT = Forms(clip=1e9)  # chains' gradients come apart, and none is clipped
REINFORCE: dict[str, Any] = {"rest": "half_order"}
ALONE: dict[str, Any] = {"rest": "none"}


@dataclass(frozen=True)
class Case:
    """A plan, the chains that it sees, and what it may claim."""

    candidate: Candidate
    subject: Subject
    carried: Objective | None = None  # [B] what first order climbs; None: the whole reward

    @property
    def claims(self) -> str:
        """The name of what its expectation is held against."""
        if self.claims_nothing:
            return "nothing"
        return "the projection on its span" if self.candidate.biased else "g"

    @property
    def claims_nothing(self) -> bool:
        """Biased by its form, not only by the span of its directions."""
        shape, forms = self.candidate.shape, self.candidate.forms
        clipped = forms.clip is not None and forms is not NOT_CUT
        return shape.biased or clipped or self.candidate.zeroth_order_clip is not None


def toy_subject(share: Callable[[Chains], Chains] = lambda chains: chains, *, group: int = 4) -> Subject:
    """The toy chain with a baseline over groups of so many chains, its reward shared between the orders."""
    groups = torch.arange(CHAINS) // group
    return Subject(toy_sampler(), toy_theta(), lambda number: [share(toy_chains(CHAINS, number))], groups)


def toy_surrogate(latent: Tensor) -> Tensor:  # [B]
    """Like the toy's reward, but not it; already multiplied by its coefficient, 0.7."""
    x, y = latent.flatten(1).unbind(1)
    return 0.7 * (torch.sin(1.2 * x) + 0.6 * y)


def _third(latent: Tensor) -> Tensor:  # [B]
    """A part of the toy's reward."""
    x, y = latent.flatten(1).unbind(1)
    return 0.3 * torch.cos(x * y) - 0.1 * x**2


def _two_rewards(chains: Chains) -> Chains:
    """Chains with two rewards whose sum is the toy's; the second is a black box."""

    def parts(latent: Tensor) -> Tensor:  # [2, B]
        differentiable = toy_surrogate(latent)
        return torch.stack([differentiable, (toy_reward(latent) - differentiable).detach()])

    return replace(chains, parts=parts, black_box=(1,))


def _three_rewards(chains: Chains) -> Chains:
    """Chains with three rewards whose sum is the toy's; of two black boxes the first has a right and trusted head."""

    def parts(latent: Tensor) -> Tensor:  # [3, B]
        first, second = toy_surrogate(latent), _third(latent).detach()
        return torch.stack([first, second, (toy_reward(latent) - first - second).detach()])

    def heads(latent: Tensor) -> Tensor:  # [2, B]
        return torch.stack([_third(latent), toy_surrogate(latent)])

    return replace(chains, parts=parts, black_box=(1, 2), heads=heads, trusted=(0,))


def _guides() -> Tensor:  # [3, P]
    """A span that no chain of the measurement helped to choose."""
    vectors = torch.randn(3, PARAMETERS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    basis = orthonormal_span(list(vectors))
    assert basis is not None
    return basis


def _forward_guide() -> Tensor:  # [1, P]
    """The direction of an earlier batch's forward term."""
    candidate = Candidate("guide", _forward())
    gradient = estimate_batch(toy_subject(group=CHAINS), candidate, 10**6).terms["half_order"].gradient
    return gradient[None] / gradient.norm()


def _forward(first_order_steps: int = 0, **options: Any) -> PlanShape:
    steps = tuple(range(STEPS))
    return PlanShape(STEPS, first_order_steps, 0, **ALONE, score="forward", draws=3, forward_steps=steps, **options)


def _case(name: str, *shape: Any, directions: Directions | None = None, **options: Any) -> Case:
    """A plan on plain chains, or on those whose reward it shares."""
    drawn = PlanShape(STEPS, *shape, **options)
    directions = directions or Directions(PARAMETERS, SCALE)
    weights = (0.4, 0.1, 0.2, 0.1, 0.1, 0.1)
    biased = drawn.biased or directions.basis is not None
    candidate = Candidate(name, drawn, directions, position_weights=weights, biased=biased)
    if drawn.residual:
        subject = toy_subject(lambda chains: replace(chains, surrogate=toy_surrogate))
        return Case(candidate, subject, toy_surrogate)
    if drawn.mixed:
        return Case(candidate, toy_subject(_two_rewards), toy_surrogate)
    return Case(candidate, toy_subject())


def toy_cases() -> list[Case]:
    """The biased ones show what the certificate would find, and how large the bias is."""
    return [*_papers(), *_branches(), *_shared(), *_apart(), *_forward_terms(), *_truncated()]


def _papers() -> list[Case]:
    """Three orders that own the steps between them."""
    guided = Directions(PARAMETERS, SCALE, _guides())
    along = Directions(PARAMETERS, SCALE, _forward_guide())
    roulette: dict[str, Any] = ALONE | {"truncation": "russian_roulette"}
    return [
        _case("full_bp", STEPS, 0, **ALONE),
        _case("russian-roulette", 1, 0, **roulette),
        _case("russian-roulette, at least 3", 3, 0, **roulette),
        _case("ddpo", 0, 0, **REINFORCE),
        _case("FO(1) + REINFORCE", 1, 0, **REINFORCE),
        _case("FO(3) + REINFORCE", 3, 0, **REINFORCE),
        *(_case(f"FO(1) + HO, sub-chains of {h} that cover", 1, h, "cover", **ALONE) for h in (2, 3, 5)),
        _case("two sub-chains of 2 + REINFORCE", 1, 2, sub_chain_count=2, **REINFORCE),
        _case("a sub-chain of 2 at steps 1-3 + REINFORCE", 1, 2, (1, 3), **REINFORCE),
        _case("importance-sampled j, h = 2, + REINFORCE", 1, 2, "importance", **REINFORCE),
        _case("importance-sampled j, h = 2, + ZO", 1, 2, "importance"),
        *(_case(f"rlr-paper, h = {h}", 1, h) for h in (2, 3)),
        _case("es", 0, 0),
        _case("guided directions, h = 2", 1, 2, directions=guided),
        _case("ZO along an earlier forward term", 0, 0, directions=along),
    ]


def _branches() -> list[Case]:
    """Half order on pairs that part at a step."""
    pairs: dict[str, Any] = {"score": "branches"}
    return [
        _case("branches", 0, 0, **REINFORCE, **pairs),
        _case("branches at 2 drawn steps", 0, 0, **REINFORCE, **pairs, branch_steps=2),
        _case("branches, sub-chains of 2 that cover", 0, 2, "cover", **ALONE, **pairs),
        _case("FO(3) + branches", 3, 0, **REINFORCE, **pairs),
        _case("FO(1) + branches, 1 of the sub-chains of 2 that cover", 1, 2, "cover", **ALONE, **pairs, branch_steps=1),
        _case("FO(1) + branches of 2 + ZO", 1, 2, **pairs),
    ]


def _shared() -> list[Case]:
    """First order carries a part of the reward, the others what it leaves."""
    three = _case("three rewards, one a trusted head: FO(all) + REINFORCE", STEPS, 0, mixed=True, **REINFORCE)

    def carried(latent: Tensor) -> Tensor:  # [B]
        return toy_surrogate(latent) + _third(latent)

    return [
        _case("surrogate + REINFORCE on R - cQ", STEPS, 0, residual=True, **REINFORCE),
        _case("surrogate + sub-chains of 2 on R - cQ", STEPS, 2, "cover", **ALONE, residual=True),
        _case("surrogate + ZO on R - cQ", STEPS, 0, residual=True),
        _case("two rewards, one black-box: FO(3) + HO, h = 2 cover", 3, 2, "cover", **ALONE, mixed=True),
        _case("two rewards, one black-box: FO(1) + REINFORCE", 1, 0, mixed=True, **REINFORCE),
        _case("two rewards, one black-box: FO(3) + branches", 3, 0, mixed=True, score="branches", **REINFORCE),
        replace(three, subject=toy_subject(_three_rewards), carried=carried),
    ]


def _apart() -> list[Case]:
    """First order and pairs whose chains come apart: as they are, then clipped."""
    full, roulette, es = (
        _case("full_bp", STEPS, 0, **ALONE),
        _case("russian-roulette", 1, 0, **ALONE, truncation="russian_roulette"),
        _case("es", 0, 0),
    )
    return [
        *(_with(case, f"{case.candidate.name}, chain by chain", forms=NOT_CUT) for case in (full, roulette)),
        *(_with(case, f"{case.candidate.name}, clipped at .5", forms=Forms(clip=0.5)) for case in (full, roulette)),
        _with(es, "es, differences clipped at 1", zeroth_order_clip=1.0),
        _case("linear adjoint, all steps", STEPS, 0, **ALONE, linear=True),
        _case("linear adjoint, 2 drawn steps", 2, 0, **ALONE, linear=True),
    ]


def _forward_terms() -> list[Case]:
    """Advantages are centred in the whole batch."""
    weightings: tuple[Weighting, ...] = ("uniform", "elbo", "velocity")
    whole = toy_subject(group=CHAINS)
    cases = [
        Case(Candidate(f"forward term, {weighting}", _forward(), forms=Forms(weighting=weighting), biased=True), whole)
        for weighting in weightings
    ]
    mixed = Candidate("two rewards, one black-box: FO(all) + forward term", _forward(STEPS, mixed=True), biased=True)
    return [*cases, Case(mixed, toy_subject(_two_rewards, group=CHAINS), toy_surrogate)]


def _truncated() -> list[Case]:
    return [_case(f"alignprop, K = {k}", k, 0, **ALONE) for k in (1, 3)]


def _with(case: Case, name: str, **changes: Any) -> Case:
    return replace(case, candidate=replace(case.candidate, name=name, **changes))
