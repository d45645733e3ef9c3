"""The RLR estimator on a chain of one's own: three terms, one gradient, a plain torch optimizer. No recipe, no Ray.

    python examples/minimal.py

Eight denoising steps turn noise into points of the plane; 18 numbers of the denoiser are trained so that the points
move to a target. T steps, B chains, P trained numbers; a latent is [B, 2, 1, 1], as a picture's is [B, C, H, W].
"""

from __future__ import annotations

import torch
from torch import Tensor

import rlr_ray as rlr

T, P, HIDDEN = 8, 18, 3
CHUNKS, CHUNK = 8, 32  # an update's chains: B = 256
PAIRS = 256  # perturbed chains an update, each once with + and once with - its direction
DTYPE = torch.float64
TARGET = torch.tensor([1.0, -1.0], dtype=DTYPE)


# 1. The model: what it predicts, as a function of theta [P], or [B, P] for each chain's own.
def denoiser(theta: Tensor, latent: Tensor, timestep: float, conditioning: object) -> Tensor:  # [B, 2, 1, 1]
    """The noise in the latent: right for standard normal data, plus a small network."""
    weights = theta.expand(len(latent), P).unflatten(1, (6, HIDDEN))  # [B, 6, hidden]
    x = latent.flatten(1)  # [B, 2]
    hidden = torch.tanh(x[:, :1] * weights[:, 0] + x[:, 1:] * weights[:, 1] + weights[:, 2] + timestep * weights[:, 3])
    return (hidden[:, None] * weights[:, 4:]).sum(-1).view_as(latent) + timestep**0.5 * latent


def reward(latent: Tensor) -> Tensor:  # [B], higher is better
    return -(latent.flatten(1) - TARGET).square().sum(1)


# 2. The chain: DDIM with eta 1, noisiest step first; a timestep is the noise's share of the variance.
signal = torch.linspace(0.02, 0.98, T + 1).tolist()  # cumulative alpha
schedule = rlr.ddim_schedule([1 - a for a in signal[:-1]], signal[:-1], signal[1:], eta=1.0)
sampler = rlr.Sampler(denoiser, schedule)

# 3. The plan: first order on the last 3 steps, half order on 2 in a row among the others, zeroth order on the other 3.
shape = rlr.PlanShape(T, first_order_steps=3, sub_chain_length=2, rest="zeroth_order")
directions = rlr.Directions(P, scale=0.003)


def draw_chains(count: int, seed: int) -> rlr.Chains:
    """Where so many chains start, and the noises of their steps."""
    source = torch.Generator().manual_seed(seed)
    start, noise = (torch.randn(*size, count, 2, 1, 1, generator=source, dtype=DTYPE) for size in ((), (T,)))
    return rlr.Chains(start, noise, {}, reward)


def perturbed(theta: Tensor, plan: rlr.Plan, update: int) -> rlr.TermEstimate:
    """Zeroth order: a chain a direction, so each pair is one sample. On a cluster, actors do this meanwhile."""
    seeds = [("direction", update, pair) for pair in range(PAIRS)]
    u = torch.stack([directions.draw(seed, DTYPE) for seed in seeds])  # [N, P]
    plus, minus = rlr.rollout(sampler, theta, plan, draw_chains(PAIRS, -1 - update), u, directions.step_size)
    return rlr.zeroth_order(directions, seeds, plus, minus, DTYPE)


def estimate(theta: Tensor, plan: rlr.Plan, update: int) -> rlr.GradientEstimate:
    """The three terms of one update, with their variances."""
    work = {c: (plan, draw_chains(CHUNK, CHUNKS * update + c)) for c in range(CHUNKS)}
    groups = torch.zeros(CHUNKS * CHUNK, dtype=torch.long)  # all share half order's baseline
    return rlr.estimate_gradient(sampler, theta, work, groups, lambda: perturbed(theta, plan, update))


def exact(theta: Tensor, update: int, count: int = 4096) -> Tensor:  # [P]
    """Autograd through all steps of fresh chains: cheap here, too much memory for a real model."""
    theta, chains = theta.clone().requires_grad_(), draw_chains(count, 1_000_000 + update)
    latent = chains.x_start
    for k in range(T):
        latent = sampler.step(theta, k, latent, chains.noise[k], {})
    return torch.autograd.grad(reward(latent).mean(), theta)[0]


@torch.no_grad()
def measure(theta: Tensor) -> float:
    """Mean reward of held-out chains."""
    chains = draw_chains(1024, 123_456_789)
    return float(reward(sampler.sample(theta, *chains.start).latents[-1]).mean())


def main(updates: int = 60, batches: int = 64) -> tuple[list[float], float, float]:
    """Held-out rewards from the start on; the estimate along the exact gradient, in its lengths; that one's error."""
    start = 0.3 * torch.randn(P, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    plan, truth = shape.draw("compared"), exact(start, 0)
    totals = torch.stack([estimate(start, plan, 1000 + batch).total({}) for batch in range(batches)])
    along = totals @ truth / truth.square().sum()  # [batches]
    share, error = float(along.mean()), float(along.std() / batches**0.5)
    print(f"{plan}\nthe estimate along the exact gradient: {share:.3f} ± {error:.3f} of its length")

    theta = torch.nn.Parameter(start)
    optimizer = torch.optim.Adam([theta], lr=0.03, maximize=True)
    rewards = [measure(start)]
    print(f"reward at the start {rewards[0]:.3f}")
    for update in range(updates):
        found = estimate(theta.detach(), shape.draw("plan", update), update)
        theta.grad = found.total({})  # or with weights: {"half_order": 0.5}
        optimizer.step()
        if update % 10 == 9:
            rewards.append(measure(theta.detach()))
            norms = ", ".join(f"{name} {float(term.gradient.norm()):.3f}" for name, term in found.terms.items())
            print(f"update {update + 1}: reward {rewards[-1]:.3f}; norms: {norms}")
    return rewards, share, error


if __name__ == "__main__":
    main()
