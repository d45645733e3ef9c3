"""The two phases of a black box, as a plan's updates have them: before its surrogate is trusted, and once it is.

h heads, one a reward without a gradient; m parts of the reward, B chains of an update.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.sampler import Chains
from rlr_ray.lab.measure import Subject, prompts_of
from rlr_ray.train.engine import Engine
from rlr_ray.train.online import online_surrogate
from rlr_ray.train.surrogate import OnlineSurrogate


@dataclass(frozen=True)
class Phase:
    """The problem that a phase's updates are measured on, and their plan's shape."""

    subject: Subject
    shape: PlanShape


def until_trusted(engine: Engine, subject: Subject) -> Phase:
    """No head is: the forward term carries what has no gradient."""
    count = len(engine.config.rewards)
    return Phase(subject, engine.shape.carrying(count - len(engine.config.black_box), count))


def once_trusted(engine: Engine, subject: Subject, updates: int) -> Phase | None:
    """First order climbs the heads as they are after so many updates' chains, which no measurement uses.

    Theta stays where it is. None if the heads are not all trusted then.
    """
    online = online_surrogate(engine)
    assert online is not None and online.trust is not None, "a plan that switches to a surrogate has one that learns"
    for number in range(updates):
        _learn(engine, online, subject, number)
    if len(online.trusted) < len(engine.config.black_box):
        return None
    count = len(engine.config.rewards)

    def batch(number: int) -> list[Chains]:
        heads = ((chains, online.heads(chains.conditioning)) for chains in subject.batch(number))
        return [replace(chains, heads=each).trusting(online.trusted) for chains, each in heads]

    return Phase(replace(subject, batch=batch), engine.shape.carrying(count, count))


@torch.no_grad()
def _learn(engine: Engine, online: OnlineSurrogate, subject: Subject, number: int) -> None:
    """Score an update's chains, and only then learn from them, as a run does."""
    batch = -1 - number
    pictures, prompts, rewards = list[Tensor](), list[Tensor](), list[Tensor]()  # [B, ...], [B, D], [h, B]
    for chains in subject.batch(batch):
        last = subject.sampler.sample(subject.theta, *chains.start).latents[-1]
        pictures.append(online.read(last, chains.conditioning))
        prompts.append(online.features(chains.conditioning))
        rated = chains.rated(last)
        rated = rated.masked_fill(chains.replaced[-1], torch.nan) if chains.replaced else rated
        rewards.append(rated[list(chains.black_box)])
    all_pictures, all_prompts, all_rewards = torch.cat(pictures), torch.cat(prompts), torch.cat(rewards, 1)
    assert online.trust is not None
    texts = prompts_of(engine, batch, len(all_pictures))
    online.trust.observe(online.scores(all_pictures, all_prompts), all_rewards, texts)
    with torch.enable_grad():
        online.learn(number, all_pictures, all_prompts, all_rewards)
