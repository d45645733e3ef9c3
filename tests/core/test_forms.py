"""Every form of a term in an update: as if called by itself, whoever has which chunk, on what first order leaves."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.core.chunk import Forms
from rlr_ray.core.forward_term import forward_draws, forward_term
from rlr_ray.core.gradient import GradientEstimate, estimate_gradient
from rlr_ray.core.half_order import branch_advantages, half_order, leave_one_out
from rlr_ray.core.plan import Plan
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.sampler import Chains
from rlr_ray.lab.toy import STEPS, toy_chains, toy_reward, toy_sampler, toy_theta
from tests.runs import shared
from tests.toy import exact_gradient, toy_trajectory

B, SIZE = 24, 6
SAMPLER, CHAINS, ALL = toy_sampler(), toy_chains(24, seed=5), torch.zeros(24)
FORWARD = Plan(STEPS, range(STEPS, STEPS), (), (), score="forward", forward_steps=(1, 3), draws=3)
BRANCHES = Plan(
    STEPS, range(STEPS, STEPS), (range(0, 2), range(4, 5)), (), score="branches", sub_chain_weights=(3.0, 3.0)
)
FULL = Plan(STEPS, range(STEPS), (), ())
LINEAR = Plan(STEPS, range(STEPS, STEPS), (), (), step_weights=(3.0, 3.0), adjoint_steps=(1, 4))
MIXED = Plan(STEPS, range(STEPS), (), (), residual_from=0, score="forward", forward_steps=(1, 3), draws=2)


def offset(latent: Tensor) -> Tensor:  # [B]
    """What a black box adds to the reward."""
    return latent.flatten(1).sin().sum(1)


def parts(latent: Tensor) -> Tensor:  # [3, B]
    return torch.stack([toy_reward(latent), offset(latent).detach(), 2 * offset(latent).detach()])


def head(latent: Tensor) -> Tensor:  # [2, B]
    return torch.stack([latent.flatten(1).sum(1), latent.flatten(1).square().sum(1)])


def chunk(c: int, **beside: Any) -> Chains:
    part = slice(c * SIZE, (c + 1) * SIZE)
    seeds = [("toy", i) for i in range(c * SIZE, (c + 1) * SIZE)]

    def draws(steps: Any, count: int) -> tuple[Tensor, Tensor]:
        return forward_draws(steps, count, CHAINS.x_start.shape[1:], seeds, torch.float64)

    return Chains(CHAINS.x_start[part], CHAINS.noise[:, part], {}, toy_reward, draws=draws, **beside)


def estimate(
    plan: Plan,
    chunks: list[int] | None = None,
    beside: dict[str, Any] | None = None,
    groups: Tensor = ALL,
    **options: Any,
) -> Any:
    work = {c: (plan, chunk(c, **(beside or {}))) for c in (range(B // SIZE) if chunks is None else chunks)}
    found: GradientEstimate = estimate_gradient(SAMPLER, toy_theta(), work, groups, lambda: None, **options)
    return found


def draws_of_all(steps: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    return forward_draws(steps, count, CHAINS.x_start.shape[1:], [("toy", i) for i in range(B)], torch.float64)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_a_forward_term_has_advantages_beside_the_running_baseline_and_then_the_whole_batch() -> None:
    baseline = torch.linspace(-1, 1, B, dtype=torch.float64)[None]
    last = toy_trajectory(CHAINS).latents[-1]
    advantage = leave_one_out(toy_reward(last) - baseline[0], ALL)
    assert abs(float(advantage.sum())) < 1e-12
    forms = Forms(weighting="velocity", pull=0.5, reference=toy_theta() + 0.1)
    options = {"weighting": "velocity", "pull": 0.5, "reference": forms.reference, "scale": 2 / 3}
    whole = forward_term(SAMPLER, toy_theta(), last, {}, advantage, *draws_of_all((1, 3), 3), **options)
    close(estimate(FORWARD, forms=forms, baseline=baseline).terms["half_order"].gradient, whole)


def test_branches_are_half_order_with_the_pairs_advantages_and_need_no_baseline() -> None:
    trajectory = toy_trajectory(CHAINS)
    rewards = toy_reward(trajectory.latents[-1])
    advantages = branch_advantages(SAMPLER, toy_theta(), trajectory, rewards, toy_reward, [1, 4])
    each = [
        half_order(SAMPLER, toy_theta(), trajectory, s, 3 * a)
        for s, a in zip(BRANCHES.sub_chains, advantages, strict=True)
    ]
    close(estimate(BRANCHES).terms["half_order"].gradient, each[0] + each[1])
    close(estimate(BRANCHES, baseline=torch.rand(1, B)).terms["half_order"].gradient, each[0] + each[1])


def test_clipping_cuts_each_chain_at_the_median_of_all_and_says_how_much() -> None:
    each = exact_gradient(CHAINS, range(STEPS))  # [B, P]
    norms = each.norm(dim=1)
    limit = 0.5 * norms.median()
    cut = each * (limit / norms).clamp(max=1)[:, None]
    found = estimate(FULL, forms=Forms(clip=0.5), checkpoint_steps=True)
    close(found.terms["first_order"].gradient, cut.mean(0))
    assert found.terms["first_order"].cut.share == pytest.approx(float((norms > limit).double().mean()))
    assert found.median == pytest.approx(float(norms.median()))
    close(estimate(FULL, forms=Forms(clip=0.5, typical=math.inf)).terms["first_order"].gradient, each.mean(0))


def test_first_order_carries_own_gradients_and_trusted_heads_half_order_what_is_left() -> None:
    beside = {"parts": parts, "black_box": (1, 2), "heads": head, "trusted": (1,)}
    found = estimate(MIXED, beside=beside)
    climbed = replace(CHAINS, objective=lambda latent: toy_reward(latent) + head(latent)[1])
    close(found.terms["first_order"].gradient, exact_gradient(climbed, range(STEPS)).mean(0))
    last = toy_trajectory(CHAINS).latents[-1]
    close(found.parts, parts(last))
    advantage = leave_one_out(offset(last), ALL)
    left = forward_term(SAMPLER, toy_theta(), last, {}, advantage, *draws_of_all((1, 3), 2))
    close(found.terms["half_order"].gradient, left)
    assert found.kind == "first_order + half_order of a surrogate"
    carried, whole = parts(last)[[0, 2]].sum(0), parts(last).sum(0).std(correction=0)
    others = float(offset(last).std(correction=0) / whole)
    assert found.spreads == pytest.approx(
        {"first_order": float(carried.std(correction=0) / whole), "half_order": others, "zeroth_order": others}
    )
    assert not estimate(FORWARD).spreads and not estimate(FULL, beside=beside | {"trusted": (0, 1)}).spreads
    assert estimate(MIXED, beside=beside | {"trusted": ()}).kind == "first_order + half_order"


def test_a_black_box_is_not_rated_with_gradients() -> None:
    rated = []

    def black_box(latent: Tensor) -> Tensor:
        rated.append(torch.is_grad_enabled() or latent.requires_grad)
        return offset(latent)

    beside = {"parts": black_box, "differentiable": False, "black_box": (0,), "heads": head, "trusted": (0,)}
    found = estimate(FULL, beside=beside)
    climbed = replace(CHAINS, objective=lambda latent: head(latent)[0])
    close(found.terms["first_order"].gradient, exact_gradient(climbed, range(STEPS)).mean(0))
    assert rated == [False] * (B // SIZE)


@pytest.mark.parametrize("plan", [FORWARD, BRANCHES, FULL, LINEAR, MIXED], ids=str)
def test_no_bit_depends_on_who_has_which_chunk(plan: Plan) -> None:
    beside = {"parts": parts, "black_box": (1, 2), "heads": head, "trusted": (0,)}
    options: dict[str, Any] = {"forms": Forms(clip=0.5), "baseline": torch.ones(3, B), "half_order_rows": 2}
    alone, shares = estimate(plan, beside=beside, **options), [[2, 0], [3, 1]]
    for part in shared(2, lambda rank, reduce: estimate(plan, shares[rank], beside, reduce=reduce, **options)):
        for name, term in alone.terms.items():
            assert torch.equal(part.terms[name].gradient, term.gradient) and part.terms[name].variance == term.variance
            assert part.terms[name].cut == term.cut
        assert part.median == alone.median


def test_steps_of_the_forward_term_are_those_that_first_order_leaves_and_zeroth_order_has_the_others() -> None:
    shape = PlanShape(10, 3, 0, score="forward", draws=3, forward_steps=(2, 3, 8))
    plan = shape.draw(0)
    assert plan.forward_steps == (2, 3) and plan.zeroth_order == (0, 1, 4, 5, 6) and plan.first_order == range(7, 10)
    assert (plan.forwards(), plan.backwards) == (13, 6)
    late = PlanShape(10, 8, 0, score="forward", draws=3, forward_steps=(2, 3), rest="none")
    assert late.draw(0).forward_steps == (1,)  # the nearest that is left
    mixed = replace(shape, mixed=True).draw(0)
    assert mixed.forward_steps == (2, 3, 8) and [mixed.leaves(k) for k in (3, 8)] == [False, True]


def test_a_plan_that_switches_is_that_of_what_first_order_can_carry() -> None:
    shape = PlanShape(10, 10, 0, rest="none", score="forward", draws=3, forward_steps=(2, 3), switch=True)
    nothing, one, both = (shape.carrying(count, 2).draw(0) for count in range(3))
    assert not nothing.has_first_order and nothing.forward_steps == (2, 3) and nothing.residual_from is None
    assert one.first_order == range(10) and one.forward_steps == (2, 3) and one.leaves(2)
    assert both.first_order == range(10) and not both.has_half_order
    assert shape.draw(0) == nothing and shape.has_half_order and shape.biased


def test_branches_cost_their_tails_and_are_drawn_evenly() -> None:
    shape = PlanShape(10, 0, 0, rest="half_order", score="branches")
    assert (shape.draw(0).forwards(), shape.draw(0).backwards) == (10 + 45 + 10, 10)
    drawn = [replace(shape, branch_steps=2).draw(0, step) for step in range(60)]
    assert {len(plan.sub_chains) for plan in drawn} == {2} and drawn[0].sub_chain_weights == (5.0, 5.0)
    assert {sub_chain.start for plan in drawn for sub_chain in plan.sub_chains} == set(range(10))


def test_linear_adjoints_are_drawn_from_all_steps_and_divided_by_their_probability() -> None:
    plan = PlanShape(10, 2, 0, rest="none", linear=True).draw(0)
    assert len(plan.adjoint_steps) == 2 and plan.step_weights == (5.0, 5.0) and not plan.first_order
    assert (plan.forwards(), plan.backwards, plan.has_first_order) == (12, 2, True)
