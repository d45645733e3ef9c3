"""A differentiable stand-in for black-box rewards, learned while the run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlr_ray.core.sampler import Conditioning, Objective
from rlr_ray.core.seeds import generator, normal
from rlr_ray.core.trust import Trust
from rlr_ray.errors import UserError
from rlr_ray.train.regressor import Regressor, as_pictures, masked_mse, picture_shape

_MOST = 2 * 2**30  # bytes of the replay
_BLUR = 0.3  # noise on what is read while it learns, in spreads of it
_KEPT = ("pictures", "prompts", "rewards")
# Last latents and their prompts -> pictures [B, C, H, W] that are rated, differentiable
Read = Callable[[Tensor, Conditioning], Tensor]


class OnlineSurrogate:
    """Q(last latent, prompt), a small network trained on a replay of what the rewards said of earlier updates' chains.

    It reads the last latent, not the decoded image, so that no decoder is in the backward pass, or what `read` makes of
    that (the base denoiser's middle features); the replay keeps what is read. The prompt is the mean of its embedding
    over tokens. Each of several rewards has a head of its own on one trunk. A score that is NaN, because its reward
    failed or is late, teaches nothing. The scores of an update's chains must be taken before `learn` is shown them:
    then Q does not depend on the chains that it is used on, half order on R - c Q makes up for all that Q misses, and
    what Q explains of them is not what it has learned by heart.
    """

    def __init__(
        self,
        shape: tuple[int, ...],  # C, H, W that is read
        features: int,  # D of a prompt's embedding
        *,
        heads: int = 1,  # h
        trust: Trust | None = None,  # in each head, where first order switches to them
        read: Read = lambda latents, conditioning: latents,
        seed: int,
        device: torch.device,
        replay: int,  # samples kept
        learning_rate: float,
        steps_per_update: int,
        batch_size: int,
    ):
        taken = 4 * math.prod(shape)  # bytes a sample
        if replay * taken > _MOST:
            raise UserError(
                f"estimator.surrogate.replay is {replay} latents of {taken / 2**20:.3g} MiB, which every checkpoint "
                f"holds; allowed: {_MOST / 2**30:g} GiB; lower it to {_MOST // taken} or fewer"
            )
        self.seed, self.replay, self.read, self.trust = seed, replay, read, trust
        self.steps_per_update, self.batch_size = steps_per_update, batch_size
        with torch.device("meta"):  # so that no global random number is drawn
            regressor = Regressor(shape, features, heads)
        self.regressor = regressor.to_empty(device=device)
        self._initialise()
        self.optimizer = torch.optim.Adam(self.regressor.parameters(), learning_rate)
        self.pictures = torch.zeros(0, *picture_shape(shape), device=device)  # [n, C, H, W], the oldest first
        self.prompts = torch.zeros(0, features, device=device)  # [n, D]
        self.rewards = torch.zeros(0, heads, device=device)  # [n, h]

    @torch.no_grad()
    def _initialise(self) -> None:
        """Weights of variance 1 / inputs, everything else 0."""
        for name, value in self.regressor.state_dict().items():
            if name.endswith("weight"):
                drawn = normal(tuple(value.shape), torch.float32, self.seed, "surrogate", name)
                value.copy_(drawn / math.sqrt(value[0].numel()))
            else:
                value.zero_()

    @property
    def trusted(self) -> tuple[int, ...]:
        """Heads that may stand in for their rewards."""
        return tuple(head for head, trusted in enumerate(self.trust.trusted) if trusted) if self.trust else ()

    @staticmethod
    def features(conditioning: Conditioning) -> Tensor:  # [B, L, D], or [B, S, L, D] of stages, -> [B, D]
        return conditioning["prompt"].float().flatten(1, -2).mean(1)

    def scores(self, pictures: Tensor, prompts: Tensor) -> Tensor:  # as `read` and `features` gave them -> [h, B]
        scores: Tensor = self.regressor(pictures, prompts)
        return scores

    def heads(self, conditioning: Conditioning) -> Objective:
        """Every head's score [h, B] of last latents with these prompts, with a gradient to the latents."""
        prompts = self.features(conditioning)
        return lambda latents: self.scores(self.read(latents, conditioning), prompts)

    def objective(self, conditioning: Conditioning) -> Objective:
        """Q [B] of chains with these prompts: the sum over heads."""
        heads = self.heads(conditioning)
        return lambda latents: heads(latents).sum(0)

    def learn(self, step: int, pictures: Tensor, prompts: Tensor, rewards: Tensor) -> None:
        """Keep an update's chains, then train on random minibatches of all that is kept; rewards [h, B] or [B].

        Minibatches see their pictures with noise: first order climbs Q's slope, which a Q that fits a thousand chains
        exactly has wrong. On moving digits the gradient of theta through Q had cosine .77 with the reward's, not .63.
        """
        self.pictures = torch.cat([self.pictures, as_pictures(pictures.detach())])[-self.replay :]
        self.prompts = torch.cat([self.prompts, prompts])[-self.replay :]
        rewards = torch.where(rewards.isfinite(), rewards, torch.nan)
        self.rewards = torch.cat([self.rewards, torch.atleast_2d(rewards).T])[-self.replay :]
        targets = self.regressor.standardise(self.pictures, self.prompts, self.rewards.T)
        source = generator(self.seed, "surrogate", "minibatches", step)
        for _ in range(self.steps_per_update):
            rows = torch.randint(len(self.rewards), (self.batch_size,), generator=source).to(targets.device)
            blur = torch.randn(self.batch_size, *self.pictures.shape[1:], generator=source).to(targets.device)
            pictures = self.pictures[rows] + _BLUR * self.regressor.picture_std * blur
            scores = self.regressor.standard_scores(pictures, self.prompts[rows])
            self.optimizer.zero_grad()
            masked_mse(scores, targets[:, rows]).backward()
            self.optimizer.step()

    @torch.no_grad()
    def share(self, leads: bool, reduce: Callable[[Tensor], Tensor]) -> None:
        """Give every process the leading one's Q, bit for bit: kernels of a GPU may not repeat."""
        for value in self.regressor.state_dict().values():
            value.copy_(reduce(value if leads else torch.zeros_like(value)))

    def state_dict(self) -> dict[str, Any]:
        parts = {"regressor": self.regressor.state_dict(), "optimizer": self.optimizer.state_dict()}
        parts |= {"trust": self.trust.state_dict()} if self.trust else {}
        return parts | {name: getattr(self, name) for name in _KEPT}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.regressor.load_state_dict(saved["regressor"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.trust is not None:
            self.trust.load_state_dict(saved["trust"])
        for name in _KEPT:
            setattr(self, name, saved[name])
