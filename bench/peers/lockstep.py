"""A problem as a peer sees it: chains, a denoiser whose forwards are counted, a reward that is a black box.

Runs go in lockstep, several rates or seeds in one batch, each with a theta of its own, since a batch of 10 chains takes
nearly as long as one of 50. R runs of B chains each; P trained numbers; C x H x W a latent; T steps, k = 0 .. T-1 with
0 the noisiest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.problems.problem import problems
from rlr_ray.core.schedule import Schedule, ddim_schedule
from rlr_ray.rewards.likeness import Reference
from rlr_ray.rewards.mixture import WeightedSum
from rlr_ray.rewards.scores import Evaluation
from rlr_ray.train.engine import Engine
from rlr_ray.train.held_out import evaluate, standardised
from rlr_ray.utils.environment import prepare_process

# No plan is used; every step is the adapter's, the last one too, as peers have it.
_KEYS = ["estimator={preset: es}", "adapter.off_below=null", "evaluation.chains=400", "evaluation.chunk_size=200"]

Updates = Iterator[Tensor]  # what a method would keep after each of its updates, [R, P]


@functools.lru_cache(maxsize=2)
def engine_of(problem: str = "digits") -> Engine:
    """Of one of bench/problems/problems.yaml."""
    prepare_process(1)
    ways = problems()[problem].ways
    return Engine(problems()[problem].config(next(iter(ways)), _KEYS))


@functools.lru_cache(maxsize=2)
def total_of(problem: str) -> WeightedSum:
    return standardised(engine_of(problem))


@dataclass(frozen=True)
class Judged:
    """Means over the held-out chains of a run of `rlr-ray train` with some seed: the problem's score, its judge."""

    score: float
    judge: float
    evaluation: Evaluation

    def against(self, base: Judged) -> dict[str, float]:
        """Nats to the base model, with the last step and without, and what its pictures are like beside these."""
        nats = [value or 0.0 for value in self.evaluation.kl_by_step]
        likeness = Reference.base(base.evaluation.pictures).of(self.evaluation.pictures).means
        return {"kl": sum(nats), "kl_without_last": sum(nats[:-1])} | likeness


def judge(theta: Tensor, seed: int, problem: str = "digits") -> Judged:  # [P]
    engine, names = engine_of(problem), problems()[problem]
    evaluation = evaluate(engine.under(engine.config.model_copy(update={"seed": seed})), theta)
    scores = torch.stack([evaluation.scores[label] for label in engine.rewards.labels])
    means = {label: float(row.mean()) for label, row in evaluation.scores.items()}
    means["reward"] = float(total_of(problem).parts(scores).sum(0).mean())
    return Judged(means[names.score], means[names.judge], evaluation)


@functools.lru_cache(maxsize=16)
def base_of(seed: int, problem: str) -> Judged:
    return judge(engine_of(problem).model.initial_theta, seed, problem)


@dataclass(frozen=True)
class Chains:
    """Sampled chains, those of the first run first: latents at the steps' inputs and the last ones, the noises."""

    latents: Tensor  # [T + 1, R B, C, H, W]
    noise: Tensor  # [T, R B, C, H, W]
    prompts: Tensor  # [R B], indices

    @property
    def last(self) -> Tensor:  # [R B, C, H, W]
        return self.latents[-1]

    def rows(self, rows: Tensor) -> Chains:
        return Chains(self.latents[:, rows], self.noise[:, rows], self.prompts[rows])


class Lockstep:
    """Denoiser, sampler and reward of R runs, each with random numbers of its own seed; steps that are drawn are alike.

    Of one run, `cost`: rows that passed the denoiser, three for each with a gradient (a backward counts two); `calls`:
    rows that were rated.
    """

    def __init__(self, seeds: Sequence[int], chains: int, problem: str = "digits"):
        self.engine, self.total = engine_of(problem), total_of(problem)
        self.model, self.schedule = self.engine.model, self.engine.model.schedule
        self.chains, self.runs = chains, len(seeds)
        self.theta = self.model.initial_theta.expand(self.runs, -1)  # [R, P]
        self.texts = [prompt.text for prompt in self.engine.prompts]
        self.conditioning = self.model.encode(self.texts)
        self.sources = [torch.Generator().manual_seed(1000 + seed) for seed in seeds]
        self.steps = torch.Generator().manual_seed(seeds[0])  # of what all runs share
        self.cost = self.calls = 0

    def __len__(self) -> int:  # T
        return len(self.schedule)

    @functools.cached_property
    def alpha(self) -> list[float]:  # [T]
        """Cumulative, at each step's input, of a model that predicts noise."""
        return [clean**-2 for clean, _ in self.schedule.clean]

    @functools.cached_property
    def silent(self) -> Schedule:
        """The same steps without noise: DDIM at eta 0."""
        last = float(self.model.pipeline.scheduler.final_alpha_cumprod)  # type: ignore[attr-defined]
        return ddim_schedule(self.schedule.timesteps, self.alpha, [*self.alpha[1:], last], eta=0.0)

    def prompts(self, update: int, group: int) -> Tensor:  # [R B]
        """Of an update's chains: the next prompts in turn, each `group` times."""
        number = self.chains // group
        turn = (update * number + torch.arange(number)) % len(self.texts)
        return turn.repeat_interleave(group).repeat(self.runs)

    def normal(self, number: int) -> Tensor:  # [R * number, C, H, W]
        shape = self.model.latent_shape
        return torch.cat([torch.randn(number, *shape, generator=source) for source in self.sources])

    def half(self) -> tuple[Tensor, Tensor]:
        """Rows of a random half of each run's chains, and of the other one."""
        orders = [torch.randperm(self.chains, generator=source) for source in self.sources]
        rows = torch.stack([run * self.chains + order for run, order in enumerate(orders)])
        first, second = rows.chunk(2, dim=1)
        return first.flatten(), second.flatten()

    def predict(self, theta: Tensor, k: int, latent: Tensor, prompts: Tensor) -> Tensor:
        """The noise that the denoiser sees in latents [R n, C, H, W] at step k, at each run's theta [R, P]."""
        number = len(latent) // self.runs
        self.cost += number * (3 if torch.is_grad_enabled() and theta.requires_grad else 1)
        each = theta[0] if self.runs == 1 else theta.repeat_interleave(number, 0)
        conditioning = {name: value[prompts] for name, value in self.conditioning.items()}
        return self.model(each, latent, self.schedule.timesteps[k], conditioning)

    def mean(self, theta: Tensor, k: int, latent: Tensor, prompts: Tensor) -> Tensor:
        return self.schedule.mean(k, latent, self.predict(theta, k, latent, prompts))

    def sample(self, theta: Tensor, prompts: Tensor, *, gradients: bool = False) -> Chains:
        """Chains from fresh noise."""
        number = len(prompts) // self.runs
        latents, noise = [self.normal(number)], [self.normal(number) for _ in range(len(self))]
        with torch.set_grad_enabled(gradients):
            for k in range(len(self)):
                mean = self.mean(theta, k, latents[-1], prompts)
                latents.append(mean + self.schedule.sigma[k] * noise[k])
        return Chains(torch.stack(latents), torch.stack(noise), prompts)

    @torch.no_grad()
    def sample_window(self, theta: Tensor, prompts: Tensor, group: int, window: range) -> Chains:
        """Chains with noise at the window's steps alone; before them those of a group are one, and cost as one."""
        latents = [self.normal(self.chains // group)]
        noise = [self.normal(self.chains) * (k in window) for k in range(len(self))]
        for k in range(len(self)):
            if k == window.start:
                latents = [latent.repeat_interleave(group, 0) for latent in latents]
            rows = prompts[::group] if k < window.start else prompts
            schedule = self.schedule if k in window else self.silent
            latent = schedule.mean(k, latents[-1], self.predict(theta, k, latents[-1], rows))
            latents.append(latent + schedule.sigma[k] * noise[k] if k >= window.start else latent)
        return Chains(torch.stack(latents), torch.stack(noise), prompts)

    def noised(self, k: int, latent: Tensor, noise: Tensor) -> Tensor:
        """Last latents as the forward process shows them at step k's input."""
        return self.alpha[k] ** 0.5 * latent + (1 - self.alpha[k]) ** 0.5 * noise

    def clean(self, k: int, latent: Tensor, noise: Tensor) -> Tensor:
        """The last latents that a prediction of the noise stands for."""
        return (latent - (1 - self.alpha[k]) ** 0.5 * noise) / self.alpha[k] ** 0.5

    @torch.no_grad()
    def reward(self, latent: Tensor, prompts: Tensor) -> Tensor:  # [R n, C, H, W], [R n] -> [R n]
        self.calls += len(latent) // self.runs
        asked = [self.engine.prompts[index] for index in prompts.tolist()]
        arguments = [prompt.text for prompt in asked], [prompt.metadata for prompt in asked]
        return self.total.parts(self.engine.rewards.score(self.model.decode(latent), *arguments).scores).sum(0)
