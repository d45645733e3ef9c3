"""How far rollout actors that compute otherwise (cluster.rollouts.dtype, compile) are from the workers.

B chains.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlr_ray.config.cluster import RolloutsConfig
from rlr_ray.core.chunk import Begun
from rlr_ray.core.kl import drift
from rlr_ray.core.seeds import seed_of
from rlr_ray.errors import UserError
from rlr_ray.train.engine import Engine, Rollouts
from rlr_ray.train.picture_engine import PictureEngine
from rlr_ray.train.sampling import ChainSource, Sampled, drift_step
from rlr_ray.utils.memory import memory_errors

logger = logging.getLogger(__name__)
_CHAINS = 2


@dataclass(frozen=True)
class AgreementRequest:
    """A few whole chains of the base model, the same of every index."""

    theta: Tensor  # [P]
    partial: bool = False

    def name(self, indices: range) -> str:
        return "chains by which actors are compared with workers"

    @memory_errors()
    def run(self, engine: Engine, indices: range) -> Sampled:
        return Sampled(indices, {"last": compared_chains(engine, self.theta.to(engine.device))})


@torch.no_grad()
def compared_chains(engine: PictureEngine, theta: Tensor) -> Tensor:  # [B, C, H, W]
    """Last latents of the first prompts' chains, in main memory."""
    prompts = [engine.prompts[i % len(engine.prompts)] for i in range(_CHAINS)]
    start = engine.start([seed_of("agreement", i) for i in range(_CHAINS)], prompts)
    return engine.sampler.sample(theta, *start, kept=()).latents[-1].cpu()


def check_agreement(engine: Engine, rollouts: Rollouts, asked: RolloutsConfig) -> None:
    """Raise UserError if an actor's chains end too far from this process's: |x - y| / |y| over all their numbers.

    As many are asked as the run starts with; a nan is too far.
    """
    theta = engine.model.initial_theta
    ours, worst = compared_chains(engine, theta).double(), 0.0
    chunks = [range(i, i + 1) for i in range(max(asked.min_actors, 1))]
    for result in rollouts(AgreementRequest(theta.cpu()), chunks).results:
        difference = float((result.tensors["last"].double() - ours).norm() / ours.norm())
        if not difference <= asked.tolerance:
            raise UserError(
                f"a rollout actor's chains end {difference:.2g} of their size away from the workers' "
                f"(cluster.rollouts.dtype {asked.dtype}, compile {str(asked.compile).lower()}; model.dtype "
                f"{engine.config.model.dtype}); allowed: cluster.rollouts.tolerance, {asked.tolerance:g}; leave out "
                "dtype and compile, or raise tolerance if that far is near enough"
            )
        worst = max(worst, difference)
    logger.info(f"rollout actors' chains end {worst:.2g} of their size away from the workers'")


class DriftMeter:
    """Looks at an update's first chunk, if it is from actors that compute otherwise.

    `columns`: actors_kl, nats of one step, drawn anew for each update, a mean over the chunk's chains.
    """

    def __init__(self, engine: PictureEngine, source: ChainSource):
        self.engine, self.source, self.columns = engine, source, dict[str, float]()

    def watching(self, begun: Iterable[tuple[int, Begun]]) -> Iterator[tuple[int, Begun]]:
        request = self.source.request
        k = drift_step(self.engine, request.step, request.plans) if self.source.otherwise else None
        for c, one in begun:
            if k is not None and c == min(self.source.chunks):
                theta = request.theta.to(self.engine.device)
                self.columns["actors_kl"] = drift(self.engine.sampler, theta, one.trajectory, k)
            yield c, one
