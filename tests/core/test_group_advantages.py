"""Advantages by group and reward, held against their formula and against every score as if called by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from rlr_ray.config.recipe import parse_config
from rlr_ray.config.run import RunConfig
from rlr_ray.core.chunk import Forms
from rlr_ray.core.forward_term import forward_term
from rlr_ray.core.half_order import branch_advantages, group_advantages, half_order
from rlr_ray.core.plan import Plan
from rlr_ray.errors import UserError
from rlr_ray.lab.toy import STEPS, toy_theta
from rlr_ray.train import update as updating
from tests.core.test_forms import (
    BRANCHES,
    CHAINS,
    FORWARD,
    MIXED,
    SAMPLER,
    B,
    close,
    draws_of_all,
    estimate,
    head,
    parts,
)
from tests.runs import RECIPE, merge, small_run, train_here
from tests.toy import toy_trajectory

GROUPS = torch.arange(B) // 8  # no whole number of groups in a chunk of six
WEIGHTS = (2.0, -0.5, 0.0)
FORMS = Forms(standardised=WEIGHTS)
PATH = Plan(STEPS, range(STEPS, STEPS), (range(0, 2), range(4, 5)), ())


def expected(scores: Any) -> numpy.ndarray:  # [m, B] -> [m, B]
    """Group by group and reward by reward, in numpy's words."""
    advantages = numpy.zeros((len(WEIGHTS), B))
    for i, weight in enumerate(WEIGHTS):
        for group in range(B // 8):
            own = numpy.asarray(scores[i])[8 * group : 8 * group + 8]
            advantages[i, 8 * group : 8 * group + 8] = abs(weight) * (own - own.mean()) / own.std() if own.std() else 0
    return advantages


def summands() -> Tensor:  # [m, B]
    """The toy's rewards as they are in the sum: weights in them."""
    return parts(toy_trajectory(CHAINS).latents[-1])


def test_each_reward_is_standardised_in_its_group_before_the_weighted_sum() -> None:
    scores = torch.randn(3, B, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    scores[0, :8] = 7.0  # says nothing of the first group
    summed = scores * torch.tensor(WEIGHTS, dtype=torch.float64)[:, None]
    order = torch.randperm(B, generator=torch.Generator().manual_seed(4))
    advantages, scale = group_advantages(summed[:, order], GROUPS[order], WEIGHTS)
    each = [numpy.sign(weight) * row for weight, row in zip(WEIGHTS, expected(scores), strict=True)]
    numpy.testing.assert_allclose(advantages.numpy(), numpy.stack(each)[:, order], rtol=1e-12, atol=1e-14)
    assert not scale[:, order.argsort()][0, :8].any() and not scale[2].any()
    large, _ = group_advantages(1e4 * summed, GROUPS, WEIGHTS)  # whatever the reward's own scale
    torch.testing.assert_close(large, group_advantages(summed, GROUPS, WEIGHTS)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    alike = torch.full((1, B), 0.1, dtype=dtype) + torch.linspace(0, 1e-8, B, dtype=dtype)
    assert not group_advantages(alike, GROUPS, [1.0])[0].any()


def test_half_order_by_path_has_these_advantages() -> None:
    trajectory, advantage = toy_trajectory(CHAINS), torch.tensor(expected(summands()).sum(0))
    each = [half_order(SAMPLER, toy_theta(), trajectory, sub_chain, advantage) for sub_chain in PATH.sub_chains]
    found = estimate(PATH, beside={"parts": parts}, groups=GROUPS, forms=FORMS, baseline=torch.rand(3, B))
    close(found.terms["half_order"].gradient, each[0] + each[1])


def test_the_forward_term_has_them_and_is_centred() -> None:
    advantage = torch.tensor(expected(summands()).sum(0))
    assert abs(float(advantage.sum())) < 1e-9
    last = toy_trajectory(CHAINS).latents[-1]
    whole = forward_term(SAMPLER, toy_theta(), last, {}, advantage, *draws_of_all((1, 3), 3), scale=2 / 3)
    found = estimate(FORWARD, beside={"parts": parts}, groups=GROUPS, forms=FORMS)
    close(found.terms["half_order"].gradient, whole)


@pytest.mark.parametrize("plan", [BRANCHES, replace(BRANCHES, first_order=range(STEPS - 1, STEPS))], ids=str)
def test_branches_are_measured_in_their_groups_spread(plan: Plan) -> None:
    """Partners are drawn with the chains, or where first order is, after it."""
    trajectory, scores = toy_trajectory(CHAINS), summands().numpy()
    partners = branch_advantages(SAMPLER, toy_theta(), trajectory, summands(), parts, [1, 4])  # [n, m, B]
    spread = numpy.stack([[row[8 * (b // 8) : 8 * (b // 8) + 8].std() for b in range(B)] for row in scores])
    scale = torch.tensor(numpy.abs(WEIGHTS)[:, None] / spread)
    each = [
        half_order(SAMPLER, toy_theta(), trajectory, sub_chain, 3 * (scale * differences).sum(0))
        for sub_chain, differences in zip(plan.sub_chains, partners, strict=True)
    ]
    found = estimate(plan, beside={"parts": parts}, groups=GROUPS, forms=FORMS)
    close(found.terms["half_order"].gradient, each[0] + each[1])


def test_what_first_order_carries_is_left_out_of_the_sum() -> None:
    """Of own gradients, and of heads that are trusted."""
    beside = {"parts": parts, "black_box": (1, 2), "heads": head, "trusted": (1,)}
    last = toy_trajectory(CHAINS).latents[-1]
    left = forward_term(SAMPLER, toy_theta(), last, {}, torch.tensor(expected(summands())[1]), *draws_of_all((1, 3), 2))
    close(estimate(MIXED, beside=beside, groups=GROUPS, forms=FORMS).terms["half_order"].gradient, left)


GROUPED: dict[str, Any] = {
    "estimator": {"preset": "ddpo"},
    "train": {"chains": 4, "group_size": 2},
    "reward": None,
    "rewards": {"digits": 1.0, "digits_judge": {"weight": -0.5}},
    "evaluation": {"judge": None},
}


def grouped(folder: Path, **changes: Any) -> RunConfig:
    keys = merge(small_run(folder).model_dump(mode="json", exclude={"estimator", "rewards"}), merge(GROUPED, changes))
    return parse_config({key: value for key, value in keys.items() if value is not None})


def test_the_short_form_says_two_keys(tmp_path: Path) -> None:
    config = grouped(tmp_path, train={"chains_per_prompt": 1})
    assert config.train.chains_per_prompt == 2 and config.estimator.half_order.baseline == "group"
    assert parse_config(config.model_dump(mode="json")) == config
    assert RECIPE["estimator"]["half_order"]["baseline"] == "prompt"  # else the test above would be of no conflict


def test_a_run_standardises_with_its_rewards_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Any]()
    real = updating.estimate_gradient

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.append((arguments[3].tolist(), options["forms"].standardised, options["baseline"]))
        return real(*arguments, **options)

    monkeypatch.setattr(updating, "estimate_gradient", spy)
    train_here(grouped(tmp_path, train={"iterations": 2}))
    assert seen == [([0, 0, 1, 1], (1.0, -0.5), None)] * 2


def test_what_a_surrogate_leaves_is_no_reward_to_be_standardised(tmp_path: Path) -> None:
    black = {"rewards": {"digits": {"differentiable": False}, "digits_judge": {"differentiable": False}}}
    learns = {"preset": "surrogate", "surrogate": {"coefficient": 1.0}}
    with pytest.raises(UserError, match=r"'group'.*use: residual.*running, prompt or batch.*use: switch"):
        grouped(tmp_path, **black, estimator=learns)
    assert grouped(tmp_path, **black, estimator={"preset": "black-box"}).plan_shape.switch
