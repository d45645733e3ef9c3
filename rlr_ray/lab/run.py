"""The laboratory's work on a recipe: a reference, then every plan at equal denoiser cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from rlr_ray.config import RunConfig
from rlr_ray.core.gradient import TERMS
from rlr_ray.engine import Engine, check_reward
from rlr_ray.errors import UserError
from rlr_ray.lab.measure import Candidate, Measurement, Subject, estimate_chunk, sample, summarise
from rlr_ray.lab.memory import peak_bytes
from rlr_ray.lab.plans import Estimator, with_plan
from rlr_ray.lab.reference import Reference, exact_reference, half_order_variances, unbiased_reference
from rlr_ray.lab.subject import candidate_of, guides_of, subject_of
from rlr_ray.rewards import is_differentiable

_LEAST_CHUNKS = 8
_PROFILE_CHUNKS = 8


@dataclass(frozen=True)
class Result:
    """A plan's measurement on a model, with what a chunk of it took."""

    measurement: Measurement
    peak_mib: float
    seconds: float  # per chunk
    keys: Estimator

    def row(self) -> dict[str, Any]:
        """Flat, for tables and files."""
        row = asdict(self.measurement) | {"variance_cost": self.measurement.variance_cost}
        for kind in ("term_variances", "weights"):
            row |= {f"{name}_{kind[:-1].removeprefix('term_')}": row[kind].get(name) for name in TERMS}
            del row[kind]
        return row | {"peak_mib": self.peak_mib, "seconds_per_chunk": self.seconds, "estimator": str(self.keys)}


class Laboratory:
    """One model at one theta, its reference, and the plans measured on it."""

    def __init__(self, config: RunConfig, theta: Tensor | None, guides: Tensor | None, chunks: int):
        self.config, self.chunks = config, chunks
        self.engine = Engine(config)
        start = self.engine.model.initial_theta if theta is None else theta.to(self.engine.device)
        self.subject: Subject = subject_of(self.engine, start)
        self.exact = is_differentiable(config.reward.name, config.reward.differentiable)
        self.guides = guides_of(self.subject, config) if guides is None and self._guided() else guides

    def _guided(self) -> bool:
        return self.config.plan_shape.has_zeroth_order and self.config.estimator.zeroth_order.directions == "guided"

    def measure_reference(self) -> Reference:
        if not self.exact and not self.config.sampler.eta:
            raise UserError(
                "the reward is black-box and sampler.eta is 0, so there is neither backpropagation nor half order to "
                "hold estimates against; set sampler.eta: 1 for the laboratory"
            )
        return (exact_reference if self.exact else unbiased_reference)(self.subject, self.chunks)

    def candidate(self, name: str, keys: Estimator, reference: Reference) -> Candidate:
        """Raises UserError if the plan does not work with this recipe."""
        config = with_plan(self.config, keys)
        check_reward(config)
        config.plan_shape.check_noise(self.subject.schedule)
        zeroth = config.estimator.zeroth_order
        if self.guides is None and config.plan_shape.has_zeroth_order and zeroth.directions == "guided":
            self.guides = guides_of(self.subject, config)
        norms = reference.place_norms(config.plan_shape.sub_chain_length)
        return candidate_of(name, config, self.subject, self.guides, norms)

    def measure(self, candidate: Candidate, keys: Estimator, reference: Reference, cost: float) -> Result:
        """Spend about `cost` denoiser forwards on a plan; memory is traced on a chunk more."""
        size = len(self.subject.groups)
        wanted = cost / (candidate.cost([candidate.plan(c) for c in range(_LEAST_CHUNKS)]) * size)
        chunks = min(max(math.ceil(wanted), _LEAST_CHUNKS), len(reference.rows))
        peak = peak_bytes(lambda: estimate_chunk(self.subject, candidate, 0), self.engine.device)
        started = time.monotonic()
        samples = sample(self.subject, candidate, chunks)
        seconds = (time.monotonic() - started) / chunks
        measured = summarise(candidate, samples, reference.rows[:chunks], size)
        return Result(measured, peak / 2**20, seconds, keys)

    def profile(self, reference: Reference) -> list[dict[str, float]]:
        """One row a step: the gradient's share, kappa, and the variance per chain that each order has there.

        Zeroth order's is the law of isotropic directions, (P + 2) E|g|^2 - |E g|^2, with g a chain's exact gradient.
        """
        schedule, numbers = self.subject.schedule, len(self.subject.theta)
        half = half_order_variances(self.subject, min(_PROFILE_CHUNKS, self.chunks))
        total = sum(max(signal, 0.0) for signal in reference.signals) or 1.0
        rows = []
        for k, (signal, spread) in enumerate(zip(reference.signals, reference.step_variances, strict=True)):
            row = {"step": k, "timestep": schedule.timesteps[k], "sigma": schedule.sigma[k], "kappa": schedule.kappa[k]}
            row |= {"gradient_share": max(signal, 0.0) / total, "half_order_variance": half[k]}
            if self.exact:
                row |= {"first_order_variance": spread, "zeroth_order_law": (numbers + 2) * (signal + spread) - signal}
            rows.append(row)
        return rows


def compare(
    laboratory: Laboratory, plans: Mapping[str, Estimator], cost: float, say: Callable[[str], None]
) -> tuple[Reference, list[Result]]:
    """Measure every plan; one that does not work with the recipe is named and left out."""
    say(f"reference: {laboratory.chunks} chunks of {len(laboratory.subject.groups)} chains")
    reference = laboratory.measure_reference()
    results = []
    for name, keys in plans.items():
        try:
            candidate = laboratory.candidate(name, keys, reference)
        except UserError as error:
            say(f"left out {name}: {error}")
            continue
        say(f"measuring {name}")
        results.append(laboratory.measure(candidate, keys, reference, cost))
    return reference, results
