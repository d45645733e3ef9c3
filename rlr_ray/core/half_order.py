"""Half order: a likelihood ratio on the sampler's own noise, with backpropagation inside one sub-chain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlr_ray.core.sampler import Objective, Sampler, Trajectory
from rlr_ray.core.seeds import permutation
from rlr_ray.errors import UserError

_FLAT = 1e-6  # of the largest reward: rounding, no difference
_MOST_RATIO = 2.0  # of densities, by which a chain of another theta counts


def half_order(
    sampler: Sampler,
    theta: Tensor,  # [P]
    trajectory: Trajectory,
    sub_chain: range,
    advantage: Tensor,  # [B]
    *,
    behind: bool = False,
) -> Tensor:  # [P]
    """Likelihood-ratio gradient for the steps of `sub_chain`, averaged over the chains.

    The second term of the paper's equation 6. From the stored latent at the first step's input, differentiates the
    composed mean m of the last step j, the noises in between held at their sampled values, and returns the mean over
    chains of `advantage * (dm/dtheta)^T z_j / sigma_j`. One step is REINFORCE (DDPO without its clipping).
    Its expectation is the part of grad E[R] that passes through theta at those steps, if the advantage is the reward
    minus a baseline that does not use the chain's own reward. Raises UserError where the last step has no noise.

    `behind`: the chains are another theta's. Then each is weighted by the ratio of the densities of what step j put
    out, at most 2, and its noise is what theta would have needed: exact for that step but for the cut, as in DDPO's own
    importance weights, not for how often the other theta visits a state nor for what its later steps do. Needs the
    latent that step j put out.
    """
    last = sub_chain[-1]
    assert last < sampler.trained, f"step {last} is the base model's: half order there has no gradient"
    sigma = sampler.schedule.sigma[last]
    if not sigma:
        raise UserError(
            f"half order ends at step {last}, where the sampler adds no noise (sigma 0); "
            "use a schedule with noise there (eta above 0), or leave that step to first order"
        )
    theta = theta.detach().requires_grad_()
    latent = trajectory.at(sub_chain[0])
    for k in sub_chain[:-1]:
        latent = sampler.step(theta, k, latent, trajectory.noise[k], trajectory.conditioning)
    mean = sampler.mean(theta, last, latent, trajectory.conditioning)
    noise = trajectory.noise[last]
    if behind:
        needed = (trajectory.at(last + 1) - mean.detach()) / sigma
        ratio = ((noise.square() - needed.square()).flatten(1).sum(1) / 2).exp().clamp(max=_MOST_RATIO)  # [B]
        advantage, noise = advantage * ratio, needed
    score = noise / sigma  # d log p(x_next | x) / d mean
    per_chain = (mean * score).flatten(1).sum(1)  # densities sum over C, H, W
    (gradient,) = torch.autograd.grad((advantage * per_chain).mean(), theta)
    return gradient


@torch.no_grad()
def branch_advantages(
    sampler: Sampler,
    theta: Tensor,  # [P]
    trajectory: Trajectory,  # of whole chains
    rewards: Tensor,  # [B], or parts [m, B], of these chains
    objective: Objective,  # whose values they are
    steps: Sequence[int],  # [n] the last steps of half order's sub-chains
    *,
    rows: int | None = None,
) -> Tensor:  # [n, B], or [n, m, B]
    """Half order's advantages `(R - R_j^-) / 2`, R_j^- the reward of the chain that parts at step j by -z_j.

    The partner has the chain's latent at j's input and its noises after j. Since -z_j is as likely as z_j,
    `E[(R - R_j^-) z_j] / 2 = E[R z_j]` whatever the latent and the later noises: half order stays unbiased and needs no
    baseline. Common later noises take away what they add to R: on the toy chain the variance is .30, .41 and .003 times
    REINFORCE's at steps 0, 3 and 5 of 6. A tail costs T - 1 - j forwards and no backward; tails run in one batch from
    where they begin, at most `rows` chains at once (at least B). A step without noise gives 0; half order refuses it.
    """
    size, tails = trajectory.latents.shape[1], dict[int, Tensor]()
    together = len(steps) if rows is None else max(rows // size, 1)
    for k in range(len(sampler)):
        for begun in _groups(sorted(tails), together):
            conditioning = {name: torch.cat([value] * len(begun)) for name, value in trajectory.conditioning.items()}
            latent, noise = torch.cat([tails[j] for j in begun]), torch.cat([trajectory.noise[k]] * len(begun))
            after = sampler.step(theta, k, latent, noise, conditioning).split(size)
            tails |= zip(begun, after, strict=True)
        if k in steps:  # x_(k + 1) is mean + sigma z, so the partner's is mean - sigma z
            tails[k] = trajectory.at(k + 1) - 2 * sampler.schedule.sigma[k] * trajectory.noise[k]
    partners = dict[int, Tensor]()
    for begun in _groups(sorted(tails), together):
        rated = objective(torch.cat([tails[j] for j in begun]))
        partners |= zip(begun, rated.split(size, dim=-1), strict=True)
    return torch.stack([(rewards - partners[j]) / 2 for j in steps])


def draw_branches(sub_chains: Sequence[range], count: int, *seed: int | str) -> tuple[list[range], float]:
    """So many of the sub-chains, in their order, every choice equally likely; and the inverse probability of each.

    Times that, half order on the drawn ones has the expectation of half order on all.
    """
    drawn = sorted(permutation(len(sub_chains), *seed)[:count])
    return [sub_chains[i] for i in drawn], len(sub_chains) / len(drawn)


def leave_one_out(rewards: Tensor, groups: Tensor) -> Tensor:  # [B], [B] -> [B]
    """Each chain's reward minus the mean reward of the others of its group.

    The baseline never uses a chain's own reward, so half order stays unbiased (a group mean that included it would
    scale the term by 1 - 1/m). Raises UserError if a chain is alone in its group.
    """
    same = groups[:, None] == groups[None, :]  # [B, B]
    others = same.sum(1) - 1
    if bool((others == 0).any()):
        raise UserError(
            "leave-one-out needs at least 2 chains in every group, found a group with 1; run more chains of every "
            "prompt, or put all chains in one group"
        )
    return rewards - ((same.to(rewards.dtype) @ rewards) - rewards) / others


def group_advantages(
    parts: Tensor,  # [m, B] summands of the reward, their weights in them
    groups: Tensor,  # [B]
    weights: Sequence[float],  # [m]
) -> tuple[Tensor, Tensor]:  # each [m, B]
    """Each part standardised within its group, times the size of its weight; and by what differences were multiplied.

    `|w_i| (p_i - mean of the group) / deviation of the group`, own rewards included and divided by n, as Flow-GRPO has
    it (arXiv:2505.05470), but reward by reward. Half order's expectation is then no longer the reward's gradient:
    every prompt and every reward counts by its own spread. A part that does not vary in a group says nothing there.
    """
    same = (groups[:, None] == groups[None, :]).to(parts)  # [B, B]
    count = same.sum(1)
    centred = parts - parts @ same / count
    deviation = (centred.square() @ same / count).sqrt()
    flat = deviation <= _FLAT * parts.abs().amax(1, keepdim=True)
    sizes = parts.new_tensor(weights).abs()[:, None]
    scale = (sizes / deviation).masked_fill(flat, 0.0)
    return centred * scale, scale


def _groups(tails: Sequence[int], size: int) -> list[Sequence[int]]:
    return [tails[first : first + size] for first in range(0, len(tails), size)]
