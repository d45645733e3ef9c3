"""The best plan for a memory budget, by measurement: memory, seconds and variance of every plan worth a look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rlr_ray.config import RunConfig
from rlr_ray.core.budget import closed_form_length
from rlr_ray.core.plan import Plan
from rlr_ray.engine import Engine, check_reward
from rlr_ray.errors import UserError
from rlr_ray.lab.families import Families, Spread, gather
from rlr_ray.lab.measure import Subject, sample, summarise
from rlr_ray.lab.memory import peak_bytes
from rlr_ray.lab.plans import FULL, Estimator, covered, paper, recipes_own, reinforce, roulette, truncated, with_plan
from rlr_ray.lab.probe import Probe, probe
from rlr_ray.lab.subject import candidate_of, guides_of, subject_of
from rlr_ray.loop import Process, update
from rlr_ray.rewards import is_differentiable
from rlr_ray.state import TrainState

GIB = 2**30
CHUNKS = 64  # of the families' statistics, if time allows
_PATIENCE_S = 30.0
_DRAWS = 64  # of plans, for the mean cost of those that are drawn at random
_DIRECT_CHUNKS = 8  # of plans that are measured one by one


@dataclass(frozen=True)
class Found:
    """A plan's statistics, whatever the budget; each with its standard error."""

    name: str
    keys: Estimator
    variance: Spread  # per chain
    bias: Spread = (0.0, 0.0)  # relative, along the gradient


@dataclass(frozen=True)
class Option:
    """One plan with what it would cost this recipe."""

    name: str
    keys: Estimator
    plan: str
    unbiased: bool
    variance: float  # per chain
    variance_se: float
    relative_bias: float
    relative_bias_se: float
    cost: float  # denoiser forwards a chain, a backward as two
    peak_gib: float  # predicted
    seconds: float  # an update in one process, predicted
    fits: bool

    @property
    def variance_cost(self) -> float:
        return self.variance * self.cost


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
    """What the planner found."""

    budget_gib: float | None
    best: Option
    options: list[Option]
    rule: PaperRule | None
    chunks: int
    probe: Probe
    measured_gib: float  # peak of a real update under the best plan

    @property
    def error(self) -> float:
        """Of the predicted peak, relative to the measured one."""
        return self.best.peak_gib / self.measured_gib - 1


def choose(config: RunConfig, say: Callable[[str], None], chunks: int = CHUNKS) -> Choice:
    """Measure, and choose the unbiased plan of least variance at equal cost that fits `memory_budget_gib`.

    Raises UserError if no unbiased plan fits.
    """
    planner = Planner(config, say, chunks)
    return planner.choose(config.memory_budget_gib)


class Planner:
    """One recipe's measurements, from which a plan is chosen for any budget."""

    def __init__(
        self, config: RunConfig, say: Callable[[str], None], chunks: int = CHUNKS, patience_s: float = _PATIENCE_S
    ):
        self.config, self.say = config, say
        self.exact = is_differentiable(config.reward.name, config.reward.differentiable)
        self.engine = Engine(with_plan(config, {"preset": "es"}))  # a plan that every recipe allows
        self.subject: Subject = subject_of(self.engine, self.engine.model.initial_theta)
        say("measuring memory and seconds of an update's parts")
        self.probe: Probe = probe(self.engine, self.subject, differentiable=self.exact)
        say("measuring the gradient's variance step by step")
        self.families: Families = gather(self.subject, self.exact, chunks, patience_s)
        self.direct: dict[str, Found] = {}

    def choose(self, budget_gib: float | None) -> Choice:
        rule = self._rule(budget_gib)
        budget = float("inf") if budget_gib is None else budget_gib * GIB
        options = [self._option(found, budget) for found in self._found(rule)]
        options.sort(key=lambda option: (not option.unbiased, option.variance_cost))
        able = [option for option in options if option.fits and option.unbiased]
        if not able:
            least = min((option for option in options if option.unbiased), key=lambda option: option.peak_gib)
            raise UserError(
                f"memory_budget_gib is {budget_gib:g}, but the least that an unbiased plan needs is "
                f"{least.peak_gib:.3g} GiB ({least.name}); raise the budget, or lower train.chunk_size or "
                "estimator.zeroth_order.chunk_size"
            )
        self.say(f"checking the memory of {able[0].name} on a real update")
        chunks, peak = len(self.families.rows), self.measured_peak(able[0])
        return Choice(budget_gib, able[0], options, rule, chunks, self.probe, peak / GIB)

    def measured_peak(self, option: Option) -> float:
        """Bytes at the worst moment of a real update, weights included."""
        config = with_plan(self.config, option.keys).model_copy(update={"cluster": "none"})
        engine = Engine(config)
        state = TrainState(engine.model.initial_theta, config.train, config.estimator)
        peak = peak_bytes(lambda: update(engine, state, engine.local_rollouts, Process()), engine.device)
        return peak + engine.held_bytes()

    def _rule(self, budget_gib: float | None) -> PaperRule | None:
        """The paper's rule; None without a budget or without the gradients that zeroth order's law needs."""
        if budget_gib is None or not self.exact:
            return None
        families, memory, steps = self.families, self.probe.memory, self.families.steps
        half = [moments.variance() * families.chunk for moments in families.half_order]
        known = [value for value in half if value == value]
        squares = [families.signal(k) + families.chunk * families.first_order[k].variance() for k in range(steps)]
        numbers = len(self.subject.theta)
        zeroth = [(numbers + 2) * square - families.signal(k) for k, square in enumerate(squares)]
        values = (
            (budget_gib * GIB - memory.held),
            memory.half_order.further,
            memory.rollout / steps,
            sum(known) / len(known) if known else float("inf"),
            sum(zeroth) / steps,
        )
        length = closed_form_length(*values, steps)
        return PaperRule(length, values[1] / GIB, values[2] / GIB, values[3], values[4])

    def _found(self, rule: PaperRule | None) -> list[Found]:
        """Every plan worth a look, with its variance and bias."""
        return [*self._families(), *self._one_by_one(rule)]

    def _families(self) -> Iterator[Found]:
        families = self.families
        if self.config.sampler.eta:
            yield Found("ddpo", {"preset": "ddpo"}, families.reinforce_variance(0))
        if not self.exact:
            return
        for k in range(1 if self.config.sampler.eta else families.steps, families.steps + 1):
            full = k == families.steps
            name, keys = ("full_bp", FULL) if full else (f"FO({k}) + REINFORCE", reinforce(k))
            yield Found(name, keys, families.reinforce_variance(k))
        for least in families.roulettes:
            yield Found(f"russian-roulette, at least {least}", roulette(least), families.roulette_variance(least))
        for k in sorted({1, min(3, families.steps - 1)} - {0}):
            bias = (families.truncated_bias(k), float("nan"))
            yield Found(f"alignprop, K = {k}", truncated(k), families.truncated_variance(k), bias)

    def _one_by_one(self, rule: PaperRule | None) -> Iterator[Found]:
        """Plans that the families do not hold, measured once each."""
        steps, first = self.families.steps, int(self.exact)
        plans: dict[str, Estimator] = {"es": {"preset": "es"}}
        if self.config.sampler.eta and steps > 2:
            plans |= {f"FO({first}) + HO, h = 2 cover": covered(first, 2)}
        if self.config.sampler.eta and self.exact and steps > 2:
            length = min(max(rule.length if rule else 2, 1), steps - 1)
            plans |= {f"rlr-paper, h = {length}": paper(length)}
        plans |= recipes_own(self.config)
        for name, keys in plans.items():
            if name == "the recipe's" and not self._allowed(keys):
                continue
            if name not in self.direct:
                self.say(f"measuring {name}")
                self.direct[name] = self._measure(name, keys)
            yield self.direct[name]

    def _allowed(self, keys: Estimator) -> bool:
        try:
            check_reward(with_plan(self.config, keys))
        except UserError:
            return False
        return True

    def _measure(self, name: str, keys: Estimator) -> Found:
        """A plan's variance and bias from a few chunks."""
        config = with_plan(self.config, keys)
        guides = guides_of(self.subject, config) if _guided(config) else None
        norms: list[float | None] = [None] * self.families.steps
        candidate = candidate_of(name, config, self.subject, guides, norms)
        reference = torch.stack(self.families.rows[:_DIRECT_CHUNKS])
        got = summarise(candidate, sample(self.subject, candidate, len(reference)), reference, self.families.chunk)
        return Found(name, keys, (got.variance, got.variance_se), (got.relative_bias, got.relative_bias_se))

    def _option(self, found: Found, budget: float) -> Option:
        """Plain backpropagation where it fits, since it costs a forward a step less; else checkpointed."""
        both = [found.keys | {"checkpoint_steps": saving} for saving in (False, True)]
        keys = next((keys for keys in both if self._peak(keys) <= budget), both[1])
        config = with_plan(self.config, keys)
        candidate = candidate_of(found.name, config, self.subject, None, [])
        plans = [candidate.plan(chunk) for chunk in range(_DRAWS)]
        return Option(
            found.name,
            keys,
            str(candidate.shape),
            not (candidate.shape.biased or "auto" in candidate.weights.values() or _guided(config)),
            *found.variance,
            *found.bias,
            candidate.cost(plans),
            self._peak(keys) / GIB,
            self._seconds(config, plans),
            self._peak(keys) <= budget,
        )

    def _peak(self, keys: Estimator) -> float:
        config = with_plan(self.config, keys)
        return self.probe.memory.peak(config.plan_shape, config.estimator.checkpoint_steps)

    def _seconds(self, config: RunConfig, plans: Sequence[Plan]) -> float:
        seconds, zeroth = self.probe.seconds, config.estimator.zeroth_order
        forwards = sum(plan.forwards(config.estimator.checkpoint_steps) for plan in plans) / len(plans)
        backwards = sum(plan.backwards for plan in plans) / len(plans)
        chunk = forwards * seconds["forward"] + backwards * seconds["backward"]
        rollouts = zeroth.count / zeroth.chunk_size if config.plan_shape.has_zeroth_order else 0
        return chunk * config.train.chains / config.train.chunk_size + rollouts * seconds["rollout"]


def _guided(config: RunConfig) -> bool:
    return config.plan_shape.has_zeroth_order and config.estimator.zeroth_order.directions == "guided"
