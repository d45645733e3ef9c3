"""The best plan for a memory budget, by measurement: memory, seconds and variance of every plan worth a look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from rlr_ray.config import RunConfig
from rlr_ray.core.budget import closed_form_length
from rlr_ray.engine import Engine
from rlr_ray.errors import UserError
from rlr_ray.lab.families import Families, Spread, gather
from rlr_ray.lab.measure import Subject, sample, summarise
from rlr_ray.lab.memory import peak_bytes
from rlr_ray.lab.plans import Estimator, covered, paper, reinforce, roulette, truncated, with_plan
from rlr_ray.lab.probe import Probe, probe
from rlr_ray.lab.subject import candidate_of, guides_of, subject_of
from rlr_ray.loop import Process, update
from rlr_ray.rewards import is_differentiable
from rlr_ray.state import TrainState

GIB = 2**30
_CHUNKS = 64  # of the families' statistics, if time allows
_PATIENCE_S = 30.0
_DIRECT_CHUNKS = 8  # of plans that are measured one by one


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
    measured_gib: float  # peak of a real update under the best plan
    notes: list[str] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Of the predicted peak, relative to the measured one."""
        return self.best.peak_gib / self.measured_gib - 1


def choose(config: RunConfig, say: Callable[[str], None]) -> Choice:
    """Measure, and choose the unbiased plan of least variance at equal cost that fits `memory_budget_gib`.

    Raises UserError if no unbiased plan fits.
    """
    planner = Planner(config, say)
    return planner.choose(config.memory_budget_gib)


class Planner:
    """One recipe's measurements, from which a plan is chosen for any budget."""

    def __init__(self, config: RunConfig, say: Callable[[str], None]):
        self.config, self.say = config, say
        self.exact = is_differentiable(config.reward.name, config.reward.differentiable)
        base = with_plan(config, {"preset": "ddpo"})  # any plan will do to build the engine
        self.engine = Engine(base)
        self.subject: Subject = subject_of(self.engine, self.engine.model.initial_theta)
        say("measuring memory and seconds of an update's parts")
        self.probe: Probe = probe(self.engine, self.subject, differentiable=self.exact)
        say("measuring the gradient's variance step by step")
        self.families: Families = gather(self.subject, self.exact, _CHUNKS, _PATIENCE_S)
        self.direct: dict[str, Option] = {}

    def choose(self, budget_gib: float | None) -> Choice:
        rule = self._rule(budget_gib)
        options = sorted(self._options(budget_gib, rule), key=lambda option: option.variance_cost)
        able = [option for option in options if option.fits and option.unbiased]
        if not able:
            least = min((option for option in options if option.unbiased), key=lambda option: option.peak_gib)
            raise UserError(
                f"memory_budget_gib is {budget_gib:g}, but the least that an unbiased plan needs is "
                f"{least.peak_gib:.3g} GiB ({least.name}); raise the budget, or lower train.chunk_size or "
                "estimator.zeroth_order.chunk_size"
            )
        self.say(f"checking the memory of {able[0].name} on a real update")
        return Choice(budget_gib, able[0], options, rule, len(self.families.rows), self.measured_peak(able[0]) / GIB)

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

    def _options(self, budget_gib: float | None, rule: PaperRule | None) -> Iterator[Option]:
        families = self.families
        if self.exact:
            for k in range(1, families.steps + 1):
                keys = {"preset": "full_bp"} if k == families.steps else reinforce(k)
                name = "full_bp" if k == families.steps else f"FO({k}) + REINFORCE"
                yield self._option(name, keys, families.reinforce_variance(k), (0.0, 0.0), budget_gib)
            for least in families.roulettes:
                variance = families.roulette_variance(least)
                yield self._option(
                    f"russian-roulette, at least {least}", roulette(least), variance, (0.0, 0.0), budget_gib
                )
            for k in sorted({1, min(3, families.steps - 1)} - {0}):
                variance, bias = families.truncated_variance(k), families.truncated_bias(k)
                yield self._option(f"alignprop, K = {k}", truncated(k), variance, (bias, float("nan")), budget_gib)
        if self.config.sampler.eta:
            yield self._option("ddpo", {"preset": "ddpo"}, families.reinforce_variance(0), (0.0, 0.0), budget_gib)
        for name, keys in self._one_by_one(rule).items():
            if name not in self.direct:
                self.say(f"measuring {name}")
                self.direct[name] = self._measure(name, keys)
            found = self.direct[name]
            variance, bias = (found.variance, found.variance_se), (found.relative_bias, found.relative_bias_se)
            yield self._option(name, keys, variance, bias, budget_gib)

    def _one_by_one(self, rule: PaperRule | None) -> dict[str, Estimator]:
        """Plans that the families do not hold."""
        steps = self.families.steps
        first = 1 if self.exact else 0
        plans: dict[str, Estimator] = {"es": {"preset": "es"}}
        if self.config.sampler.eta and steps > 2:
            plans |= {f"FO({first}) + HO, h = 2 cover": covered(first, 2)}
        if self.exact and self.config.sampler.eta:
            length = min(max(rule.length if rule else 2, 1), steps - 1)
            plans |= {f"rlr-paper, h = {length}": paper(length)} if length else {}
        if self.config.estimator.preset != "auto":
            plans |= {"the recipe's": self.config.estimator.model_dump(mode="json", exclude={"preset"})}
        return plans

    def _measure(self, name: str, keys: Estimator) -> Option:
        """A plan's variance and bias from a few chunks."""
        config = with_plan(self.config, keys)
        guided = config.plan_shape.has_zeroth_order and config.estimator.zeroth_order.directions == "guided"
        guides = guides_of(self.subject, config) if guided else None
        norms: list[float | None] = [None] * self.families.steps
        candidate = candidate_of(name, config, self.subject, guides, norms)
        reference = torch.stack(self.families.rows[:_DIRECT_CHUNKS])
        found = summarise(candidate, sample(self.subject, candidate, len(reference)), reference, self.families.chunk)
        variance, bias = (found.variance, found.variance_se), (found.relative_bias, found.relative_bias_se)
        return self._option(name, keys, variance, bias, None)

    def _option(self, name: str, keys: Estimator, variance: Spread, bias: Spread, budget_gib: float | None) -> Option:
        """Plain backpropagation where it fits, since it costs a forward a step less; else checkpointed."""
        plain, saving = keys | {"checkpoint_steps": False}, keys | {"checkpoint_steps": True}
        budget = float("inf") if budget_gib is None else budget_gib * GIB
        chosen = next((one for one in (plain, saving) if self._peak(one) <= budget), saving)
        config = with_plan(self.config, chosen)
        candidate = candidate_of(name, config, self.subject, None, [])
        plans = [candidate.plan(chunk) for chunk in range(64)]
        unbiased = not (candidate.shape.biased or "auto" in candidate.weights.values() or _guided(config))
        return Option(
            name,
            chosen,
            str(candidate.shape),
            unbiased,
            *variance,
            *bias,
            candidate.cost(plans),
            self._peak(chosen) / GIB,
            self._seconds(
                config,
                sum(plan.forwards(config.estimator.checkpoint_steps) for plan in plans) / 64,
                sum(plan.backwards for plan in plans) / 64,
            ),
            self._peak(chosen) <= budget,
        )

    def _peak(self, keys: Estimator) -> float:
        config = with_plan(self.config, keys)
        return self.probe.memory.peak(config.plan_shape, config.estimator.checkpoint_steps)

    def _seconds(self, config: RunConfig, forwards: float, backwards: float) -> float:
        chunks, zeroth = config.train.chains / config.train.chunk_size, config.estimator.zeroth_order
        seconds = chunks * (forwards * self.probe.seconds["forward"] + backwards * self.probe.seconds["backward"])
        rollouts = zeroth.count / zeroth.chunk_size if config.plan_shape.has_zeroth_order else 0
        return seconds + rollouts * self.probe.seconds["rollout"]


def _guided(config: RunConfig) -> bool:
    return config.plan_shape.has_zeroth_order and config.estimator.zeroth_order.directions == "guided"
