"""Rewards in actors of their own: the actor, what stands for it in the processes that ask it, starting them."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlr_ray.cluster.batching import Answer, Asked, Batches
from rlr_ray.cluster.resources import HeldResources, enter
from rlr_ray.cluster.rollouts import await_ready
from rlr_ray.cluster.seats import Seat
from rlr_ray.config.rewards import JudgeConfig
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError, first_line
from rlr_ray.rewards import load_reward, score
from rlr_ray.utils.environment import expanded, names_secret

logger = logging.getLogger(__name__)
_BATCH_WAIT_S = 0.01  # for calls that share a batch with the first
_RETURN_S = 0.5  # until a lost actor is asked again


class RewardActor:
    """Holds a reward and nothing that a restart would lose."""

    def __init__(
        self,
        label: str,
        config: JudgeConfig,
        folder: str | None,
        threads: int,
        secrets: Mapping[str, str],
        seat: Seat | None = None,
    ):
        self.crash = seat.take() if seat else None
        assert config.actors is not None
        os.environ.update(secrets)
        self.label, self.config, self.folder, self.gpus = label, config, folder, config.actors.gpus
        self.batches = Batches(self._score, config.actors.batch_size, _BATCH_WAIT_S, threads)

    async def ready(self) -> None:
        """Build the reward. Raises UserError if it cannot be built."""
        await self.batches.run(lambda: self.reward)

    async def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Tensor:  # [B, 3, H, W] -> [B]
        return (await self.batches(Asked(images, prompts, metadata, False)))[0]

    async def score_with_gradient(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Answer:  # [B, 3, H, W] -> scores [B], d score_i / d image_i [B, 3, H, W]
        return await self.batches(Asked(images, prompts, metadata, True))

    @functools.cached_property
    def device(self) -> torch.device:
        if self.gpus and not torch.cuda.is_available():
            raise UserError(
                f"reward {self.label!r}: its actors take {self.gpus:g} GPUs, but torch finds no CUDA device there; "
                "install a CUDA build of torch where they run, or set the gpus of its actors to 0"
            )
        return torch.device("cuda" if self.gpus else "cpu")

    @functools.cached_property
    def reward(self) -> Callable[..., Tensor]:
        if self.crash:
            raise self.crash
        if self.folder is not None:
            enter(self.folder)
        return load_reward(self.config.name, self.config.options, self.device, self.config.input)

    def _score(self, asked: Asked) -> Answer:
        try:
            reward, images = self.reward, asked.images.to(self.device).requires_grad_(asked.gradient)
            with torch.set_grad_enabled(asked.gradient):
                scores = score(reward, images, asked.prompts, asked.metadata, self.label, finite=False)
            return scores.detach().cpu(), self._gradients(scores, images).cpu() if asked.gradient else None
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"reward {self.label!r}: the GPU of its actor ran out of memory on {len(asked.images)} images "
                f"({first_line(error)}); lower the batch_size of its actors, train.chunk_size or "
                "estimator.zeroth_order.chunk_size"
            ) from error

    def _gradients(self, scores: Tensor, images: Tensor) -> Tensor:  # [B, 3, H, W]
        """Each score's gradient with respect to its own image, since it depends on no other."""
        if not scores.requires_grad:
            raise UserError(
                f"reward {self.label!r} carries no gradient, so first order cannot pass through it; compute it with "
                "torch operations outside torch.no_grad(), or set its differentiable: false"
            )
        return torch.autograd.grad(scores.sum(), images)[0]


class RemoteReward:
    """The reward whose actors these are, as a process sees it that has no copy of it.

    An actor that dies is started again by Ray; whoever asked it asks again, another one if there are several.
    """

    def __init__(self, label: str, actors: Sequence[ActorHandle], timeout_s: float, differentiable: bool):
        self.label, self.actors, self.timeout_s = label, list(actors), timeout_s
        self.differentiable = differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        """Scores [B] of images [B, 3, H, W]. Raises UserError as the reward does, or if no answer comes in time."""
        # A copy, since a view would take the rest of its storage along.
        asked = images.detach().to("cpu", copy=True), list(prompts), list(metadata)
        if self.differentiable and images.requires_grad and torch.is_grad_enabled():
            scores, gradients = self._ask("score_with_gradient", *asked)
            scores = _WithGradients.apply(images, scores.to(images.device), gradients.to(images.device))
        else:
            scores = self._ask("score", *asked).to(images.device)
        return scores

    def _ask(self, method: str, *asked: Any) -> Any:
        deadline, why = time.monotonic() + self.timeout_s, "it does not answer"
        while (left := deadline - time.monotonic()) > 0:
            actor = self.actors[next(self._turns)]
            try:
                return ray.get(getattr(actor, method).remote(*asked), timeout=left)
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                raise UserError(f"reward {self.label!r} failed in its actor: {error}") from error
            except GetTimeoutError:
                break
            except RayError as error:
                why = f"its actor was lost ({first_line(error)}) and is not back"
                time.sleep(min(_RETURN_S, left))
        raise UserError(
            f"reward {self.label!r} gave no scores within {self.timeout_s:g} s: {why}; see what it waits for and "
            "whether the memory of its actors' nodes suffices, or raise the timeout_s of its actors; --resume goes on "
            "from the last checkpoint"
        )

    @functools.cached_property
    def _turns(self) -> Iterator[int]:
        """Whom to ask, in turn; each caller begins elsewhere."""
        order = [*range(len(self.actors))]
        start = random.SystemRandom().choice(order)
        return itertools.cycle(order[start:] + order[:start])


class _WithGradients(torch.autograd.Function):
    """Scores that came with d score_i / d image_i, which is all that backpropagation through them needs."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,  # [B, 3, H, W]
        scores: Tensor,  # [B]
        gradients: Tensor,  # [B, 3, H, W]
    ) -> Tensor:
        ctx.save_for_backward(gradients)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_scores: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return of_scores.view(-1, *[1] * (gradients.dim() - 1)) * gradients, None, None


_TRIES = 5  # of an actor that dies while it starts


@contextmanager
def remote_rewards(
    config: RunConfig, room: HeldResources, coordinator: ActorHandle | None = None
) -> Iterator[dict[str, RemoteReward]]:
    """The rewards and judges that have actors, by label, each built and in the room held for it, until the block ends.

    `coordinator`: who carries what they print to the driver. Raises UserError if one cannot be built.
    """
    name = ray.get(coordinator.called.remote()) if coordinator and config.remote_rewards else None
    started: dict[str, list[ActorHandle]] = {label: [] for label in config.remote_rewards}
    try:
        for (label, reward), group in zip(config.remote_rewards.items(), room.rewards, strict=True):
            assert reward.actors is not None
            count = reward.actors.replicas
            logger.info(f"starting {count} actor{'s' * (count > 1)} of reward {label}")
            for _ in range(count):
                started[label].append(_start(label, reward, group, config.threads, Seat(name) if name else None))
        ready = {
            f"actor {number} of reward {label!r}": actor.ready.remote
            for label, actors in started.items()
            for number, actor in enumerate(actors)
        }
        await_ready(ready, _TRIES, "if memory ran out, lower the replicas of its actors")
        yield {
            label: RemoteReward(label, started[label], reward.actors.timeout_s, reward.has_gradient)
            for label, reward in config.remote_rewards.items()
            if reward.actors is not None
        }
    finally:
        for actor in itertools.chain.from_iterable(started.values()):
            ray.kill(actor)


def _start(
    label: str, reward: JudgeConfig, group: PlacementGroup | None, threads: int, seat: Seat | None
) -> ActorHandle:
    actors = reward.actors
    assert actors is not None
    runtime_env, secrets = _without_secrets(expanded(actors.runtime_env, f"the runtime_env of reward {label!r}"))
    try:
        actor = ray.remote(RewardActor).options(
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
            resources=actors.resources,
            runtime_env=runtime_env or None,
            max_restarts=-1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group) if group else "DEFAULT",
        )
        folder = None if "working_dir" in actors.runtime_env else os.getcwd()
        return actor.remote(label, reward, folder, threads, secrets, seat)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"reward {label!r}: Ray refuses the runtime_env {actors.runtime_env} of its actors: {error}; see Ray's "
            "documentation of runtime environments"
        ) from error


def _without_secrets(runtime_env: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A runtime_env, which Ray writes to its logs, and the variables of secret names, which the actor sets itself."""
    variables = runtime_env.get("env_vars")
    if not isinstance(variables, dict):
        return runtime_env, {}
    secrets = {name: value for name, value in variables.items() if names_secret(name)}
    plain = {name: value for name, value in variables.items() if name not in secrets}
    return runtime_env | {"env_vars": plain}, secrets
