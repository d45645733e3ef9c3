"""The range of steps that loses reward: where the forecast of each step's output falls.

T steps, n chains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.schedule import Schedule
from rlr_ray.errors import UserError
from rlr_ray.lab.measure import Subject

_Z = 3.0  # standard errors from which a change is one


@dataclass(frozen=True)
class Location:
    """Steps `first` .. `last`, both included, which lose the most reward."""

    first: int
    last: int
    loss: float  # fall of the forecast where the range begins, and rise where it ends
    recovers: bool  # False: where the range ends was not seen, so its length was the given one


@torch.no_grad()
def forecasts(subject: Subject, batches: int) -> Tensor:  # [T + 1, n]
    """Reward of the clean latent that each step's output predicts, of every chain; the last row: of the chain's end.

    No gradient is needed, so the reward may be a black box. With a right denoiser the clean latent is a martingale
    (E[next | latent] = this one), so a step after which it gets worse on average is one whose output is worse than the
    step before would have had it. Raises UserError if the schedule does not say what is clean.
    """
    if not subject.sampler.schedule.clean:
        raise UserError(
            "this model's schedule does not say which clean picture a step predicts, so there is none to rate"
        )
    return torch.cat([_of_chains(subject, number) for number in range(batches)], dim=1)


def _of_chains(subject: Subject, number: int) -> Tensor:  # [T + 1, B]
    schedule, columns = subject.sampler.schedule, []
    for chains in subject.batch(number):
        latent, rows = chains.x_start, []
        for k, (of_latent, of_output) in enumerate(schedule.clean):
            output = subject.sampler.output(subject.theta, k, latent, chains.conditioning)
            rows.append(chains.objective(of_latent * latent + of_output * output).cpu())
            latent = schedule.mean(k, latent, output) + schedule.sigma[k] * chains.noise[k]
        columns.append(torch.stack([*rows, chains.objective(latent).cpu()]))
    return torch.cat(columns, dim=1)


def changes(rewards: Tensor) -> list[tuple[float, float]]:  # [T + 1, n]
    """Mean and standard error of each step's forecast less the step before's, paired by chain; step 0 has none."""
    steps = (rewards[1:-1] - rewards[:-2]).double()
    means, errors = steps.mean(1), steps.std(1) / math.sqrt(steps.shape[1])
    return [(0.0, 0.0), *zip(means.tolist(), errors.tolist(), strict=True)]


def locate(rewards: Tensor, length: int) -> Location | None:  # [T + 1, n]
    """The range at whose first step the forecast falls and after whose last it rises by the most together.

    Changes below three standard errors count as none; None if there is no other. A range that begins at step 0 has only
    its rise, one after which the forecast does not recover only its fall: it is given `length` steps. It fails where
    steps do harm that no forecast shows, or where the reward rates blurred pictures, as early forecasts are, otherwise
    than sharp ones: then the forecast changes with the blur alone.
    """
    moves = [change if abs(change) >= _Z * error else 0.0 for change, error in changes(rewards)]
    steps = len(moves)
    best = None
    for first in range(steps):
        for stop in range(first + 1, steps + 1):
            fall, rise = max(-moves[first], 0.0), max(moves[stop], 0.0) if stop < steps else 0.0
            if (first and not fall) or not fall + rise:
                continue
            end = stop if rise else min(first + length, steps)
            candidate = Location(first, end - 1, fall + rise, bool(rise))
            if best is None or candidate.loss > best.loss:
                best = candidate
    return best


def bounds(location: Location, steps: int) -> dict[str, int]:
    """First steps of mid and fine such that the range is a stage of its own, as far as three stages allow."""
    first, stop = location.first, location.last + 1
    if first == 0:
        mid, fine = stop, (stop + steps) // 2
    elif stop == steps:
        mid, fine = first // 2, first
    else:
        mid, fine = first, stop
    mid = min(max(mid, 1), steps - 2)
    return {"mid": mid, "fine": min(max(fine, mid + 1), steps - 1)}


def free_steps(location: Location, shape: PlanShape, schedule: Schedule) -> range:
    """The steps of the range that a sub-chain may own: none of first order's, and the last one has noise."""
    stop = max(min(location.last + 1, shape.free_stop), location.first)
    while stop > location.first and not schedule.sigma[stop - 1]:
        stop -= 1
    return range(location.first, stop)


def step_rows(rewards: Tensor, schedule: Schedule) -> list[dict[str, float]]:  # [T + 1, n]
    """A row for every step."""
    means = rewards.double().mean(1).tolist()
    rows = zip(schedule.timesteps, means[:-1], changes(rewards), strict=True)
    return [
        {"step": k, "timestep": timestep, "forecast": mean, "change": change, "change_se": error}
        for k, (timestep, mean, (change, error)) in enumerate(rows)
    ]
