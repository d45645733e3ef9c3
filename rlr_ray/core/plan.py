"""Which order owns which step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlr_ray.core.schedule import Schedule
from rlr_ray.core.seeds import uniform_integer
from rlr_ray.errors import UserError

Rest = Literal["zeroth_order", "half_order", "none"]


@dataclass(frozen=True)
class Plan:
    """One update's owner of every step: first order the last ones, half order its sub-chains, zeroth order the rest."""

    steps: int  # T
    first_order: range
    sub_chains: tuple[range, ...]
    zeroth_order: tuple[int, ...]

    def forwards(self, checkpoint_steps: bool = False) -> int:
        """Denoiser forwards that a chain costs; a perturbation pair costs 2 T more."""
        again = len(self.first_order) if checkpoint_steps else 0
        return self.steps + again + sum(map(len, self.sub_chains))

    @property
    def backwards(self) -> int:
        """Denoiser backwards that a chain costs."""
        return len(self.first_order) + sum(map(len, self.sub_chains))

    def __str__(self) -> str:
        parts = [f"first order {_interval(self.first_order)}" if self.first_order else ""]
        parts += [f"half order {_interval(sub_chain)}" for sub_chain in self.sub_chains]
        parts += [f"zeroth order on {len(self.zeroth_order)} steps" if self.zeroth_order else ""]
        return ", ".join(filter(None, parts)) or "no step owned"


@dataclass(frozen=True)
class PlanShape:
    """What all updates' plans have in common; `draw` places the sub-chain for one update.

    The paper's estimator is K = 1 and `rest = "zeroth_order"`; its sub-chain j .. j+h has `sub_chain_length` h + 1.
    Raises UserError if the steps do not fit.
    """

    steps: int  # T
    first_order_steps: int  # K
    sub_chain_length: int  # h, 0 for none
    place: tuple[int, int] | None = None  # the sub-chain lies in steps [first, last], both included; None: anywhere
    rest: Rest = "zeroth_order"

    def __post_init__(self) -> None:
        if not 0 <= self.first_order_steps <= self.steps:
            raise UserError(
                f"estimator.first_order_steps is {self.first_order_steps}; allowed: 0 to sampler.steps ({self.steps})"
            )
        low, high = self.room
        if self.sub_chain_length and self.sub_chain_length > high - low + 1:
            raise UserError(
                f"a sub-chain of {self.sub_chain_length} steps does not fit in steps {low} to {high} "
                f"(T = {self.steps}, the last {self.first_order_steps} are first order); "
                f"allowed: 0 to {max(high - low + 1, 0)}; lower estimator.sub_chain.length, "
                "widen estimator.sub_chain.place or raise sampler.steps"
            )

    @property
    def room(self) -> tuple[int, int]:
        """First and last step that a sub-chain may own."""
        first, last = self.place or (0, self.steps - 1)
        return first, min(last, self.steps - self.first_order_steps - 1)

    @property
    def free_steps(self) -> int:
        """Steps that neither first order nor the sub-chain owns."""
        return self.steps - self.first_order_steps - self.sub_chain_length

    @property
    def has_zeroth_order(self) -> bool:
        return self.rest == "zeroth_order" and self.free_steps > 0

    @property
    def has_half_order(self) -> bool:
        return self.sub_chain_length > 0 or (self.rest == "half_order" and self.free_steps > 0)

    @property
    def biased(self) -> bool:
        """True if some step's gradient is dropped."""
        return self.rest == "none" and self.free_steps > 0

    def draw(self, *seed: int | str) -> Plan:
        """The plan of the update that `seed` names: the sub-chain's place is uniform over its room.

        Any law of the place leaves the sum unbiased, since the rest covers what the sub-chain does not.
        """
        tail = range(self.steps - self.first_order_steps, self.steps)
        sub_chains = []
        if self.sub_chain_length:
            low, high = self.room
            start = uniform_integer(low, high - self.sub_chain_length + 1, *seed, "place")
            sub_chains.append(range(start, start + self.sub_chain_length))
        owned = {k for steps in (tail, *sub_chains) for k in steps}
        free = tuple(k for k in range(self.steps) if k not in owned)
        if self.rest == "half_order":
            sub_chains += [range(k, k + 1) for k in free]
        zeroth = free if self.rest == "zeroth_order" else ()
        return Plan(self.steps, tail, tuple(sub_chains), zeroth)

    def check_noise(self, schedule: Schedule) -> None:
        """Raise UserError if half order may end at a step without noise."""
        low, high = self.room
        ends = range(low + self.sub_chain_length - 1, high + 1) if self.sub_chain_length else range(0)
        steps = range(self.steps - self.first_order_steps) if self.rest == "half_order" else ends
        silent = [k for k in steps if not schedule.sigma[k]]
        if silent:
            raise UserError(
                f"half order would end at step {silent[0]}, where the sampler adds no noise (sigma 0); "
                "set sampler.eta above 0, leave the step to first order, or use estimator.sub_chain.length: 0"
            )

    def __str__(self) -> str:
        places = "" if self.place is None else f" within steps {self.place[0]}-{self.place[1]}"
        parts = [f"first order on the last {self.first_order_steps}"] if self.first_order_steps else []
        if self.sub_chain_length:
            parts.append(f"half order on a sub-chain of {self.sub_chain_length}{places}")
        if self.free_steps:
            orders = {"zeroth_order": "zeroth order", "half_order": "half order, step by step,", "none": "nothing"}
            parts.append(f"{orders[self.rest]} on the other {self.free_steps}")
        return f"{self.steps} steps: " + "; ".join(parts) + (" (biased)" if self.biased else "")


def _interval(steps: range) -> str:
    return f"[{steps.start}, {steps.stop})"
