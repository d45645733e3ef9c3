"""The sampling chain: its denoiser, how chains begin, their steps, and the record that the estimators read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from rlr_ray.core.schedule import Schedule
from rlr_ray.errors import UserError

Conditioning = Mapping[str, Tensor]  # each [B, ...]
Start = tuple[Tensor, Tensor, Conditioning]  # of chains: first latents [B, C, H, W], noises [T, B, C, H, W], prompts
# Last latent [B, C, H, W] -> reward [B], higher is better; or the parts of which it is the sum [m, B].
Objective = Callable[[Tensor], Tensor]


class Denoiser(Protocol):
    """A model's prediction (after guidance) as a function of what is trained.

    `theta` is [P], or [B, P] for parameters of each chain's own; `latent` and the result are [B, C, H, W].
    Nothing is stored in between: perturbing parameters means passing others, so there is nothing to restore.
    """

    def __call__(self, theta: Tensor, latent: Tensor, timestep: float, conditioning: Conditioning) -> Tensor: ...


@dataclass(frozen=True)
class Chains:
    """A chunk of chains: how they start, their noises, their prompts and what rates their last latents.

    Last latents are [B, C, H, W], or [n B, C, H, W]: of the same chains n times over.
    """

    x_start: Tensor  # [B, C, H, W]
    noise: Tensor  # [T, B, C, H, W]
    conditioning: Conditioning
    objective: Objective  # of [B]
    surrogate: Objective | None = None  # of [B], differentiable; for plans whose first order carries it
    parts: Objective | None = None  # of [m, B], if the objective is a sum
    differentiable: bool = True  # at least one part has a gradient
    black_box: tuple[int, ...] = ()  # which parts have none, where others do or heads stand in for them
    # Each [m, B]: of each call of `parts`, here or where chains were sampled, which scores were not finite
    replaced: list[Tensor] = field(default_factory=list)
    heads: Objective | None = None  # of [h, B], differentiable: a surrogate of each part in black_box
    trusted: tuple[int, ...] = ()  # heads that first order carries in place of their parts
    # Steps and number K of draws -> a chain's steps [B, K] and noises [K, B, C, H, W] for the forward term
    draws: Callable[[Sequence[int], int], tuple[Tensor, Tensor]] | None = None

    @property
    def start(self) -> Start:
        return self.x_start, self.noise, self.conditioning

    @property
    def left(self) -> list[int]:
        """The parts that first order does not carry: without a gradient, and without a head that is trusted."""
        return [part for head, part in enumerate(self.black_box) if head not in self.trusted]

    def rated(self, latent: Tensor) -> Tensor:  # [B, C, H, W] -> [m, B]
        """Every part of the reward, with a gradient where it has one."""
        return torch.atleast_2d((self.parts or self.objective)(latent))

    def carried(self, latent: Tensor) -> Tensor:  # [B, C, H, W] -> [m + t, B]
        """Every part of the reward, and below them the trusted heads, which stand in for those without a gradient."""
        if self.differentiable:
            rated = self.rated(latent)
        else:
            with torch.no_grad():  # no decoder's activations are kept
                rated = self.rated(latent.detach())
        if self.heads is None or not self.trusted:
            return rated
        return torch.cat([rated, self.heads(latent)[list(self.trusted)]])

    def parts_whole_and_left(self, latent: Tensor, rated: Tensor | None = None) -> Tensor:  # [B, ...] -> [m + 2, B]
        """The reward's parts, its whole, and what first order leaves of it; `rated`: the parts, if they are known."""
        rated = self.rated(latent) if rated is None else rated
        whole = rated.sum(0)
        left = rated[self.left].sum(0) if self.surrogate is None else whole - self.surrogate(latent)
        return torch.cat([rated, whole[None], left[None]])

    def residual(self, latent: Tensor) -> Tensor:  # [B, C, H, W] -> [B]
        """The reward, less the surrogate that first order carries."""
        reward = self.objective(latent)
        return reward if self.surrogate is None else reward - self.surrogate(latent)

    def trusting(self, heads: Sequence[int]) -> Chains:
        """These chains with first order carrying some heads in place of their parts."""
        return replace(self, trusted=tuple(heads))

    def with_control_variate(self, coefficient: float) -> Chains:
        """These chains with the surrogate times a coefficient; without it if that is 0."""
        surrogate = self.surrogate
        if surrogate is None or not coefficient:
            return replace(self, surrogate=None)
        return replace(self, surrogate=lambda latent: coefficient * surrogate(latent))


@dataclass(frozen=True)
class Trajectory:
    """Chains sampled without gradients, up to the step `stop`: latents at steps' inputs, and the noises."""

    latents: Tensor  # [stop + 1, B, C, H, W]: of each step, the last is what step stop - 1 put out; or of `steps`
    noise: Tensor  # [T, B, C, H, W]
    conditioning: Conditioning
    steps: tuple[int, ...] | None = None  # whose inputs `latents` holds, in their order, `stop` the last; None: all

    @property
    def stop(self) -> int:
        return len(self.latents) - 1 if self.steps is None else self.steps[-1]

    def at(self, k: int) -> Tensor:  # [B, C, H, W]
        """The latent at step k's input; k = stop is the last."""
        return self.latents[k if self.steps is None else self.steps.index(k)]

    def at_steps(self, kept: Collection[int]) -> Trajectory:
        """The same with these steps' latents and the last alone: a copy, which holds no others in memory."""
        steps = tuple(k for k in sorted({*kept, self.stop}) if k <= self.stop)
        return replace(self, latents=torch.stack([self.at(k) for k in steps]), steps=steps)


@dataclass(frozen=True)
class Sampler:
    """A denoiser under a schedule: one step, its mean, and whole chains; theta [P] or [B, P] is an argument of each.

    The last `off` steps are the base model's, whatever theta is: gradients pass through their latents, none comes from
    theta there, and chains do not diverge there.
    """

    denoiser: Denoiser
    schedule: Schedule
    off: int = 0
    base: Tensor | None = None  # [P] theta of the base model; needed if some step is off

    def __post_init__(self) -> None:
        if not 0 <= self.off <= (0 if self.base is None else len(self.schedule) - 1):
            raise UserError(
                f"`off` is {self.off} of {len(self.schedule)} steps, `base` is {'not ' * (self.base is None)}given; "
                "allowed: `off` below the number of steps, and above 0 only with the `base` theta of these steps"
            )

    def __len__(self) -> int:  # T
        return len(self.schedule)

    @property
    def trained(self) -> int:
        """Steps 0 .. trained - 1 are theta's, the others the base model's."""
        return len(self) - self.off

    def output(self, theta: Tensor, k: int, latent: Tensor, conditioning: Conditioning) -> Tensor:  # [B, C, H, W]
        """The denoiser's prediction at step k: theta's, or the base model's at the last `off` steps."""
        theta = theta if k < self.trained or self.base is None else self.base
        return self.denoiser(theta, latent, self.schedule.timesteps[k], conditioning)

    def mean(self, theta: Tensor, k: int, latent: Tensor, conditioning: Conditioning) -> Tensor:  # [B, C, H, W]
        """Mean of the latent that step k puts out."""
        return self.schedule.mean(k, latent, self.output(theta, k, latent, conditioning))

    def step(self, theta: Tensor, k: int, latent: Tensor, noise: Tensor, conditioning: Conditioning) -> Tensor:
        """The latent [B, C, H, W] that step k puts out, given that step's noise [B, C, H, W]."""
        return self.mean(theta, k, latent, conditioning) + self.schedule.sigma[k] * noise

    @torch.no_grad()
    def sample(
        self,
        theta: Tensor,  # [P]
        x_start: Tensor,  # [B, C, H, W]
        noise: Tensor,  # [T, B, C, H, W]
        conditioning: Conditioning,
        *,
        stop: int | None = None,
        kept: Collection[int] | None = None,
    ) -> Trajectory:
        """Run steps 0 .. stop-1 (default: all) without gradients; of the latents, the last and those `kept` stay."""
        stop, latent, latents = len(self) if stop is None else stop, x_start, dict[int, Tensor]()
        for k in range(stop):
            if kept is None or k in kept:
                latents[k] = latent
            latent = self.step(theta, k, latent, noise[k], conditioning)
        latents[stop] = latent
        return Trajectory(
            torch.stack(list(latents.values())), noise, conditioning, None if kept is None else tuple(latents)
        )

    def sample_together(
        self, theta: Tensor, starts: Sequence[Start], *, stop: int | None = None, kept: Collection[int] | None = None
    ) -> list[Trajectory]:
        """As `sample` for each of several chunks of chains, all of them in one batch."""
        if len(starts) == 1:
            return [self.sample(theta, *starts[0], stop=stop, kept=kept)]
        x_start, noise, conditioning = zip(*starts, strict=True)
        prompts = {name: torch.cat([one[name] for one in conditioning]) for name in conditioning[0]}
        whole = self.sample(theta, torch.cat(x_start), torch.cat(noise, dim=1), prompts, stop=stop, kept=kept)
        parts = whole.latents.split([len(one) for one in x_start], dim=1)
        return [Trajectory(part, *start[1:], whole.steps) for part, start in zip(parts, starts, strict=True)]
