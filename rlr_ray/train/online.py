"""A surrogate in a run: made as the recipe says, measured on each update's chains, then shown what the rewards said.

B chains of an update, m parts of the reward, h heads: those of the parts that first order has no gradient of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rlr_ray.config.run import RunConfig
from rlr_ray.core.gradient import GradientEstimate
from rlr_ray.core.sampler import Chains
from rlr_ray.core.sums import gathered
from rlr_ray.core.trust import Trust
from rlr_ray.loggers.surrogate import trust_columns
from rlr_ray.train.engine import Engine
from rlr_ray.train.process import Process
from rlr_ray.train.state import TrainState
from rlr_ray.train.surrogate import OnlineSurrogate, Read


def online_surrogate(engine: Engine) -> OnlineSurrogate | None:
    """A new one, if the recipe asks for it."""
    config, switch = engine.config.estimator.surrogate, engine.shape.switch
    if config is None or config.name != "online":
        return None
    heads = len(engine.config.black_box) if switch else 1
    (shape, read), prompt = _read_by(engine, config.features), engine.encode(engine.prompts[:1])
    return OnlineSurrogate(
        shape,
        OnlineSurrogate.features(prompt).shape[1],
        heads=heads,
        trust=Trust(heads, config.trust, config.window) if switch else None,
        read=read,
        seed=engine.config.seed,
        device=engine.device,
        replay=config.replay,
        learning_rate=config.learning_rate,
        steps_per_update=config.steps_per_update,
        batch_size=config.batch_size,
    )


@torch.no_grad()
def _read_by(engine: Engine, features: str) -> tuple[tuple[int, ...], Read]:  # C, H, W
    """The shape of what is read, and how it is read of last latents."""
    model = engine.model
    nothing = torch.zeros(1, *model.latent_shape, device=engine.device)
    if features == "latent":
        return tuple(model.as_pictures(nothing).shape[1:]), lambda latents, conditioning: model.as_pictures(latents)
    return tuple(model.features(nothing, engine.encode(engine.prompts[:1])).shape[1:]), model.features


def features_read(config: RunConfig, *, climbed: bool) -> tuple[int, int]:
    """Denoiser forwards and backwards by which a surrogate reads an update's chains: again where first order does."""
    surrogate = config.estimator.surrogate
    if surrogate is None or surrogate.name != "online" or surrogate.features == "latent":
        return 0, 0
    return config.train.chains * (1 + climbed), config.train.chains * climbed


@torch.no_grad()
def show_surrogate(
    engine: Engine,
    state: TrainState,
    step: int,
    coefficient: float,  # the surrogate's, in this update
    chains: Mapping[int, Chains],  # this process's chunks
    estimate: GradientEstimate,
    process: Process,
    online: OnlineSurrogate | None,
) -> dict[str, Any]:
    """Measure the surrogate on an update's chains, and only then, if it learns, let it learn what the rewards said.

    Returns the columns that say how it follows them; none without a surrogate. Every process learns the same numbers.
    """
    if engine.config.estimator.surrogate is None:
        return {}
    columns: dict[str, Any] = {} if engine.shape.switch else {"surrogate_coefficient": coefficient}
    latents, rewards = estimate.latents, estimate.rewards
    count = len(rewards) // len(next(iter(chains.values())).x_start)

    def gather(parts: Mapping[int, Tensor]) -> Tensor:  # each [..., B] -> [..., all B]
        every = gathered({c: part.movedim(-1, 0) for c, part in parts.items()}, count, process.reduce)
        return every.flatten(0, 1).movedim(0, -1)

    if online is None or online.trust is None:
        scores = {c: one.surrogate(latents[c]) for c, one in chains.items() if one.surrogate is not None}
        columns["surrogate_correlation"] = state.adaptive.observe_surrogate(gather(scores), rewards, engine.groups())
    if online is None:
        return columns
    pictures = {c: online.read(latents[c], one.conditioning) for c, one in chains.items()}
    prompts = {c: online.features(one.conditioning) for c, one in chains.items()}
    if online.trust is not None:
        rewards = gather({c: _known(one, estimate.parts, count, c) for c, one in chains.items()})
        again = {c: one.rated(latents[c])[list(one.black_box)] for c, one in chains.items() if online.trust.rates_again}
        texts = [prompt.text for prompt in engine.train_prompts(step, range(len(estimate.rewards)))]
        scores = {c: online.scores(pictures[c], prompts[c]) for c in chains}
        online.trust.observe(gather(scores), rewards, texts, gather(again) if again else None)
        columns |= _columns(engine, online.trust)
    all_pictures, all_prompts = (
        gather({c: rows.movedim(0, -1) for c, rows in local.items()}).movedim(-1, 0) for local in (pictures, prompts)
    )
    with torch.enable_grad():
        online.learn(step, all_pictures, all_prompts, rewards)
    online.share(process.leads, process.reduce)
    return columns


def _known(chains: Chains, parts: Tensor, count: int, chunk: int) -> Tensor:  # [m, all B] -> [h, B]
    """Scores of a chunk's chains by the rewards without a gradient; NaN where they were not finite."""
    scores = parts.unflatten(1, (count, -1))[:, chunk]
    if chains.replaced:
        scores = scores.masked_fill(chains.replaced[0], torch.nan)
    return scores[list(chains.black_box)]


def _columns(engine: Engine, trust: Trust) -> dict[str, Any]:
    explained, noise = trust.measured()[0].tolist(), trust.noise_share.tolist()
    heads = zip(explained, trust.trusted, noise, strict=True)
    return trust_columns(dict(zip(engine.config.black_box, heads, strict=True)))
