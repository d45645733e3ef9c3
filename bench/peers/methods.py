"""Peers written after their papers: Flow-GRPO, its window of steps, DiffusionNFT, AWM, and a surrogate like LaSRO's.

All of them take the reward as a black box and train the recipe's adapter by AdamW with their codes' constants (betas .9
and .999, weight decay 1e-4, the gradient's norm cut at 1); the rate is swept. Most were written for flows: here a
velocity becomes the noise that this model predicts, and a step's Gaussian is that of DDIM at eta 1. Unless said
otherwise chains are drawn as they are judged, and nothing pulls to the base model (weights of 0 to .04 there): that
costs reward, which is compared here, and the KL stands beside it. R runs in lockstep, one for each rate: lockstep.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from bench.peers.lockstep import Chains, Lockstep, Updates

LIMIT = 5.0  # of an advantage: `adv_clip_max` of Flow-GRPO, DiffusionNFT and AWM
GROUPS = {10: 5, 20: 5, 40: 8, 80: 8}  # chains an update -> chains that share a prompt
Rates = Sequence[float]  # [R]


class Learner:
    """Theta [R, P], its optimizers and its moving average, whose decay grows to `decay` as in Flow-GRPO's code."""

    def __init__(self, theta: Tensor, rates: Rates, decay: float = 0.0):
        self.numbers = [nn.Parameter(row.clone()) for row in theta]
        groups = [{"params": [row], "lr": rate} for row, rate in zip(self.numbers, rates, strict=True)]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), weight_decay=1e-4)
        self.average, self.decay, self.steps = theta.clone(), decay, 0

    @property
    def now(self) -> Tensor:  # [R, P]
        return torch.stack([row.detach() for row in self.numbers])

    def leaf(self) -> Tensor:
        """Theta to take gradients by."""
        return self.now.requires_grad_()

    def descend(self, gradient: Tensor) -> None:  # [R, P]
        for row, wanted in zip(self.numbers, gradient, strict=True):
            row.grad = wanted / wanted.norm().clamp_min(1.0)
        self.adam.step()
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.average = decay * self.average + (1 - decay) * self.now


def group_advantage(reward: Tensor, runs: int, group: int) -> Tensor:  # [R B] -> [R B]
    """Reward less its group's mean, over the spread of its run's whole batch (`global_std`)."""
    groups = reward.view(runs, -1, group)
    centred = groups - groups.mean(2, keepdim=True)
    return (centred / (groups.flatten(1).std(1).view(runs, 1, 1) + 1e-4)).flatten().clamp(-LIMIT, LIMIT)


def mean_square(difference: Tensor) -> Tensor:  # [B, C, H, W] -> [B]
    return difference.square().flatten(1).mean(1)


def gradient_of(losses: Tensor, theta: Tensor, runs: int) -> Tensor:  # [R B], [R, P] -> [R, P]
    """Of each run's mean loss."""
    return torch.autograd.grad(losses.view(runs, -1).mean(1).sum(), theta)[0]


def ratio_gradient(
    task: Lockstep, theta: Tensor, chains: Chains, advantage: Tensor, steps: Sequence[int], clip: float
) -> Tensor:  # [R, P]
    """Of PPO's loss (Schulman et al. 2017, equation 7) over these steps of chains that another theta may have drawn.

    Log-probabilities are means over a latent's numbers, as in Flow-GRPO's code.
    """
    total = torch.zeros_like(theta)
    for k in steps:
        mean = task.mean(theta, k, chains.latents[k], chains.prompts)
        now = (chains.latents[k + 1] - mean) / task.schedule.sigma[k]
        ratio = ((mean_square(chains.noise[k]) - mean_square(now)) / 2).exp()
        losses = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))
        total += gradient_of(losses, theta, task.runs) / len(steps)
    return total


def two_steps(
    task: Lockstep, learner: Learner, chains: Chains, advantage: Tensor, steps: Sequence[int], clip: float
) -> None:
    """An epoch's chains in two halves, an optimizer step each: at the second one the ratios are no longer 1."""
    for rows in task.half():
        learner.descend(ratio_gradient(task, learner.leaf(), chains.rows(rows), advantage[rows], steps, clip))


def flow_grpo(task: Lockstep, rates: Rates, *, clip: float = 0.1) -> Updates:
    """Flow-GRPO (Liu et al. 2025, arXiv:2505.05470).

    As paper and code: advantages by group over the batch's spread, clipped ratios at every step but the last
    (`timestep_fraction` .99), two optimizer steps an epoch, and the average of decay .9 is what is kept. Chosen: the
    clip, as many nats for 64 numbers as 1e-4 is for 65,536; the groups' sizes, 24 there.
    """
    learner, group = Learner(task.theta, rates, 0.9), GROUPS[task.chains]
    for epoch in itertools.count():
        drawn = task.sample(learner.now, task.prompts(epoch, group))
        advantage = group_advantage(task.reward(drawn.last, drawn.prompts), task.runs, group)
        two_steps(task, learner, drawn, advantage, range(len(task) - 1), clip)
        yield learner.average


def flow_grpo_window(task: Lockstep, rates: Rates, *, window: int = 3, clip: float = 0.01) -> Updates:
    """Flow-GRPO-Fast, of the same authors' code, and MixGRPO (Li et al. 2025, arXiv:2507.21802).

    As there: noise at `window` steps of the first half alone, drawn anew each epoch; before them a group is one chain,
    after them each goes on without noise; only the window's steps are trained; a clip a tenth of the above. Chosen: the
    other steps are DDIM at eta 0, though the runs are judged at eta 1 throughout.
    """
    learner, group = Learner(task.theta, rates, 0.9), GROUPS[task.chains]
    for epoch in itertools.count():
        first = int(torch.randint(len(task) // 2 - window + 1, (), generator=task.steps))
        steps, prompts = range(first, first + window), task.prompts(epoch, group)
        drawn = task.sample_window(learner.now, prompts, group, steps)
        advantage = group_advantage(task.reward(drawn.last, prompts), task.runs, group)
        two_steps(task, learner, drawn, advantage, steps, clip)
        yield learner.average


def nft_losses(clean: Tensor, positive: Tensor, negative: Tensor, advantage: Tensor, mix: float) -> Tensor:  # [B]
    """DiffusionNFT's loss of last latents [B, C, H, W] and of what both policies take them for.

    Each square over its chain's mean absolute error: the paper's adaptive weight.
    """

    def distance(said: Tensor) -> Tensor:  # [B]
        weight = (said.detach() - clean).abs().flatten(1).mean(1).clamp_min(1e-5)
        return mean_square(said - clean) / weight

    share = (advantage / LIMIT).clamp(-1, 1) / 2 + 0.5  # how far a chain is of the positive kind
    return LIMIT / mix * (share * distance(positive) + (1 - share) * distance(negative))


def nft_gradient(
    task: Lockstep, theta: Tensor, old: Tensor, k: int, chains: Chains, advantage: Tensor, mix: float
) -> Tensor:  # [R, P]
    latent = task.noised(k, chains.last, task.normal(task.chains))
    with torch.no_grad():
        before = task.predict(old, k, latent, chains.prompts)
    moved = mix * (task.predict(theta, k, latent, chains.prompts) - before)
    positive, negative = (task.clean(k, latent, before + sign * moved) for sign in (1, -1))
    return gradient_of(nft_losses(chains.last, positive, negative, advantage, mix), theta, task.runs)


def diffusion_nft(task: Lockstep, rates: Rates, *, mix: float = 1.0, draws: int | None = None) -> Updates:
    """DiffusionNFT (Zheng et al. 2025, arXiv:2509.16117).

    As paper and code: an old policy draws the chains and follows theta (decay .001 an update, at most .5: `decay_type`
    1); the positive policy mixes `mix` of theta into it, the negative one as much against it; every step but the last
    is trained on each chain with fresh noise, one optimizer step an epoch; the average of decay .9 is kept. Chosen:
    chains at eta 1; `draws` steps, where that is set, for all of them.
    """
    learner, old, group = Learner(task.theta, rates, 0.9), task.theta, GROUPS[task.chains]
    for epoch in itertools.count():
        drawn = task.sample(old, task.prompts(epoch, group))
        advantage = group_advantage(task.reward(drawn.last, drawn.prompts), task.runs, group)
        steps, theta = torch.randperm(len(task) - 1, generator=task.steps)[:draws].tolist(), learner.leaf()
        each = [nft_gradient(task, theta, old, k, drawn, advantage, mix) for k in steps]
        learner.descend(torch.stack(each).mean(0))
        decay = min(0.001 * epoch, 0.5)
        old = decay * old + (1 - decay) * learner.now
        yield learner.average


def awm(
    task: Lockstep, rates: Rates, *, draws: int = 4, robust: bool = False, kl: float = 0.0, pull: float = 0.0
) -> Updates:
    """Advantage Weighted Matching (Xue et al. 2025, arXiv:2509.25050).

    As paper and code: the model's own training loss on the chains' last latents, times the group's advantage, at 4 of
    the 10 steps (6 of 14 there), one from each stratum of what is left without the first and the last, fresh noise, one
    optimizer step an epoch; the average of decay .99 is kept. `robust`: the code's weights, a root of the loss
    (`ghuber`, power .25, times the step's time); `kl` and `pull`: its weights of the squares to the base model's and to
    a recent theta's (decay .3) predictions, .003 and 1 there.
    """
    learner, recent, group = Learner(task.theta, rates, 0.99), task.theta, GROUPS[task.chains]
    bounds = torch.linspace(1, len(task) - 1, draws + 1).long().tolist()
    for epoch in itertools.count():
        drawn = task.sample(learner.now, task.prompts(epoch, group))
        advantage = group_advantage(task.reward(drawn.last, drawn.prompts), task.runs, group) / LIMIT
        theta, total = learner.leaf(), torch.zeros_like(recent)
        for low, high in itertools.pairwise(bounds):
            k = int(torch.randint(low, high, (), generator=task.steps))
            noise = task.normal(task.chains)
            latent = task.noised(k, drawn.last, noise)
            said = task.predict(theta, k, latent, drawn.prompts)
            losses = advantage * matching(said - noise, task.schedule.timesteps[k] / 1000, robust)
            for weight, other in ((kl, task.theta), (pull, recent)):
                if weight:
                    with torch.no_grad():
                        target = task.predict(other, k, latent, drawn.prompts)
                    losses = losses + weight * mean_square(said - target)
            total += gradient_of(losses, theta, task.runs) / draws
        learner.descend(total)
        recent = 0.3 * recent + 0.7 * learner.now
        yield learner.average


def matching(error: Tensor, time: float, robust: bool) -> Tensor:  # [B, C, H, W] -> [B]
    squares = mean_square(error)
    return (squares + 1e-10).pow(0.25) * time / 0.25 if robust else squares


class LatentScore(nn.Module):
    """A run's score of last latents [B, C, H, W] under prompts [B], and the chains it learns from."""

    def __init__(self, shape: Sequence[int], prompts: int, source: torch.Generator):
        super().__init__()
        channels, height, width = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(source.initial_seed())
            looks = [nn.Conv2d(channels, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3, padding=1), nn.SiLU()]
            rates = [nn.Linear(32 * height * width, 128), nn.SiLU(), nn.Linear(128, prompts)]
            self.layers = nn.Sequential(*looks, nn.Flatten(), *rates)
        self.adam, self.source = torch.optim.AdamW(self.layers.parameters(), 1e-3), source
        self.latents, self.prompts, self.rewards = torch.zeros(0, *shape), torch.zeros(0).long(), torch.zeros(0)

    def forward(self, latents: Tensor, prompts: Tensor) -> Tensor:  # [B]
        return self.layers(latents).gather(1, prompts[:, None]).squeeze(1)

    def keep(self, latents: Tensor, prompts: Tensor, rewards: Tensor) -> None:
        self.latents = torch.cat([self.latents, latents])[-2000:]
        self.prompts = torch.cat([self.prompts, prompts])[-2000:]
        self.rewards = torch.cat([self.rewards, rewards])[-2000:]

    def learn(self, minibatches: int, pairs: int = 64) -> None:
        """Ranking loss of Bradley and Terry on pairs of one prompt among all that is kept; ties say nothing."""
        for _ in range(minibatches):
            rows = torch.randint(len(self.rewards), (pairs,), generator=self.source)
            same = (self.prompts[rows, None] == self.prompts).float()
            others = same.multinomial(1, generator=self.source).squeeze(1)
            both = torch.cat([rows, others])
            above, below = self(self.latents[both], self.prompts[both]).chunk(2)
            better = (self.rewards[rows] - self.rewards[others]).sign()
            self.adam.zero_grad()
            (-logsigmoid(better * (above - below))).mean().backward()
            self.adam.step()


def lasro(task: Lockstep, rates: Rates, *, offline: int = 400, first: int = 1000, later: int = 50) -> Updates:
    """Like LaSRO (Jia et al. 2024, arXiv:2411.15247): a latent reward model by ranking, off-line first.

    As there: a score of last latents learned on `offline` chains of the base model, ranked by the reward; then its
    gradient trains the model, while the chains drawn on the way go on teaching it. Chosen: a small network with a head
    a prompt where LaSRO has SDXL's encoder; backpropagation through all 10 steps where its models have two and take one
    at a time, off-policy; `first` minibatches of 64 pairs off-line, `later` an update.
    """
    learner, each = Learner(task.theta, rates), range(task.runs)
    scores = [LatentScore(task.model.latent_shape, len(task.texts), source) for source in task.sources]

    def teach(chains: Chains, minibatches: int) -> None:
        last = chains.last.detach()
        parts = [last, chains.prompts, task.reward(last, chains.prompts)]
        for run, score in enumerate(scores):
            score.keep(*(part.chunk(task.runs)[run] for part in parts))
            score.learn(minibatches)

    prompts = torch.arange(offline).remainder(len(task.texts)).repeat(task.runs)
    teach(task.sample(task.theta, prompts), first)
    for epoch in itertools.count():
        theta = learner.leaf()
        drawn = task.sample(theta, task.prompts(epoch, 1), gradients=True)
        parts = drawn.last.chunk(task.runs), drawn.prompts.chunk(task.runs)
        losses = torch.cat([-scores[run](parts[0][run], parts[1][run]) for run in each])
        learner.descend(gradient_of(losses, theta, task.runs))
        teach(drawn, later)
        yield learner.average
