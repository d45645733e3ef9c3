"""A differentiable stand-in for a black-box reward, learned while the run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlr_ray.core.sampler import Conditioning, Objective
from rlr_ray.core.seeds import generator, normal
from rlr_ray.errors import UserError

_SIDE = 4  # of the pooled features, which keep where things are
_WIDTH, _HIDDEN = 32, 128
_MOST = 2 * 2**30  # bytes of the replay


class Regressor(nn.Module):
    """Score of a last latent [B, C, H, W] under a prompt [B, D]; smooth, since first order climbs its slope.

    Strided convolutions until a side is 4 to 7; the prompt scales and shifts what they see. Inputs and scores are
    standardised by buffers; before there is any data the score is 0 for all.
    """

    reward_mean: Tensor
    reward_std: Tensor

    def __init__(self, latent_shape: tuple[int, ...], features: int):
        super().__init__()
        channels, *sides = _picture_shape(latent_shape)
        layers: list[nn.Module] = [nn.Conv2d(channels, _WIDTH, 3, padding=1), nn.SiLU()]
        for _ in range(int(math.log2(max(min(sides) // _SIDE, 1)))):
            layers += [nn.Conv2d(_WIDTH, _WIDTH, 3, stride=2, padding=1), nn.SiLU()]
        layers += [nn.AdaptiveAvgPool2d(_SIDE), nn.Flatten(), nn.Linear(_WIDTH * _SIDE**2, _HIDDEN)]
        self.look = nn.Sequential(*layers)
        self.scale, self.shift = nn.Linear(features, _HIDDEN), nn.Linear(features, _HIDDEN)
        self.rate = nn.Sequential(nn.SiLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, 1))
        for name, shape in (("latent", (channels, 1, 1)), ("prompt", (features,)), ("reward", ())):
            self.register_buffer(f"{name}_mean", torch.zeros(shape))
            self.register_buffer(f"{name}_std", torch.zeros(shape))

    def forward(self, latents: Tensor, prompts: Tensor) -> Tensor:  # [B, C, H, W], [B, D] -> [B]
        return self.standard_score(latents, prompts) * self.reward_std + self.reward_mean

    def standard_score(self, latents: Tensor, prompts: Tensor) -> Tensor:  # [B]
        seen = self.look(self._standard(_as_pictures(latents), "latent"))
        prompts = self._standard(prompts, "prompt")
        return self.rate(seen * (1 + self.scale(prompts)) + self.shift(prompts)).squeeze(1)

    def _standard(self, values: Tensor, name: str) -> Tensor:
        mean, std = getattr(self, f"{name}_mean"), getattr(self, f"{name}_std")
        return (values - mean) / torch.where(std > 0, std, 1.0)


def _picture_shape(latent_shape: tuple[int, ...]) -> tuple[int, ...]:
    """A video's frames count as channels of one picture."""
    return math.prod(latent_shape[:-2]), *latent_shape[-2:]


def _as_pictures(latents: Tensor) -> Tensor:  # [B, C, F, H, W] -> [B, C F, H, W]; of pictures as they are
    return latents.flatten(1, -3)


class OnlineSurrogate:
    """Q(last latent, prompt), a small network trained on a replay of what the reward said of earlier updates' chains.

    It reads the last latent, not the decoded image, so that no decoder is in the backward pass; the prompt is the mean
    of its embedding over tokens. Its scores of an update's chains must be taken before `learn` is shown them: then Q
    does not depend on the chains that it is used on, and half order on R - c Q makes up for all that Q misses.
    """

    def __init__(
        self,
        latent_shape: tuple[int, ...],  # C, H, W
        features: int,  # D of a prompt's embedding
        *,
        seed: int,
        device: torch.device,
        replay: int,  # samples kept
        learning_rate: float,
        steps_per_update: int,
        batch_size: int,
    ):
        taken = 4 * math.prod(latent_shape)  # bytes a sample
        if replay * taken > _MOST:
            raise UserError(
                f"estimator.surrogate.replay is {replay} latents of {taken / 2**20:.3g} MiB, which every checkpoint "
                f"holds; allowed: {_MOST / 2**30:g} GiB; lower it to {_MOST // taken} or fewer"
            )
        self.seed, self.replay = seed, replay
        self.steps_per_update, self.batch_size = steps_per_update, batch_size
        with torch.device("meta"):  # so that no global random number is drawn
            regressor = Regressor(latent_shape, features)
        self.regressor = regressor.to_empty(device=device)
        self._initialise()
        self.optimizer = torch.optim.Adam(self.regressor.parameters(), learning_rate)
        # [n, C, H, W], the oldest first
        self.latents = torch.zeros(0, *_picture_shape(latent_shape), device=device)
        self.prompts = torch.zeros(0, features, device=device)  # [n, D]
        self.rewards = torch.zeros(0, device=device)  # [n]

    @torch.no_grad()
    def _initialise(self) -> None:
        """Weights of variance 1 / inputs, everything else 0."""
        for name, value in self.regressor.state_dict().items():
            if name.endswith("weight"):
                drawn = normal(tuple(value.shape), torch.float32, self.seed, "surrogate", name)
                value.copy_(drawn / math.sqrt(value[0].numel()))
            else:
                value.zero_()

    @staticmethod
    def features(conditioning: Conditioning) -> Tensor:  # [B, L, D], or [B, S, L, D] of stages, -> [B, D]
        return conditioning["prompt"].float().flatten(1, -2).mean(1)

    def objective(self, conditioning: Conditioning) -> Objective:
        """Q of chains with these prompts."""
        prompts = self.features(conditioning)
        return lambda latents: self.regressor(latents, prompts)

    def learn(self, step: int, latents: Tensor, prompts: Tensor, rewards: Tensor) -> None:
        """Keep an update's chains, then train on random minibatches of all that is kept."""
        self.latents = torch.cat([self.latents, _as_pictures(latents)])[-self.replay :]
        self.prompts = torch.cat([self.prompts, prompts])[-self.replay :]
        self.rewards = torch.cat([self.rewards, rewards])[-self.replay :]
        self._standardise()
        targets = (self.rewards - self.regressor.reward_mean) / self.regressor.reward_std.clamp_min(1e-12)
        source = generator(self.seed, "surrogate", "minibatches", step)
        for _ in range(self.steps_per_update):
            rows = torch.randint(len(targets), (self.batch_size,), generator=source).to(targets.device)
            scores = self.regressor.standard_score(self.latents[rows], self.prompts[rows])
            self.optimizer.zero_grad()
            nn.functional.mse_loss(scores, targets[rows]).backward()
            self.optimizer.step()

    @torch.no_grad()
    def _standardise(self) -> None:
        kept = {"latent": (self.latents, (0, 2, 3)), "prompt": (self.prompts, (0,)), "reward": (self.rewards, (0,))}
        for name, (values, over) in kept.items():
            for part, value in zip(("std", "mean"), torch.std_mean(values, over, correction=0), strict=True):
                buffer = getattr(self.regressor, f"{name}_{part}")
                buffer.copy_(value.view_as(buffer))

    @torch.no_grad()
    def share(self, leads: bool, reduce: Callable[[Tensor], Tensor]) -> None:
        """Give every process the leading one's Q, bit for bit: kernels of a GPU may not repeat."""
        for value in self.regressor.state_dict().values():
            value.copy_(reduce(value if leads else torch.zeros_like(value)))

    def state_dict(self) -> dict[str, Any]:
        parts = {"regressor": self.regressor.state_dict(), "optimizer": self.optimizer.state_dict()}
        return parts | {name: getattr(self, name) for name in ("latents", "prompts", "rewards")}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.regressor.load_state_dict(saved["regressor"])
        self.optimizer.load_state_dict(saved["optimizer"])
        for name in ("latents", "prompts", "rewards"):
            setattr(self, name, saved[name])
