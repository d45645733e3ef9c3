"""The laboratory's work on a recipe: a reference, then every plan at equal denoiser cost."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlr_ray.config.checks import check_first_order
from rlr_ray.config.run import RunConfig
from rlr_ray.core.gradient import TERMS
from rlr_ray.errors import UserError
from rlr_ray.lab.measure import (
    LEAST_BATCHES,
    Candidate,
    Measurement,
    Subject,
    candidate_of,
    estimate_batch,
    guides_of,
    sample,
    subject_of,
    summarise,
)
from rlr_ray.lab.plans import NEUTRAL, Estimator, with_plan
from rlr_ray.lab.reference import Reference, chain_squares, exact_reference, half_order_variances, unbiased_reference
from rlr_ray.train.checkpoints import load_state
from rlr_ray.train.engine import Engine
from rlr_ray.train.held_out import standardised
from rlr_ray.train.state import TrainState
from rlr_ray.utils.files import Unreadable
from rlr_ray.utils.memory import memory_errors, peak_bytes

logger = logging.getLogger(__name__)
_PROFILE_BATCHES = 8


@dataclass(frozen=True)
class Result:
    """A plan's measurement on a model, with what a batch of it took."""

    measurement: Measurement
    peak_mib: float
    seconds: float  # per batch
    keys: Estimator

    def row(self) -> dict[str, Any]:
        """Flat, for tables and files."""
        row = asdict(self.measurement) | {"variance_cost": self.measurement.variance_cost}
        for kind in ("term_variances", "weights"):
            row |= {f"{name}_{kind[:-1].removeprefix('term_')}": row[kind].get(name) for name in TERMS}
            del row[kind]
        return row | {"peak_mib": self.peak_mib, "seconds_per_batch": self.seconds, "estimator": str(self.keys)}


class Laboratory:
    """A model at one theta, with its reference and the plans measured on it."""

    def __init__(self, config: RunConfig, theta: Tensor | None, guides: Tensor | None, batches: int):
        self.config, self.batches, self.guides = config, batches, guides
        self.engine = Engine(with_plan(config, NEUTRAL))
        start = self.engine.model.initial_theta if theta is None else theta.to(self.engine.device)
        if start.shape != self.engine.model.initial_theta.shape:
            raise UserError(
                f"the checkpoint has {len(start)} trained numbers, the recipe's adapter "
                f"{len(self.engine.model.initial_theta)}; give the recipe that the run was started with"
            )
        self.subject: Subject = subject_of(self.engine, start, standardised(self.engine))
        self.exact = config.differentiable

    def measure_reference(self) -> Reference:
        if not self.exact and not all(self.subject.sampler.schedule.sigma[: self.subject.sampler.trained]):
            raise UserError(
                "the reward is black-box and the sampler has a step without noise, so there is neither backpropagation "
                "nor half order on every step to hold estimates against; set sampler.eta: 1, or use a scheduler whose "
                "last step has noise (set_alpha_to_one: false)"
            )
        return (exact_reference if self.exact else unbiased_reference)(self.subject, self.batches)

    def candidate(self, name: str, keys: Estimator, reference: Reference) -> Candidate:
        """Raises UserError if the plan does not work with this recipe, or has a surrogate."""
        config = with_plan(self.config, keys)
        if config.estimator.surrogate is not None:
            raise UserError(
                "estimator.surrogate is what a run learns and weighs, so its plan cannot be measured here; leave it "
                "out; `rlr-ray plan` measures preset black-box before its surrogate is trusted and once it is"
            )
        check_first_order(config)
        shape = config.shape_on(self.subject.sampler.schedule)
        if self.guides is None and config.guided:
            self.guides = guides_of(self.subject, config)
        norms = reference.position_norms(shape.sub_chain_length)
        return candidate_of(name, config, self.subject, self.guides, norms)

    def measure(self, candidate: Candidate, keys: Estimator, reference: Reference, cost: float) -> Result:
        """Spend about `cost` denoiser forwards on a plan, or what the reference's batches allow.

        Memory is traced on the deepest plan of the first batches.
        """
        size, first = len(self.subject.groups), range(LEAST_BATCHES)
        wanted = cost / (candidate.cost([candidate.plan(number) for number in first]) * size)
        batches = min(max(math.ceil(wanted), LEAST_BATCHES), len(reference.rows))
        deepest = max(first, key=lambda number: len(candidate.plan(number).first_order))
        peak = peak_bytes(lambda: estimate_batch(self.subject, candidate, deepest), self.engine.device)
        started = time.monotonic()
        samples = sample(self.subject, candidate, batches)
        seconds = (time.monotonic() - started) / batches
        measured = summarise(candidate, samples, reference.rows[:batches], size)
        return Result(measured, peak / 2**20, seconds, keys)

    def profile(self, reference: Reference) -> list[dict[str, float]]:
        """A row for every step: the gradient's share, kappa, and the variance per chain that each order has there.

        Zeroth order's is the law of isotropic directions, P E|g|^2 - |E g|^2, with g a chain's exact gradient.
        """
        schedule, numbers = self.subject.sampler.schedule, len(self.subject.theta)
        half = half_order_variances(self.subject, min(_PROFILE_BATCHES, self.batches))
        squares = chain_squares(self.subject, self.batches) if self.exact else []
        total = sum(max(signal, 0.0) for signal in reference.signals) or 1.0
        rows = []
        for k, (signal, spread) in enumerate(zip(reference.signals, reference.step_variances, strict=True)):
            row = {"step": k, "timestep": schedule.timesteps[k], "sigma": schedule.sigma[k], "kappa": schedule.kappa[k]}
            row |= {"gradient_share": max(signal, 0.0) / total, "half_order_variance": half[k]}
            if self.exact:
                square, error = squares[k]
                row |= {"first_order_variance": spread, "zeroth_order_law": numbers * square - signal}
                row |= {"zeroth_order_law_se": numbers * error}
            rows.append(row)
        return rows


@memory_errors()
def compare(
    laboratory: Laboratory, plans: Mapping[str, Estimator], cost: float
) -> tuple[Reference, list[Result], dict[str, str]]:
    """Measure every plan; those that do not work with the recipe come back with the reason."""
    logger.info(f"reference: {laboratory.batches} batches of {len(laboratory.subject.groups)} chains")
    reference = laboratory.measure_reference()
    results, left_out = [], {}
    for name, keys in plans.items():
        try:
            candidate = laboratory.candidate(name, keys, reference)
        except UserError as error:
            left_out[name] = str(error)
            logger.info(f"left out {name}: {error}")
            continue
        logger.info(f"measuring {name}")
        results.append(laboratory.measure(candidate, keys, reference, cost))
    return reference, results, left_out


def standing_at(checkpoint: str | None, config: RunConfig) -> tuple[Tensor | None, Tensor | None]:
    """Theta [P] and the span of guided directions [k, P] at a checkpoint; None, None at the start of a run.

    Raises UserError for a file that is no checkpoint.
    """
    if checkpoint is None:
        return None, None
    if not Path(checkpoint).is_file():
        raise UserError(
            f"--at {checkpoint!r} is no file; give a checkpoint, e.g. runs/digits/checkpoints/update_000040.pt"
        )
    try:
        saved = load_state(Path(checkpoint), torch.device("cpu"))
    except Unreadable as error:
        raise UserError(f"--at {checkpoint!r} is no checkpoint of a run that can be used: it {error}") from error
    state = TrainState(saved["theta"], config.train, config.estimator)
    state.load_state_dict(saved)
    return saved["theta"], state.propose(config.sampler.steps).directions.basis
