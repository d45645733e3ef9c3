"""The engine: model, rewards, prompts and schedule of a run in one process, built from the config alone.

The trainer and every rollout actor build the same engine, so a chain, a direction or a plan is named by numbers and
never sent.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from rlr_ray.config.checks import check_first_order
from rlr_ray.config.recipe import resolve
from rlr_ray.config.run import RunConfig
from rlr_ray.core.chunk import Forms
from rlr_ray.core.forward_term import forward_draws
from rlr_ray.core.plan import Plan
from rlr_ray.core.sampler import Chains, Conditioning
from rlr_ray.core.seeds import seed_of
from rlr_ray.core.weighting import TermEstimate
from rlr_ray.core.zeroth_order import Directions, RolloutResult, rollout, zeroth_order
from rlr_ray.models import module_bytes
from rlr_ray.prompts.order import PromptOrder
from rlr_ray.prompts.prompt import Prompt
from rlr_ray.rewards.clip import CLIP_REPOSITORY, Clip, load_clip
from rlr_ray.rewards.mixture import Mixture, Scored, Tally, WeightedSum
from rlr_ray.train.activations import must_checkpoint
from rlr_ray.train.picture_engine import PictureEngine
from rlr_ray.utils.memory import memory_errors

if TYPE_CHECKING:
    from rlr_ray.models.sharding import Shards

_KEPT_BYTES = 2**30  # of an update's chains' gradients


class Result(Protocol):
    """The result of some indices of a request, a dataclass; little more than its numbers once it is pickled."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def indices(self) -> range: ...


class Request(Protocol):
    """Work at one theta that needs no gradient, a dataclass: any engine that runs forwards gets the same results."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def theta(self) -> Tensor: ...  # [P]

    @property
    def partial(self) -> bool: ...  # whether an update can do without its last results

    def name(self, indices: range) -> str: ...  # for errors

    def run(self, engine: Engine, indices: range) -> Result: ...


@dataclass(frozen=True)
class RolloutRequest:
    """Perturbation rollouts of an update: the parameters, the steps that are perturbed and the law of directions."""

    step: int
    plan: Plan
    theta: Tensor  # [P]
    directions: Directions
    control_variate: float = 0.0  # the surrogate's coefficient
    total: WeightedSum | None = None  # what is maximised; None: no reward standardised
    partial: bool = True

    def name(self, indices: range) -> str:
        return f"perturbation pairs {indices.start} to {indices.stop - 1} of update {self.step}"

    @memory_errors()
    def run(self, engine: Engine, indices: range) -> RolloutResult:
        """Rewards at both signs of the perturbations `indices` of an update, each on the chain of its own index."""
        tally, seeds = Tally(), engine.direction_seeds(self.step, indices)
        directions = torch.stack([self.directions.draw(seed, torch.float32) for seed in seeds])
        plus, minus = rollout(
            engine.sampler,
            self.theta.to(engine.device),
            self.plan,
            engine.train_chains(self.step, indices, self.total, tally).with_control_variate(self.control_variate),
            directions.to(engine.device),
            self.directions.step_size,
        )
        return RolloutResult(indices, plus.tolist(), minus.tolist(), tally.invalid, tally.seconds)


@dataclass(frozen=True)
class RolloutBatch:
    """Work under way: its results, in any order, and what there is to count of it once all are in."""

    results: Iterable[Any]  # of what its request's run returns
    counts: Mapping[str, int] = field(default_factory=dict)  # columns of the update's row
    cancel: Callable[[], None] = lambda: None  # nobody waits for it any more


# Rewards by label that are elsewhere.
RemoteRewards = Mapping[str, Callable[..., Tensor]]
# Starts some chunks of a request's indices.
Rollouts = Callable[[Request, Sequence[range]], RolloutBatch]


class Engine(PictureEngine):
    """Model and prompts of one run with its rewards and its plan, on one device.

    `remote`: rewards by label that have actors.
    """

    def __init__(self, config: RunConfig, remote: RemoteRewards = MappingProxyType({}), shards: Shards | None = None):
        config = resolve(config)
        check_first_order(config)
        super().__init__(config, shards)
        self.remote = remote
        self._order = PromptOrder([prompt.weight for prompt in self.prompts], config.seed, "train")
        self.rewards = Mixture(config.rewards, self.device, remote, self.model.frames)
        surrogate = config.estimator.surrogate
        named = {} if surrogate is None or surrogate.name == "online" else {surrogate.name: surrogate.reward}
        self.surrogate = Mixture(named, self.device, {}, self.model.frames)  # of none or one
        self.shape = config.shape_on(self.model.schedule)

    @functools.cached_property
    def judges(self) -> Mixture:
        """In main memory; who needs them moves them to the device meanwhile."""
        return Mixture(self.config.evaluation.judges, torch.device("cpu"), self.remote, self.model.frames)

    @functools.cached_property
    def clip(self) -> Clip | None:
        """The CLIP whose features pictures are compared by, if the recipe names one."""
        path = self.config.evaluation.clip
        return Clip(*load_clip("evaluation.clip", path, CLIP_REPOSITORY)).to(self.device) if path is not None else None

    def plans(
        self,
        step: int,
        position_weights: Sequence[float] | None = None,
        *,
        surrogate: bool = True,
        trusted: Sequence[int] = (),
    ) -> list[Plan]:
        """Each chunk's plan of an update.

        `surrogate` says whether one that first order shares the reward with is trusted, `trusted` which heads of one
        that first order switches to.
        """
        chunks = range(self.config.train.chains // self.config.train.chunk_size)
        shape = self.shape if surrogate else self.shape.without_surrogate()
        if shape.switch:
            count = len(self.config.rewards)
            shape = shape.carrying(count - len(self.config.black_box) + len(trusted), count)
        return [shape.draw(self.config.seed, step, chunk=c, position_weights=position_weights) for c in chunks]

    def under(self, config: RunConfig) -> Engine:
        """This engine with the plan of another config, whose model, reward and prompts are the same."""
        other = copy.copy(self)
        other.config, other.shape = config, config.shape_on(self.model.schedule)
        other.__dict__.pop("checkpoint_steps", None)
        return other

    @functools.cached_property
    def checkpoint_steps(self) -> bool:
        """Whether first order's steps are checkpointed; auto is measured once, in a process that takes gradients."""
        stated = self.config.estimator.checkpoint_steps
        return must_checkpoint(self) if stated == "auto" else stated

    def held_bytes(self) -> int:
        """Bytes of what stays loaded: the model's weights, the reward's, and those of one that stands in for it."""
        rewards = (*self.rewards.rewards.values(), *self.surrogate.rewards.values())
        return self.model.weights() + sum(map(module_bytes, rewards))

    def groups(self) -> Tensor:  # [B]
        """The baseline group of each of an update's chains, by number."""
        return (torch.arange(self.config.train.chains) // self.config.baseline_size).to(self.device)

    def forms(self, reference: Tensor | None = None, typical: float | None = None) -> Forms:
        """The recipe's variants of the terms; `reference` [P] is the theta that a forward term is pulled to.

        Chains' own gradients are all kept until their median is known, unless that takes more than a GiB: then
        `typical` is taken for it, which earlier updates left; the first cuts none.
        """
        if self.config.train.chains * len(self.model.initial_theta) * 4 <= _KEPT_BYTES:
            typical = None
        elif typical is None:
            typical = math.inf
        first_order, half_order = self.config.estimator.first_order, self.config.estimator.half_order
        if half_order.pull and half_order.pull_to == "base":
            reference = self.model.initial_theta
        return Forms(first_order.clip, typical, half_order.weighting, half_order.pull, reference)

    def train_prompts(self, step: int, indices: range) -> list[Prompt]:
        """The prompts of an update's chains."""
        train = self.config.train
        first = step * (train.chains // train.chains_per_prompt)
        return [self.prompts[self._order(first + index // train.chains_per_prompt)] for index in indices]

    def train_seeds(self, step: int, indices: range) -> list[int]:
        """The seeds of an update's chains, from which plain diffusers draws them at the base model."""
        return [seed_of(self.config.seed, "chain", step, index) for index in indices]

    def train_chains(
        self, step: int, indices: range, total: WeightedSum | None = None, tally: Tally | None = None
    ) -> Chains:
        """The chains of an update; what they are depends on the run's seed, the step and their index alone."""
        chains = self.chains(self.train_seeds(step, indices), self.train_prompts(step, indices), total, tally)
        seeds = [(self.config.seed, "forward", step, index) for index in indices]

        def draw(steps: Sequence[int], draws: int) -> tuple[Tensor, Tensor]:  # [B, K], [K, B, C, H, W]
            drawn, noise = forward_draws(steps, draws, self.model.latent_shape, seeds)
            return drawn.to(self.device), noise.to(self.device)

        return replace(chains, draws=draw)

    def chains(
        self,
        seeds: Sequence[int],
        prompts: Sequence[Prompt],
        total: WeightedSum | None = None,
        tally: Tally | None = None,
    ) -> Chains:
        """The chains that a plain diffusers pipeline would run with these prompts and one generator a seed.

        They are rated by `total` (None: no reward standardised); each call of the rewards is added to the `tally`.
        """
        start = self.start(seeds, prompts)
        texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
        maximised, spent = total or self.rewards.weighted_sum(), tally or Tally()

        replaced: list[Tensor] = []

        def parts(latents: Tensor) -> Tensor:  # [m, B]
            scored = self._score(self.rewards, latents, texts, metadata, start[2])
            spent.add(scored)
            replaced.append(scored.replaced)
            return maximised.parts(scored.scores)

        def surrogate(latents: Tensor) -> Tensor:  # [B]
            return self._score(self.surrogate, latents, texts, metadata, start[2]).scores[0]

        return Chains(
            *start,
            lambda latents: parts(latents).sum(0),
            surrogate if self.surrogate.labels else None,
            parts,
            replaced=replaced,
            differentiable=len(self.rewards.black_box) < len(self.rewards.labels),
            black_box=self.rewards.black_box if self.config.mixed or self.shape.switch else (),
        )

    def _score(
        self,
        rewards: Mixture,
        latents: Tensor,
        texts: list[str],
        metadata: list[dict[str, Any]],
        conditioning: Conditioning,
    ) -> Scored:
        """Decode latents and rate them; of a video only the frames that some reward sees are decoded."""
        times = len(latents) // len(texts)
        images = self.decode(latents, conditioning, rewards.frames or None)
        return rewards.score(images, texts * times, metadata * times)

    def direction_seeds(self, step: int, indices: range) -> list[tuple[int | str, ...]]:
        return [(self.config.seed, "direction", step, index) for index in indices]

    def zeroth_order(
        self, request: RolloutRequest, results: Iterable[RolloutResult], tally: Tally | None = None
    ) -> TermEstimate:
        """The zeroth-order term, its directions rebuilt from their seeds and summed in the order of their indices."""
        ordered = sorted(results, key=lambda result: result.indices.start)
        if tally is not None:
            tally.invalid += sum(result.invalid for result in ordered)
            tally.seconds += sum(result.reward_s for result in ordered)
        return zeroth_order(
            request.directions,
            [seed for result in ordered for seed in self.direction_seeds(request.step, result.indices)],
            torch.tensor([reward for result in ordered for reward in result.rewards_plus], dtype=torch.float64),
            torch.tensor([reward for result in ordered for reward in result.rewards_minus], dtype=torch.float64),
            clip=self.config.estimator.zeroth_order.clip,
        )

    def local_rollouts(self, request: Request, chunks: Sequence[range]) -> RolloutBatch:
        """A request in this process, one chunk after the other: `Rollouts` without a cluster."""
        return RolloutBatch(self.run(request, chunk) for chunk in chunks)

    def run(self, request: Request, indices: range) -> Any:
        """The result of some of a request's indices, in this process."""
        return request.run(self, indices)
