"""The network that an online surrogate trains: a trunk, and a head for each reward.

B chains, h heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_SIDE = 4  # of the pooled features, which keep where things are
_WIDTH, _HIDDEN = 32, 128
_FLAT = 1e-6  # spread, beside the mean's size, below which values count as equal


class Regressor(nn.Module):
    """Scores of a picture [B, C, H, W] under a prompt [B, D]; smooth, since first order climbs their slopes.

    Strided convolutions until a side is 4 to 7; the prompt scales and shifts what they see. A video's frames count as
    channels. Pictures, prompts and each head's scores are standardised by buffers; before there is any data every
    score is 0.
    """

    picture_std: Tensor  # [C, 1, 1]
    reward_mean: Tensor  # [h]
    reward_std: Tensor  # [h]

    def __init__(self, shape: tuple[int, ...], features: int, heads: int = 1):  # [C, H, W]; D
        super().__init__()
        channels, *sides = picture_shape(shape)
        layers: list[nn.Module] = [nn.Conv2d(channels, _WIDTH, 3, padding=1), nn.SiLU()]
        for _ in range(int(math.log2(max(min(sides) // _SIDE, 1)))):
            layers += [nn.Conv2d(_WIDTH, _WIDTH, 3, stride=2, padding=1), nn.SiLU()]
        layers += [nn.AdaptiveAvgPool2d(_SIDE), nn.Flatten(), nn.Linear(_WIDTH * _SIDE**2, _HIDDEN)]
        self.look = nn.Sequential(*layers)
        self.scale, self.shift = nn.Linear(features, _HIDDEN), nn.Linear(features, _HIDDEN)
        self.rate = nn.Sequential(nn.SiLU(), nn.Linear(_HIDDEN, _HIDDEN), nn.SiLU(), nn.Linear(_HIDDEN, heads))
        for name, size in (("picture", (channels, 1, 1)), ("prompt", (features,)), ("reward", (heads,))):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.zeros(size))

    def forward(self, pictures: Tensor, prompts: Tensor) -> Tensor:  # [B, C, H, W], [B, D] -> [h, B]
        scores = self.standard_scores(pictures, prompts)
        return scores * self.reward_std[:, None] + self.reward_mean[:, None]

    def standard_scores(self, pictures: Tensor, prompts: Tensor) -> Tensor:  # [h, B]
        features, condition = (
            self.look(self._standard(as_pictures(pictures), "picture")),
            self._standard(prompts, "prompt"),
        )
        scores: Tensor = self.rate(features * (1 + self.scale(condition)) + self.shift(condition))
        return scores.T

    def _standard(self, values: Tensor, name: str) -> Tensor:
        mean, std = getattr(self, f"{name}_mean"), getattr(self, f"{name}_std")
        return (values - mean) / torch.where(std > 0, std, 1.0)

    @torch.no_grad()
    def standardise(self, pictures: Tensor, prompts: Tensor, rewards: Tensor) -> Tensor:  # [n, ...]; [h, n] -> [h, n]
        """Take means and spreads from all that is kept; the rewards in those units, NaN where they are.

        Each head's are those of its finite rewards. Of rewards that are equal, whose spread is rounding, all are 0.
        """
        for name, values, over in (("picture", pictures, (0, 2, 3)), ("prompt", prompts, (0,))):
            std, mean = torch.std_mean(values, over, correction=0)
            getattr(self, f"{name}_std").copy_(std.view_as(getattr(self, f"{name}_std")))
            getattr(self, f"{name}_mean").copy_(mean.view_as(getattr(self, f"{name}_mean")))
        mean = rewards.nanmean(1).nan_to_num()
        std = (rewards - mean[:, None]).square().nanmean(1).nan_to_num().sqrt()
        std = torch.where(std > _FLAT * mean.abs(), std, 0.0)
        self.reward_mean.copy_(mean)
        self.reward_std.copy_(std)
        targets = (rewards - mean[:, None]) / torch.where(std > 0, std, 1.0)[:, None]
        return torch.where((std > 0)[:, None] | targets.isnan(), targets, 0.0)


def picture_shape(shape: tuple[int, ...]) -> tuple[int, ...]:  # [C, F, H, W] -> [C F, H, W]
    return math.prod(shape[:-2]), *shape[-2:]


def as_pictures(latents: Tensor) -> Tensor:  # [B, C, F, H, W] -> [B, C F, H, W]; of pictures as they are
    return latents.flatten(1, -3)


def masked_mse(scores: Tensor, targets: Tensor) -> Tensor:  # [h, B], [h, B] with NaN -> []
    """Mean of the squared error over the targets that are not NaN; 0, with a gradient of 0, where all are."""
    known = ~targets.isnan()
    error = torch.where(known, scores - targets.nan_to_num(), 0.0)
    return error.square().sum() / known.sum().clamp_min(1)
