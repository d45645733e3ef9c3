"""Which order owns which step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlr_ray.core.positions import covering_blocks, uniform_blocks, weighted_block
from rlr_ray.core.schedule import Schedule
from rlr_ray.core.seeds import uniform
from rlr_ray.errors import UserError

Rest = Literal["zeroth_order", "half_order", "none"]
Position = Literal["uniform", "importance", "cover"] | tuple[int, int]  # the latter: first and last step, both included
Truncation = Literal["fixed", "russian_roulette", "random"]

_GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, spread evenly whatever their number


@dataclass(frozen=True)
class Plan:
    """One chunk's owner of every step: first order the last ones, half order its sub-chains, zeroth order the rest.

    First order may carry a part of the reward only: a differentiable surrogate of it, or those of several rewards that
    are differentiable. From the step `residual_from` on, the other orders then carry what that leaves of the reward;
    before it, the whole.
    """

    steps: int  # T
    first_order: range
    sub_chains: tuple[range, ...]
    zeroth_order: tuple[int, ...]
    step_weights: tuple[float, ...] | None = None  # factor of each first-order step's gradient; None: 1
    residual_from: int | None = None  # None: first order carries the whole reward
    off: int = 0  # last steps, the base model's, which nothing owns and first order's gradient passes

    @property
    def residual(self) -> bool:
        """True if the other orders carry what first order leaves, on whichever step they own."""
        return self.residual_from == 0

    def leaves(self, sub_chain: range) -> bool:
        """Whether a sub-chain carries what first order leaves of the reward, not the whole."""
        return self.residual_from is not None and sub_chain.start >= self.residual_from

    def forwards(self, checkpoint_steps: bool = False) -> int:
        """Denoiser forwards that a chain costs."""
        again = self._passed if checkpoint_steps else 0
        return self.steps + again + sum(map(len, self.sub_chains))

    @property
    def pair_forwards(self) -> int:
        """Denoiser forwards that a perturbation pair costs: its chains part at the first perturbed step."""
        return 2 * self.steps - self.zeroth_order[0] if self.zeroth_order else 0

    @property
    def backwards(self) -> int:
        """Denoiser backwards that a chain costs."""
        return self._passed + sum(map(len, self.sub_chains))

    @property
    def sampled(self) -> int:
        """Steps that are sampled without gradients: all before first order's."""
        return self.first_order.start if self.first_order else self.steps

    @property
    def _passed(self) -> int:
        """Steps through which first order's gradient passes."""
        return len(self.first_order) + self.off if self.first_order else 0

    def __str__(self) -> str:
        parts = [f"first order {_interval(self.first_order)}" if self.first_order else ""]
        parts += [f"half order {_interval(sub_chain)}" for sub_chain in self.sub_chains]
        parts += [f"zeroth order on {len(self.zeroth_order)} steps" if self.zeroth_order else ""]
        return ", ".join(filter(None, parts)) or "no step owned"


@dataclass(frozen=True)
class PlanShape:
    """What all updates of a run share; `draw` makes one chunk's plan of it. Raises UserError if it cannot be drawn.

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

    def __post_init__(self) -> None:
        if not 0 <= self.first_order_steps <= self.trained:
            less = f" less the {self.off} of the base model" if self.off else ""
            raise UserError(
                f"`first_order_steps` is {self.first_order_steps}; allowed: 0 to `steps` ({self.steps}){less}"
            )
        if self.truncation != "fixed":
            self._check_truncation()
        if self.residual and self.truncation != "russian_roulette" and self.first_order_steps < self.trained:
            raise UserError(
                "a surrogate needs its gradient through every step, found `first_order_steps` "
                f"{self.first_order_steps} with `truncation` {self.truncation!r}; raise `first_order_steps` to all "
                f"{self.trained}, or set `truncation` to russian_roulette (either with `checkpoint_steps`)"
            )
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
        if not self.first_order_steps:
            raise UserError(
                f"`truncation` {self.truncation!r} backpropagates at least 1 step, found `first_order_steps` 0; set "
                "`first_order_steps` to the least number of steps, or `truncation` to fixed"
            )
        if not self.residual and (self.sub_chain_length or self.rest != "none"):
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

    @property
    def trained(self) -> int:
        """The orders own steps 0 .. trained - 1 between them."""
        return self.steps - self.off

    @property
    def free_stop(self) -> int:
        """Half and zeroth order own steps 0 .. free_stop - 1 between them."""
        if self.residual:
            return self.trained
        return 0 if self.truncation != "fixed" else self.trained - self.first_order_steps

    @property
    def residual_from(self) -> int | None:
        """The first step at which half and zeroth order carry what first order leaves of the reward."""
        if self.residual:
            return 0
        return self.free_stop if self.mixed and self.first_order_steps else None

    @property
    def _mixed_blocks(self) -> list[range]:
        """Sub-chains on the steps of first order, for the rewards that it cannot carry."""
        if self.residual or self.residual_from is None:
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
        return self.free_stop - self.sub_chain_length * self.sub_chain_count

    @property
    def has_zeroth_order(self) -> bool:
        return self.rest == "zeroth_order" and self.free_steps > 0

    @property
    def has_half_order(self) -> bool:
        return bool(self.sub_chain_length or (self.rest == "half_order" and self.free_steps) or self._mixed_blocks)

    @property
    def biased(self) -> bool:
        """True if some step's gradient is dropped."""
        return self.truncation == "random" or (self.rest == "none" and self.free_steps > 0)

    def draw(self, *seed: int | str, chunk: int = 0, position_weights: Sequence[float] | None = None) -> Plan:
        """The plan of the update that `seed` names, for one of its chunks.

        Sub-chains lie at the same place in all chunks, so that the other orders' steps are the same ones; any law of
        the place leaves the sum unbiased, since the rest covers what the sub-chains do not. `position_weights` [T] is
        the law of an `importance` sub-chain's start (None: uniform). A random depth is each chunk's own.
        """
        depth, weights = self._depth(*seed, chunk=chunk)
        sub_chains = self._sub_chains(*seed, position_weights=position_weights)
        owned = {k for sub_chain in sub_chains for k in sub_chain}
        free = [k for k in range(self.free_stop) if k not in owned]
        if self.rest == "half_order":
            sub_chains += [range(k, k + 1) for k in free]
        return Plan(
            self.steps,
            range(self.trained - depth, self.trained),
            (*sub_chains, *self._mixed_blocks),
            tuple(free) if self.rest == "zeroth_order" else (),
            weights,
            self.residual_from,
            self.off,
        )

    def _depth(self, *seed: int | str, chunk: int) -> tuple[int, tuple[float, ...] | None]:
        """How many steps a chunk backpropagates, uniform over K .. all unless fixed, and the steps' weights.

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
        """Raise UserError if half order may end at a step without noise."""
        silent = [k for k in self._possible_ends() if not schedule.sigma[k]]
        if silent:
            raise UserError(
                f"half order would end at step {silent[0]}, where the sampler adds no noise (sigma 0); "
                "set `eta` above 0, leave the step to first order, or set `sub_chain_length` to 0"
            )

    def _possible_ends(self) -> list[int]:
        mixed, (low, stop) = [block[-1] for block in self._mixed_blocks], self.room
        if self.rest == "half_order":
            return [*range(self.free_stop), *mixed]
        if not self.sub_chain_length:
            return mixed
        if self.position == "cover":
            return [block[-1] for block in covering_blocks(low, stop, self.sub_chain_length)] + mixed
        return [*range(low + self.sub_chain_length - 1, stop), *mixed]

    def __str__(self) -> str:
        parts = []
        if self.sub_chain_length:
            parts.append(f"half order on {self._sub_chain_words()}")
        if self.free_steps > 0:
            orders = {"zeroth_order": "zeroth order", "half_order": "half order, step by step,", "none": "nothing"}
            others = "every step" if self.free_steps == self.trained else f"the other {self.free_steps}"
            parts.append(f"{orders[self.rest]} on {others}")
        if self.residual:
            parts[0] = f"of what that leaves of the reward: {parts[0]}"
        if self.first_order_steps:
            parts.insert(0, self._first_order_words())
        base = f", the last {f'{self.off} ' if self.off > 1 else ''}without the adapter" if self.off else ""
        return f"{self.steps} steps{base}: " + "; ".join(parts) + (" (biased)" if self.biased else "")

    def _first_order_words(self) -> str:
        count = f"the last {self.first_order_steps}"
        if self.truncation != "fixed":
            law = {"russian_roulette": "divided by its probability", "random": "unweighted"}[self.truncation]
            count += f" and a random number of earlier ones, each {law}"
        elif self.first_order_steps == self.trained:
            count = "every step"
        of = "of the surrogate " if self.residual else "of the differentiable rewards " if self.mixed else ""
        others = ", half order there of the others" if self._mixed_blocks else ""
        return f"first order {of}on {count}{others}"

    def _sub_chain_words(self) -> str:
        length = f"{self.sub_chain_length} step{'s' * (self.sub_chain_length > 1)}"
        if self.position == "cover":
            return f"sub-chains of {length} that cover {'every step' if self.residual else 'the others'}"
        many = f"{self.sub_chain_count} sub-chains" if self.sub_chain_count > 1 else "a sub-chain"
        places = {"uniform": "", "importance": " drawn by gradient norm"}
        where = (
            places[self.position]
            if isinstance(self.position, str)
            else f" within steps {self.position[0]}-{self.position[1]}"
        )
        return f"{many} of {length}{where}"


def inverse_probabilities(steps: int, least: int) -> tuple[float, ...]:  # [T]
    """1 / probability that a step is among the last K of `steps`, K uniform on least .. steps."""
    choices = steps - least + 1
    return tuple(choices / min(k + 1, choices) for k in range(steps))


def _interval(steps: range) -> str:
    return f"[{steps.start}, {steps.stop})"
