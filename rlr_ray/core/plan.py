"""A plan: the owner of every denoising step, and what chains cost under it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Rest = Literal["zeroth_order", "half_order", "none"]
Position = Literal["uniform", "importance", "cover"] | tuple[int, int]  # the latter: first and last step, both included
Truncation = Literal["fixed", "russian_roulette", "random"]
Score = Literal["path", "branches", "forward"]


@dataclass(frozen=True)
class Plan:
    """Owner of every step of a chunk: first order the last ones, half order its sub-chains, zeroth order the rest.

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
    score: Score = "path"  # of half order
    sub_chain_weights: tuple[float, ...] | None = None  # inverse probabilities of those that are drawn; None: 1
    forward_steps: tuple[int, ...] = ()  # that a forward term draws from
    draws: int = 0  # of them, a chain
    adjoint_steps: tuple[int, ...] = ()  # first order by linear adjoints: the drawn steps, `step_weights` theirs

    @property
    def has_first_order(self) -> bool:
        return bool(self.first_order or self.adjoint_steps)

    @property
    def has_half_order(self) -> bool:
        return bool(self.sub_chains or self.forward_steps)

    @property
    def residual(self) -> bool:
        """True if the other orders carry what first order leaves, on whichever step they own."""
        return self.residual_from == 0

    def leaves(self, start: int) -> bool:
        """Whether half order from this step on carries what first order leaves of the reward, not the whole."""
        return self.residual_from is not None and start >= self.residual_from

    def forwards(self, checkpoint_steps: bool = False, *, pulled: bool = False) -> int:
        """Denoiser forwards that a chain costs; `pulled`: a forward term also asks its reference at each draw."""
        again = (self._passed if checkpoint_steps else 0) + (self.draws if pulled else 0)
        return self.steps + again + self._tails + self._differentiated

    @property
    def pair_forwards(self) -> int:
        """Denoiser forwards that a perturbation pair costs: its chains part at the first perturbed step."""
        return 2 * self.steps - self.zeroth_order[0] if self.zeroth_order else 0

    @property
    def backwards(self) -> int:
        """Denoiser backwards that a chain costs."""
        return self._passed + self._differentiated

    @property
    def sampled(self) -> int:
        """Steps that are sampled without gradients: all before first order's."""
        return self.first_order.start if self.first_order else self.steps

    @property
    def read(self) -> tuple[int, ...]:
        """Steps whose latents are kept while chains are sampled: the terms read them later, beside the last."""
        late = () if self.score != "branches" or self.sampled == self.steps else [one.stop for one in self.sub_chains]
        return tuple(sorted({*(one.start for one in self.sub_chains), *late, *self.adjoint_steps}))

    @property
    def free_forwards(self) -> int:
        """The part of a chain's denoiser forwards that needs no gradient: any process may run them."""
        return self.sampled + (self._tails if self.sampled == self.steps else 0)

    @property
    def _tails(self) -> int:
        """Steps of half order's partners."""
        return sum(self.steps - one.stop for one in self.sub_chains) if self.score == "branches" else 0

    @property
    def _passed(self) -> int:
        """Steps through which first order's gradient passes."""
        return len(self.first_order) + self.off if self.first_order else 0

    @property
    def _differentiated(self) -> int:
        """Steps that run once more, with gradients."""
        return len(self.adjoint_steps) + sum(map(len, self.sub_chains)) + self.draws

    def __str__(self) -> str:
        parts = [f"first order {_interval(self.first_order)}" if self.first_order else ""]
        parts += [f"first order at steps {_listed(self.adjoint_steps)}, linear" if self.adjoint_steps else ""]
        pairs = " by pairs" if self.score == "branches" else ""
        parts += [f"half order{pairs} {_interval(sub_chain)}" for sub_chain in self.sub_chains]
        parts += [f"forward term at steps {_listed(self.forward_steps)}" if self.forward_steps else ""]
        parts += [f"zeroth order on {len(self.zeroth_order)} steps" if self.zeroth_order else ""]
        return ", ".join(filter(None, parts)) or "no step owned"


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))


def _interval(steps: range) -> str:
    return f"[{steps.start}, {steps.stop})"
