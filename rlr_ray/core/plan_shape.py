"""The law by which a run's plans are drawn: which order may own which step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlr_ray.core.half_order import draw_branches
from rlr_ray.core.plan import Plan, Position, Rest, Score, Truncation
from rlr_ray.core.plan_words import shape_words
from rlr_ray.core.positions import covering_blocks, uniform_blocks, weighted_block
from rlr_ray.core.schedule import Schedule
from rlr_ray.core.seeds import permutation, uniform
from rlr_ray.errors import UserError

_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, spread evenly whatever their number


@dataclass(frozen=True)
class PlanShape:
    """The part of a plan that all updates share; `draw` makes a chunk's plan. Raises UserError if none can be drawn.

    Its errors name parameters in backquotes, which config.estimator.in_keys turns into a recipe's keys.
    """

    steps: int  # T
    first_order_steps: int  # K, of those that are not off; the least number if truncation is not fixed
    sub_chain_length: int  # h, 0 for none
    position: Position = "uniform"
    rest: Rest = "zeroth_order"
    sub_chain_count: int = 1
    truncation: Truncation = "fixed"
    residual: bool = False  # first order carries a surrogate
    mixed: bool = False  # first order carries the differentiable ones of several rewards, half order the others there
    off: int = 0  # last steps, the base model's, which no order owns
    score: Score = "path"
    branch_steps: int | None = None  # branches: sub-chains that are drawn of all, each update; None: all
    draws: int = 0  # forward: K, a chain
    forward_steps: tuple[int, ...] = ()  # forward: steps it may draw; those of first order for what that leaves alone
    linear: bool = False  # first order by linear adjoints at K steps drawn from all
    switch: bool = False  # first order carries black boxes once their surrogates are trusted; see `carrying`

    def __post_init__(self) -> None:
        if not 0 <= self.first_order_steps <= self.trained:
            less = f" less the {self.off} of the base model" if self.off else ""
            raise UserError(
                f"`first_order_steps` is {self.first_order_steps}; allowed: 0 to `steps` ({self.steps}){less}"
            )
        if self.truncation != "fixed" or self.linear:
            self._check_truncation()
        if self.score == "forward" and self.rest == "half_order":
            raise UserError(
                "`score` 'forward' has no step of its own to go along with, so `rest` 'half_order' says nothing; set "
                "`rest` to none or zeroth_order, or `score` to path or branches"
            )
        if self.residual and self.truncation != "russian_roulette" and self.first_order_steps < self.trained:
            raise UserError(
                "a surrogate needs its gradient through every step, found `first_order_steps` "
                f"{self.first_order_steps} with `truncation` {self.truncation!r}; raise `first_order_steps` to all "
                f"{self.trained}, or set `truncation` to russian_roulette (either with `checkpoint_steps`)"
            )
        self._check_position()

    def _check_position(self) -> None:
        if self.position == "importance" and self.sub_chain_count > 1:
            raise UserError(
                f"`position` 'importance' draws one sub-chain, found `sub_chain_count` {self.sub_chain_count}; set "
                "`sub_chain_count` to 1 or `position` to uniform"
            )
        if self.position == "importance" and self.mixed and self.first_order_steps:
            raise UserError(
                "`position` 'importance' goes by half order's norm at the sub-chain alone, but half order also "
                "carries what first order leaves of the reward; set `position` to uniform"
            )
        if self.position == "cover" and self.sub_chain_count > 1:
            raise UserError(
                "`position` 'cover' makes as many sub-chains as it needs, found `sub_chain_count` "
                f"{self.sub_chain_count}; leave `sub_chain_count` out"
            )
        low, stop = self.room
        needed = self.sub_chain_length * (1 if self.position == "cover" else self.sub_chain_count)
        if self.sub_chain_length and needed > stop - low:
            many = f"{self.sub_chain_count} sub-chains" if self.sub_chain_count > 1 else "a sub-chain"
            raise UserError(
                f"{many} of {self.sub_chain_length} steps does not fit in steps {low} to {stop - 1} "
                f"(T = {self.steps}, the last {self.steps - self.free_stop} are "
                f"first order{' or the base model' * bool(self.off)}); "
                f"allowed: 0 to {max(stop - low, 0) // self.sub_chain_count}; lower `sub_chain_length`, "
                "widen `position` or raise `steps`"
            )

    def _check_truncation(self) -> None:
        if self.linear and (self.truncation != "fixed" or self.residual):
            raise UserError(
                "`adjoint` 'linear' draws its steps evenly from all, for a reward or a surrogate that is switched to; "
                "set `truncation` to fixed, and the surrogate's `use` to switch"
            )
        if not self.first_order_steps:
            raise UserError(
                f"`truncation` {self.truncation!r} backpropagates at least 1 step, found `first_order_steps` 0; set "
                "`first_order_steps` to the least number of steps, or `truncation` to fixed"
            )
        if self.truncation != "fixed" and not self.residual and (self.sub_chain_length or self.rest != "none"):
            raise UserError(
                f"`truncation` {self.truncation!r} gives every step to first order, so nothing is left for the other "
                "orders; set `sub_chain_length` to 0 and `rest` to none, or `truncation` to fixed"
            )

    def without_last(self, off: int) -> PlanShape:
        """This plan where so many last steps are the base model's: its orders then end before them."""
        return replace(self, off=off, first_order_steps=min(self.first_order_steps, self.steps - off)) if off else self

    def without_surrogate(self) -> PlanShape:
        """The plan of an update whose surrogate is not trusted: the other orders' steps are the same ones."""
        if not self.residual:
            return self
        return replace(self, first_order_steps=0, truncation="fixed", residual=False)

    def carrying(self, carried: int, of: int) -> PlanShape:
        """The plan of an update whose first order can carry so many `of` the reward's parts."""
        if not carried:
            return replace(self, first_order_steps=0, truncation="fixed", linear=False, mixed=False, switch=False)
        return replace(self, mixed=carried < of, switch=False)

    @property
    def alternatives(self) -> list[PlanShape]:
        """The plans that an update may have, that before any surrogate is trusted first."""
        return [self.carrying(int(self.mixed), 2), self.carrying(1, 2), self.carrying(2, 2)] if self.switch else [self]

    @property
    def trained(self) -> int:
        """The orders own steps 0 .. trained - 1 between them."""
        return self.steps - self.off

    @property
    def free_stop(self) -> int:
        """Half and zeroth order own steps 0 .. free_stop - 1 between them."""
        if self.residual:
            return self.trained
        if self.linear and self.first_order_steps:
            return 0
        return 0 if self.truncation != "fixed" else self.trained - self.first_order_steps

    @property
    def residual_from(self) -> int | None:
        """The first step at which half and zeroth order carry what first order leaves of the reward."""
        if self.residual:
            return 0
        return self.free_stop if self.mixed and self.first_order_steps else None

    @property
    def mixed_blocks(self) -> list[range]:
        """Sub-chains on the steps of first order, for the rewards that it cannot carry."""
        if self.residual or self.residual_from is None or self.score == "forward":
            return []
        return covering_blocks(self.residual_from, self.trained, max(self.sub_chain_length, 1))

    @property
    def room(self) -> tuple[int, int]:
        """First step that a sub-chain may own, and the one after the last."""
        first, last = self.position if isinstance(self.position, tuple) else (0, self.steps - 1)
        return first, min(last + 1, self.free_stop)

    @property
    def free_steps(self) -> int:
        """Steps that neither first order nor a sub-chain owns."""
        if self.position == "cover" and self.sub_chain_length:
            return 0
        forward = sum(k < self.free_stop for k in self.forward_possible)
        return self.free_stop - self.sub_chain_length * self.sub_chain_count - forward

    @property
    def forward_possible(self) -> tuple[int, ...]:
        """Steps that a forward term draws from: those in its range that first order does not carry whole, or one."""
        if self.score != "forward":
            return ()
        stop = self.trained if self.residual_from is not None else self.free_stop
        return tuple(k for k in self.forward_steps if k < stop) or tuple(range(stop)[-1:])

    @property
    def has_zeroth_order(self) -> bool:
        if self.switch:
            return any(shape.has_zeroth_order for shape in self.alternatives)
        return self.rest == "zeroth_order" and self.free_steps > 0

    @property
    def has_half_order(self) -> bool:
        if self.switch:
            return any(shape.has_half_order for shape in self.alternatives)
        step_by_step = self.rest == "half_order" and self.free_steps
        return bool(self.sub_chain_length or step_by_step or self.mixed_blocks or self.forward_possible)

    @property
    def biased(self) -> bool:
        """True if some step's gradient is dropped, or what stands for it has another expectation."""
        if self.switch or self.linear or self.truncation == "random" or self.forward_possible:
            return True
        return self.rest == "none" and self.free_steps > 0

    def draw(self, *seed: int | str, chunk: int = 0, position_weights: Sequence[float] | None = None) -> Plan:
        """The plan of the update that `seed` names, for one of its chunks.

        Sub-chains lie at the same place in all chunks, so that the other orders' steps are the same ones; any law of
        the place leaves the sum unbiased, since the rest covers what the sub-chains do not. `position_weights` [T] is
        the law of an `importance` sub-chain's start (None: uniform). A random depth is each chunk's own. Of a plan that
        switches, that before any surrogate is trusted.
        """
        if self.switch:
            return self.alternatives[0].draw(*seed, chunk=chunk, position_weights=position_weights)
        depth, weights = self._depth(*seed, chunk=chunk)
        sub_chains = self._sub_chains(*seed, position_weights=position_weights)
        owned = {k for sub_chain in sub_chains for k in sub_chain} | {*self.forward_possible}
        free = [k for k in range(self.free_stop) if k not in owned]
        if self.rest == "half_order":
            sub_chains += [range(k, k + 1) for k in free]
        drawn, sub_chain_weights = self._drawn([*sub_chains, *self.mixed_blocks], *seed)
        adjoint: tuple[int, ...] = ()  # a chunk's own
        if self.linear:
            adjoint = tuple(sorted(permutation(self.trained, *seed, "adjoint", chunk)[: self.first_order_steps]))
        return Plan(
            self.steps,
            range(self.trained - (0 if adjoint else depth), self.trained),
            drawn,
            tuple(free) if self.rest == "zeroth_order" else (),
            (self.trained / len(adjoint),) * len(adjoint) if adjoint else weights,
            self.residual_from,
            self.off,
            self.score,
            sub_chain_weights,
            self.forward_possible,
            self.draws if self.forward_possible else 0,
            adjoint,
        )

    def _drawn(self, sub_chains: list[range], *seed: int | str) -> tuple[tuple[range, ...], tuple[float, ...] | None]:
        """The sub-chains of an update and their inverse probabilities, where not all are branched."""
        count = len(sub_chains)
        if self.score != "branches" or self.branch_steps is None or self.branch_steps >= count:
            return tuple(sub_chains), None
        drawn, inverse = draw_branches(sub_chains, self.branch_steps, *seed, "branches")
        return tuple(drawn), (inverse,) * len(drawn)

    def _depth(self, *seed: int | str, chunk: int) -> tuple[int, tuple[float, ...] | None]:
        """Number of steps that a chunk backpropagates, uniform over K .. all unless fixed, and the steps' weights.

        Russian roulette divides by the probability of reaching a step, which makes first order unbiased for all.
        """
        least, steps = self.first_order_steps, self.trained
        if self.truncation == "fixed":
            return least, None
        choices = steps - least + 1
        depth = least + int((uniform(*seed, "depth") + chunk * _GOLDEN) % 1 * choices)
        if self.truncation == "random":
            return depth, None
        return depth, inverse_probabilities(steps, least)[steps - depth :]

    def _sub_chains(self, *seed: int | str, position_weights: Sequence[float] | None) -> list[range]:
        length, (low, stop) = self.sub_chain_length, self.room
        if not length:
            return []
        if self.position == "cover":
            return covering_blocks(low, stop, length)
        if self.position == "importance" and position_weights is not None:
            return [weighted_block(low, stop, length, position_weights, *seed, "place")]
        return uniform_blocks(low, stop, length, self.sub_chain_count, *seed, "place")

    def check_noise(self, schedule: Schedule) -> None:
        """Raise UserError if half order may end at a step without noise; a forward term needs none."""
        if self.switch:
            for shape in self.alternatives:
                shape.check_noise(schedule)
            return
        silent = [k for k in self._possible_ends() if not schedule.sigma[k]]
        if silent:
            raise UserError(
                f"half order would end at step {silent[0]}, where the sampler adds no noise (sigma 0); "
                "set `eta` above 0, leave the step to first order, let sub-chains end at steps with noise by "
                "estimator.sub_chain.place: [first, last], or set `sub_chain_length` to 0"
            )

    def _possible_ends(self) -> list[int]:
        if self.score == "forward":
            return []
        mixed, (low, stop) = [block[-1] for block in self.mixed_blocks], self.room
        if self.rest == "half_order":
            return [*range(self.free_stop), *mixed]
        if not self.sub_chain_length:
            return mixed
        if self.position == "cover":
            return [block[-1] for block in covering_blocks(low, stop, self.sub_chain_length)] + mixed
        return [*range(low + self.sub_chain_length - 1, stop), *mixed]

    def __str__(self) -> str:
        return shape_words(self)


def inverse_probabilities(steps: int, least: int) -> tuple[float, ...]:  # [T]
    """1 / probability that a step is among the last K of `steps`, K uniform on least .. steps."""
    choices = steps - least + 1
    return tuple(choices / min(k + 1, choices) for k in range(steps))
