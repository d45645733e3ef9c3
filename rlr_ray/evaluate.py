"""Held-out rewards: the same seeds and prompts every time, so that differences are paired."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlr_ray.core.chain import sample_chain
from rlr_ray.engine import Engine
from rlr_ray.rewards import load_reward, score


@dataclass(frozen=True)
class Evaluation:
    rewards: Tensor  # [n]
    judge: Tensor | None  # [n]
    images: Tensor  # [pictures, 3, H, W] in [0, 1]


@torch.no_grad()
def evaluate(engine: Engine, theta: Tensor) -> Evaluation:
    """Sample the held-out chains at theta [P], in chunks of the training chunk's size, and score them."""
    config, size = engine.config.evaluation, engine.config.train.chunk_size
    judge = config.judge and load_reward(config.judge.name, config.judge.options, engine.device)
    rewards, verdicts, images = [], [], []
    for first in range(0, config.chains, size):
        indices = range(first, min(first + size, config.chains))
        pictures = sample_images(engine, theta, indices)
        _, prompts = engine.held_out(indices)
        texts, metadata = [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]
        rewards.append(score(engine.reward, pictures, texts, metadata, engine.config.reward.name).cpu())
        if config.judge and judge:
            verdicts.append(score(judge, pictures, texts, metadata, config.judge.name).cpu())
        images += list(pictures[: max(config.pictures - first, 0)].cpu())
    return Evaluation(torch.cat(rewards), torch.cat(verdicts) if verdicts else None, torch.stack(images))


@torch.no_grad()
def sample_images(engine: Engine, theta: Tensor, indices: range) -> Tensor:  # [B, 3, H, W]
    """Images of held-out chains at theta [P]."""
    chains = engine.held_out_chains(indices)
    latents = sample_chain(
        engine.model, theta, engine.model.schedule, chains.x_start, chains.noise, chains.conditioning
    ).latents
    return engine.model.decode(latents[-1])


def paired_gain(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean gain and its standard error, from paired rewards [n]."""
    gain = (after - before).double()
    return float(gain.mean()), float(gain.std()) / math.sqrt(len(gain))
