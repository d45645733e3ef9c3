"""The best plan for a memory budget, by measurement: memory, seconds and variance of every plan worth a look."""

from __future__ import annotations

import functools
import logging
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from rlr_ray.config.checks import check_first_order
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.lab.agreement import agreement
from rlr_ray.lab.cost import Probe, closed_form_length, probe
from rlr_ray.lab.judge import LEAST_COSINE, judge, signal_of
from rlr_ray.lab.measure import (
    Candidate,
    Subject,
    candidate_of,
    estimate_batch,
    guides_of,
    sample,
    subject_of,
)
from rlr_ray.lab.options import Choice, Option, PaperRule, PlanStatistics
from rlr_ray.lab.phases import Phase, once_trusted, until_trusted
from rlr_ray.lab.plans import (
    BLACK_BOX,
    BRANCHES,
    CLIPPED,
    DDPO,
    FORWARD,
    FULL,
    NEUTRAL,
    RLR,
    Estimator,
    covered,
    paper,
    recipes_own,
    reinforce,
    roulette,
    truncated,
    with_plan,
)
from rlr_ray.lab.reference import PlanSweep, Spread, chain_squares, gather
from rlr_ray.train.engine import Engine, RemoteRewards
from rlr_ray.train.held_out import standardised
from rlr_ray.train.process import ALONE
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update
from rlr_ray.utils.memory import GIB, memory_errors, peak_bytes

logger = logging.getLogger(__name__)
_BATCHES = 64  # of the sweep's statistics, if time allows
_PATIENCE_S = 30.0
_DIRECT_BATCHES = 8  # of unbiased plans that are measured one by one
_LEARNED = 32  # updates whose chains a surrogate learns from before it is judged
_DRAWS = 64  # of plans, for the mean cost of those that are drawn at random


def choose(config: RunConfig, batches: int | None = None, remote: RemoteRewards = MappingProxyType({})) -> Choice:
    """Measure, and choose the plan of least noise scale x cost / cosine^2 that fits `memory_budget_gib`.

    Gradients are judged as they will be used: clipped ones clipped. A biased plan's cosine with an unbiased reference
    counts a standard error less than measured, and must then be above 1/2. Without a number of `batches`, as many as
    half a minute allows, 64 at most. Raises UserError if no plan fits.
    """
    return Planner(config, batches, remote).choose(config.memory_budget_gib)


class Planner:
    """Measurements of a recipe, from which a plan is chosen for any budget."""

    @memory_errors()
    def __init__(self, config: RunConfig, batches: int | None = None, remote: RemoteRewards = MappingProxyType({})):
        self.config, self.begun = config, time.monotonic()
        self.exact = config.differentiable
        self.engine = Engine(with_plan(config, NEUTRAL), remote)
        self.total = standardised(self.engine)
        self.subject: Subject = subject_of(self.engine, self.engine.model.initial_theta, self.total)
        self.updates: Subject = subject_of(self.engine, self.subject.theta, self.total, whole_updates=True)
        self.phases: dict[str, Phase] = {}  # of a black box, by their options' names
        self.clipped: Tensor | None = None  # [n, P] clipped backpropagation of whole updates
        logger.info("measuring memory and seconds of an update's parts")
        self.probe: Probe = probe(self.engine, self.subject, differentiable=self.exact)
        logger.info("measuring the gradient's variance step by step")
        patience_s = _PATIENCE_S if batches is None else math.inf
        self.sweep: PlanSweep = gather(self.subject, self.exact, batches or _BATCHES, patience_s)
        self.direct: dict[str, PlanStatistics] = {}

    @memory_errors()
    def choose(self, budget_gib: float | None) -> Choice:
        """The best plan for a budget; a plan whose real update takes more than it fits is passed over."""
        rule = self.rule(budget_gib)
        budget = math.inf if budget_gib is None else budget_gib * GIB
        options = [self._option(plan, budget) for plan in (*self._from_sweep(), *self._one_by_one(rule))]
        options.sort(key=lambda option: (option.cosine <= LEAST_COSINE, option.price))
        for option in options:
            if not option.can_be_chosen:
                continue
            logger.info(f"checking the memory of {option.name} on a real update")
            peak = self.measured_peak(option)
            if peak <= budget:
                measured = self.reference[0], self.probe, peak / GIB, time.monotonic() - self.begun
                return Choice(budget_gib, option, options, rule, len(self.sweep.rows), *measured)
        least = min((option for option in options if option.unbiased), key=lambda option: option.peak_gib)
        raise UserError(
            f"memory_budget_gib is {budget_gib:g}, but the least that an unbiased plan needs is "
            f"{math.ceil(least.peak_gib * 1050) / 1000:g} GiB ({least.name}); raise the budget, or lower "
            "train.chunk_size or estimator.zeroth_order.chunk_size"
        )

    def measured_peak(self, option: Option) -> float:
        """Bytes at the worst moment of a real update, weights included; of a phase, of its gradient."""
        config = with_plan(self.config, option.keys)
        engine = self.engine.under(config)
        if phase := self.phases.get(option.name):
            candidate = replace(self._candidate(option.name, config), shape=phase.shape)
            return peak_bytes(lambda: estimate_batch(phase.subject, candidate, 0), engine.device) + engine.held_bytes()
        state = TrainState(engine.model.initial_theta, config.train, config.estimator)
        state.rate = state.rate or 1e-3  # no memory depends on it
        peak = peak_bytes(lambda: update(engine, state, None, ALONE, total=self.total), engine.device)
        return peak + engine.held_bytes()

    def rule(self, budget_gib: float | None) -> PaperRule | None:
        """The paper's rule; None without a budget, or where half order or zeroth order's law cannot be had."""
        sweep, memory, steps = self.sweep, self.probe.memory, self.sweep.steps
        half = [moments.variance() * sweep.size for moments in sweep.half_order]
        known = [value for value in half if math.isfinite(value)]
        if budget_gib is None or not self.exact or not known:
            return None
        numbers = len(self.subject.theta)
        zeroth = [numbers * square - sweep.signal(k) for k, (square, _) in enumerate(self.chain_squares)]
        room, a_step, a_rollout = budget_gib * GIB - memory.held, memory.half_order.further, memory.rollout / steps
        of_half, of_zeroth = statistics.mean(known), statistics.mean(zeroth)
        length = closed_form_length(room, a_step, a_rollout, of_half, of_zeroth, steps)
        return PaperRule(length, a_step / GIB, a_rollout / GIB, of_half, of_zeroth)

    @functools.cached_property
    def reference(self) -> tuple[str, Tensor]:  # in words, [n, P]
        """Unbiased estimates: exact gradients, or where there are none or noise hides their length, branches.

        Where the sampler has no noise there are no branches.
        """
        rows = torch.stack(self.sweep.rows)
        hidden = not (self.exact and math.isfinite(agreement(rows, rows).cosine_se))
        if hidden and self._allowed(BRANCHES):
            logger.info("measuring branches at every step, which biased plans are held against")
            return "branches at every step", self._rows(BRANCHES, len(rows))
        if self.exact:
            return "full backpropagation", rows
        return "zeroth order on every step", self._rows({"preset": "es"}, len(rows))

    def _rows(self, keys: Estimator, batches: int) -> Tensor:  # [n, P]
        candidate = self._candidate("reference", with_plan(self.config, keys))
        return torch.stack(list(sample(self.subject, candidate, batches).terms.values())).sum(0)

    def _candidate(self, name: str, config: RunConfig) -> Candidate:
        return candidate_of(name, config, self.updates, None, [])

    @functools.cached_property
    def chain_squares(self) -> list[Spread]:  # [T]
        return chain_squares(self.subject, len(self.sweep.rows))

    def _from_sweep(self) -> Iterator[PlanStatistics]:
        """Plans whose statistics one pass over the batches gave."""
        sweep, signal = self.sweep, signal_of(self.reference[1])
        for k in range(sweep.steps + 1 if self.exact else 1):
            name, keys = f"FO({k}) + REINFORCE", reinforce(k)
            if k in (0, sweep.steps):
                name, keys = ("full_bp", FULL) if k else ("ddpo", DDPO)
            if self._allowed(keys):
                yield PlanStatistics(name, keys, sweep.reinforce_variance(k), signal)
        if not self.exact:
            return
        for least in sweep.roulettes:
            name = f"russian-roulette, at least {least}"
            yield PlanStatistics(name, roulette(least), sweep.roulette_variance(least), signal)
        for k in sorted({1, min(3, sweep.steps - 1)} - {0}):
            bias = (sweep.truncated_bias(k), float("nan"))
            truncated_signal = float(sweep.last[k].mean.square().sum())
            yield PlanStatistics(
                f"alignprop, K = {k}", truncated(k), sweep.truncated_variance(k), truncated_signal, bias
            )

    def _one_by_one(self, rule: PaperRule | None) -> Iterator[PlanStatistics]:
        """Plans that the sweep does not hold, measured once each."""
        steps, first = self.sweep.steps, int(self.exact)
        plans: dict[str, Estimator] = {"es": {"preset": "es"}, "branches": BRANCHES}
        plans |= {"full_bp, clipped": CLIPPED, "forward term": FORWARD, "rlr": RLR} if self.exact else {}
        if steps > 2:
            length = min(max(rule.length if rule else 2, 1), steps - 1)
            plans |= {f"FO({first}) + HO, h = 2 cover": covered(first, 2), f"rlr-paper, h = {length}": paper(length)}
        plans |= recipes_own(self.config)
        if self.config.estimator.preset == "rlr":
            plans.pop("rlr", None)
        for name, keys in plans.items():
            if not self._allowed(keys):
                continue
            if name not in self.direct:
                logger.info(f"measuring {name}")
                self.direct[name] = self._measure(name, keys)
            yield self.direct[name]
        if not self.exact and self._allowed(BLACK_BOX):
            yield from self._black_box

    @functools.cached_property
    def _black_box(self) -> list[PlanStatistics]:
        """The plan that switches to a surrogate, by its phases; once trusted only if chains so few make it so."""
        keys = BLACK_BOX | {"checkpoint_steps": True}
        engine = self.engine.under(with_plan(self.config, keys))
        subject = subject_of(engine, self.subject.theta, self.total, whole_updates=True)
        self.phases["black-box, until trusted"] = until_trusted(engine, subject)
        logger.info(f"a surrogate learns from {_LEARNED} updates' chains")
        if once := once_trusted(engine, subject, _LEARNED):
            self.phases["black-box, once trusted"] = once
        else:
            logger.info("it is not trusted after them: what first order through it is worth is not measured")
        return [self._measure(name, BLACK_BOX, phase) for name, phase in self.phases.items()]

    def _allowed(self, keys: Estimator) -> bool:
        """Whether a plan works with the recipe's reward, sampler and batch."""
        try:
            config = with_plan(self.config, keys)
            check_first_order(config)
            config.shape_on(self.subject.sampler.schedule)
        except UserError:
            return False
        return True

    def _measure(self, name: str, keys: Estimator, phase: Phase | None = None) -> PlanStatistics:
        """A plan's statistics; checkpointed, which changes none.

        A biased one's direction takes all batches, each of a whole update's chains.
        """
        config = with_plan(self.config, keys | {"checkpoint_steps": True})
        guides = guides_of(self.subject, config) if config.guided else None
        norms: list[float | None] = [None] * self.sweep.steps
        subject = phase.subject if phase else self.updates if config.biased else self.subject
        candidate = candidate_of(name, config, subject, guides, norms)
        candidate = replace(candidate, shape=phase.shape) if phase else candidate
        judged = judge(subject, candidate, self.reference[1][: None if config.biased else _DIRECT_BATCHES])
        measured = judged.measured
        self.clipped = judged.rows if keys == CLIPPED else self.clipped
        forward = candidate.shape.score == "forward" and self.clipped is not None
        return PlanStatistics(
            name,
            keys,
            (measured.variance, measured.variance_se),
            judged.signal if config.biased else signal_of(self.reference[1]),
            (measured.relative_bias, measured.relative_bias_se),
            judged.agreement if config.biased else None,
            agreement(judged.rows, self.clipped) if forward and self.clipped is not None else None,
            phase.shape if phase else None,
        )

    def _option(self, plan: PlanStatistics, budget: float) -> Option:
        """Plain backpropagation where it fits, since it costs a forward a step less; else checkpointed."""
        both = [plan.keys | {"checkpoint_steps": saving} for saving in (False, True)]
        keys = next((keys for keys in both if self._peak(keys) <= budget), both[1])
        config = with_plan(self.config, keys)
        candidate = self._candidate(plan.name, config)
        candidate = replace(candidate, shape=plan.shape or candidate.shape)
        plans = [candidate.plan(number) for number in range(_DRAWS)]
        return Option(
            plan.name,
            keys,
            str(candidate.shape),
            not config.biased,
            *plan.variance,
            *plan.bias,
            plan.signal,
            plan.agreement,
            plan.beside_clipped,
            candidate.cost(plans),
            self._peak(keys) / GIB,
            self.probe.update_seconds(config, plans),
            self._peak(keys) <= budget,
        )

    def _peak(self, keys: Estimator) -> float:
        config = with_plan(self.config, keys)
        shape = config.shape_on(self.subject.sampler.schedule)
        return self.probe.memory.peak(shape, config.estimator.checkpointed)
