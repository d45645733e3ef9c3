"""Statistics of estimates against closed forms and against the product's own estimates."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from rlr_ray.core.chunk import Forms
from rlr_ray.core.first_order import first_order, step_gradients
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.sampler import Chains
from rlr_ray.core.zeroth_order import Directions
from rlr_ray.lab.agreement import relative_bias
from rlr_ray.lab.measure import Candidate, Samples, sample, summarise
from rlr_ray.lab.reference import (
    chain_gradients,
    chain_squares,
    exact_by_step,
    exact_reference,
    gather,
    roulette_square,
)
from rlr_ray.lab.toy import PARAMETERS, STEPS, toy_chains
from rlr_ray.lab.toy_cases import toy_subject
from tests.toy import exact_gradient

SIZE = 10


def gaussian(rows: int, mean: list[float], deviation: float, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, len(mean), generator=source, dtype=torch.float64)
    return torch.tensor(mean, dtype=torch.float64) + deviation * noise


def test_variances_weights_and_bias_of_known_gaussians() -> None:
    """4,000 chunks of 10 chains: variances to 3 % (standard error 1.3 %), the weight to 4 %."""
    rows = {"half_order": gaussian(4000, [1.0, 0, 0], 2.0, 0), "zeroth_order": gaussian(4000, [0, 2.0, 0], 1.0, 1)}
    shape = PlanShape(6, 0, 2)
    candidate = Candidate(
        "c", shape, Directions(3, 0.1), chains=40, pairs=20, weights={"zeroth_order": "auto"}, biased=True
    )
    exact = torch.tensor([1.0, 2.0, 0]).double().expand(4000, 3)
    found = summarise(candidate, Samples([candidate.plan(0)], rows, 3.0 * SIZE), exact, SIZE)
    half, zeroth = 3 * 4.0 * SIZE, 3 * 1.0 * SIZE  # per chain, per pair
    assert found.term_variances == pytest.approx({"half_order": half, "zeroth_order": zeroth}, rel=0.03)
    weight = 4 / (4 + zeroth / 20)
    assert found.weights["zeroth_order"] == pytest.approx(weight, rel=0.04)
    assert found.variance == pytest.approx(half + weight**2 * zeroth * 40 / 20, rel=0.03)
    assert found.variance_se / found.variance == pytest.approx(math.sqrt(2 / 3 / 4000), rel=0.3)
    bias = -(1 - weight) * 4 / 5
    assert abs(found.relative_bias - bias) < 4 * found.relative_bias_se
    assert not found.unbiased
    parts = candidate.plan(0).zeroth_order[0]  # before it a pair is one chain
    assert found.cost == 6 + 3 * 2 + (2 * 6 - parts) * 20 / 40


def test_a_pull_costs_a_forward_more_at_each_draw() -> None:
    shape = PlanShape(6, 0, 0, rest="none", score="forward", draws=3, forward_steps=(1, 2))
    plain, pulled = Candidate("plain", shape), Candidate("pulled", shape, forms=Forms(pull=0.5))
    assert pulled.cost([plain.plan(0)]) == plain.cost([plain.plan(0)]) + 3 == 6 + 3 * 3 + 3


def test_an_even_weight_makes_a_term_as_long_as_first_order() -> None:
    rows = {"first_order": gaussian(400, [3.0, 0, 0], 0.01, 0), "half_order": gaussian(400, [0, 0.5, 0], 0.01, 1)}
    candidate = Candidate("c", PlanShape(6, 3, 2), weights={"half_order": "even"}, biased=True)
    found = summarise(candidate, Samples([candidate.plan(0)], rows), rows["first_order"], SIZE)
    assert found.weights == {"first_order": 1.0, "half_order": pytest.approx(6.0, rel=0.01)}
    spreads = {"first_order": 1.0, "half_order": 0.5}
    weaker = summarise(candidate, Samples([candidate.plan(0)], rows, None, spreads), rows["first_order"], SIZE)
    assert weaker.weights["half_order"] == pytest.approx(3.0, rel=0.01)
    alone = summarise(
        candidate, Samples([candidate.plan(0)], {"half_order": rows["half_order"]}), rows["half_order"], SIZE
    )
    assert alone.weights == {"half_order": 1.0}


def test_relative_bias_is_paired() -> None:
    """Estimates that follow the exact gradient chunk by chunk have no error at all."""
    exact = gaussian(50, [1.0, 2.0], 1.0, 2)
    bias, error = relative_bias(1.1 * exact, exact)
    assert bias == pytest.approx(0.1)
    assert relative_bias(exact, exact) == (0, 0)
    assert error < 0.05


@pytest.mark.parametrize("last", [0, 1, 4, STEPS])
def test_a_sweep_is_the_plans_measured_one_by_one(last: int) -> None:
    """First order on the last K + REINFORCE: the same chains, so the same numbers, as by `estimate_gradient`."""
    subject, batches = toy_subject(), 6
    sweep = gather(subject, True, batches)
    candidate = Candidate("mixed", PlanShape(STEPS, last, 0, rest="half_order" if last < STEPS else "none"))
    found = summarise(candidate, sample(subject, candidate, batches), torch.stack(sweep.rows), len(subject.groups))
    assert sweep.reinforce_variance(last)[0] == pytest.approx(found.variance, rel=1e-9)
    if 0 < last < STEPS:  # at 6 batches the mean's own error is a tenth of the spread's
        assert sweep.reinforce_variance(last)[1] == pytest.approx(found.variance_se, rel=0.5)
    truncated = Candidate("truncated", PlanShape(STEPS, last, 0, rest="none"))
    if last:
        alone = summarise(truncated, sample(subject, truncated, batches), torch.stack(sweep.rows), 256)
        assert sweep.truncated_variance(last)[0] == pytest.approx(alone.variance, rel=1e-9, abs=1e-12)
        assert sweep.truncated_bias(last) == pytest.approx(alone.relative_bias, abs=5e-3)  # that one is cross-fitted


@pytest.mark.parametrize("least", [1, 3])
def test_roulettes_second_moment_is_the_average_over_its_depths(least: int) -> None:
    """Against first order with each depth's weights, by the product's own code."""
    subject = toy_subject()
    (chains,) = subject.batch(3)
    steps = exact_by_step(subject, 3)
    shape = PlanShape(STEPS, least, 0, rest="none", truncation="russian_roulette")
    plans = {len(plan.first_order): plan for plan in (shape.draw(i) for i in range(200))}
    assert set(plans) == set(range(least, STEPS + 1))
    squares = []
    for plan in plans.values():
        start = (chains.x_start, chains.noise, chains.conditioning)
        head = subject.sampler.sample(subject.theta, *start, stop=plan.first_order.start)
        arguments = (subject.sampler, subject.theta, head, chains.objective)
        squares.append(float(first_order(*arguments, step_weights=plan.step_weights)[0].square().sum()))
    assert roulette_square(steps, least) == pytest.approx(sum(squares) / len(squares), rel=1e-9)


def test_the_reference_is_backpropagation_and_its_signals_are_unbiased() -> None:
    """Signals sum over independent halves; against the same chunks' step gradients by hand."""
    subject = toy_subject()
    reference = exact_reference(subject, 4)
    steps = []
    for chunk in range(4):
        (chains,) = subject.batch(chunk)
        start = (chains.x_start, chains.noise, chains.conditioning)
        head = subject.sampler.sample(subject.theta, *start, stop=0)
        steps.append(step_gradients(subject.sampler, subject.theta, head, chains.objective)[0])
    stacked = torch.stack(steps)
    torch.testing.assert_close(reference.rows, stacked.sum(1))
    even, odd = (stacked[0] + stacked[2]) / 2, (stacked[1] + stacked[3]) / 2
    torch.testing.assert_close(torch.tensor(reference.signals).double(), (even * odd).sum(1))
    assert len(reference.position_norms(2)) == STEPS and reference.position_norms(2)[-1] is None
    assert reference.rows.shape == (4, PARAMETERS)


def test_variances_do_not_depend_on_the_batch() -> None:
    """rlr-paper's place and chains are shared by its terms: four times the chains, a quarter of the variance."""
    found = []
    for size, batches in ((64, 200), (256, 50)):
        groups = torch.arange(size) // 4
        subject = dataclasses.replace(toy_subject(), batch=lambda c, n=size: [toy_chains(n, c)], groups=groups)
        candidate = Candidate("paper", PlanShape(STEPS, 1, 2), Directions(PARAMETERS, 0.003))
        samples = sample(subject, candidate, batches)
        found.append(summarise(candidate, samples, exact_reference(subject, batches).rows, size))
    for measured in found:
        assert measured.variance == pytest.approx(found[0].variance, rel=0.2)
        zeroth = measured.term_variances["zeroth_order"]
        assert zeroth == pytest.approx(found[0].term_variances["zeroth_order"], rel=0.2)


def test_what_prompts_differ_in_counts_once_a_chain_in_the_law_of_perturbations() -> None:
    """Prompts that want opposite things, 8 chains each: single chains' squares, to four standard errors.

    A batch's variance times its chains, which the law once took, is several times as much.
    """

    def chains(count: int, seed: int, prompts: torch.Tensor) -> Chains:
        return dataclasses.replace(toy_chains(count, seed), objective=lambda latent: prompts * latent.flatten(1).sum(1))

    wants = torch.tensor([3.0, -3.0, 2.0, -2.0]).double()
    exact = [exact_gradient(chains(1000, 99, wants.repeat(250)), [k]).square().sum(1) for k in range(STEPS)]
    source = torch.Generator().manual_seed(1)
    drawn = wants[torch.randint(4, (40, 2), generator=source)].repeat_interleave(8, 1)  # two prompts a batch
    subject = dataclasses.replace(
        toy_subject(),
        batch=lambda number: [chains(16, number, drawn[number])],
        groups=torch.arange(16) // 8,
    )
    reference = exact_reference(subject, 40)
    for number, steps in enumerate(chain_gradients(subject, 3)):
        torch.testing.assert_close(steps[2], exact_gradient(subject.batch(number)[0], [2]))
    for k, (square, _) in enumerate(chain_squares(subject, 40)):
        expected, error = float(exact[k].mean()), float(exact[k].std()) / 80**0.5  # the prompts drawn
        assert abs(square - expected) < 4 * error
        assert reference.signals[k] + reference.step_variances[k] > 1.5 * expected
