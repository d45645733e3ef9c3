"""What a plan needs of memory, from a few measured parts, and the paper's rule for the length of its sub-chain."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlr_ray.core.plan import PlanShape


@dataclass(frozen=True)
class Line:
    """Bytes of a part with n differentiated steps: `first + (n - 1) * further`."""

    first: float
    further: float

    def at(self, steps: int) -> float:
        return self.first + (steps - 1) * self.further if steps else 0.0


@dataclass(frozen=True)
class MemoryModel:
    """Peak bytes of one process that does all of an update; its parts follow each other, so the worst one counts.

    Every part is measured on one chunk, beyond what is held all along.
    """

    held: float  # weights, the update's chains and trajectories, the gradients of its chunks
    sampling: float  # a chunk's chains without gradients
    first_order: Line  # plain backpropagation of the last K steps, the decoder and the reward
    first_order_checkpointed: Line
    half_order: Line  # a sub-chain of h steps
    rollout: float  # a chunk of perturbation pairs

    def parts(self, shape: PlanShape, checkpoint_steps: bool) -> dict[str, float]:
        """Bytes of each part that the plan has, beyond what is held. A random depth counts as the whole chain."""
        depth = shape.first_order_steps if shape.truncation == "fixed" else shape.steps
        line = self.first_order_checkpointed if checkpoint_steps else self.first_order
        length = max(shape.sub_chain_length, 1) if shape.has_half_order else 0
        return {
            "sampling": self.sampling,
            "first_order": line.at(depth),
            "half_order": self.half_order.at(length),
            "zeroth_order": self.rollout if shape.has_zeroth_order else 0.0,
        }

    def peak(self, shape: PlanShape, checkpoint_steps: bool) -> float:
        """Bytes at the worst moment of an update."""
        return self.held + max(self.parts(shape, checkpoint_steps).values())


def closed_form_length(
    budget: float,
    memory_half: float,  # B_h
    memory_zeroth: float,  # B_z
    variance_half: float,  # V_h
    variance_zeroth: float,  # V_z
    steps: int,  # T
) -> int:
    """The paper's h* (equation 8), at least 0:

    `min(floor((B - B_z (T-1)) / (B_h - B_z)), floor(T V_z / (2 (V_z - V_h)) - 1))`, from the memory model
    `B_h h + B_z (T - 1 - h) <= B` of steps whose memory adds up. Where zeroth order costs no less memory or has no more
    variance than half order, the paper's premises fail: then the term with them does not bind.
    """
    by_memory = by_variance = math.inf
    if memory_half > memory_zeroth:
        by_memory = (budget - memory_zeroth * (steps - 1)) / (memory_half - memory_zeroth)
    if variance_zeroth > variance_half:
        by_variance = steps * variance_zeroth / (2 * (variance_zeroth - variance_half)) - 1
    return max(math.floor(min(by_memory, by_variance, steps - 1)), 0)
