"""Trust in a surrogate's heads, measured on chains that they have not learned from.

h heads (one a reward), B chains of an update.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_SURE = 1.64  # standard errors: a one-sided limit at 95 %
_NOISY = 0.01  # share of noise in a reward's variance from which it counts as stochastic
_LEAST = 0.05  # of a reward's variance that counts as explainable, however noisy it seems
_AGAIN = 10  # updates whose images are rated a second time; one only, if a reward says the same again
_KEPT = 20  # updates that give a stochastic reward's variance
_ALL = None  # stands for all prompts


class RunningMeans:
    """Running mean over earlier updates of k values of each prompt's chains; of a new prompt, that over all prompts.

    Beside each mean stands the sum of its weights' squares: the mean's variance is that times the variance of a chain
    within its prompt. Of more than `most` prompts those that came last are kept, since every checkpoint holds them; an
    earlier one that comes again is new.
    """

    def __init__(self, smoothing: float = 0.7, most: int = 2**14):
        self.smoothing, self.most = smoothing, most  # smoothing: the weight of what was before
        # prompt -> [k] of mean and sum of squares, the prompt that came last at the end
        self.means: dict[Hashable, list[tuple[float, float]]] = {}

    def before(self, prompts: Sequence[Hashable], count: int) -> Tensor:  # [B], k -> [2, k, B]; NaN: not known
        unknown = self.means.get(_ALL, [(math.nan, math.nan)] * count)
        rows = [self.means.get(prompt, unknown) for prompt in prompts]
        return torch.tensor(rows, dtype=torch.float64).permute(2, 1, 0)

    def add(self, prompts: Sequence[Hashable], values: Tensor) -> None:  # [B]; [k, B], NaN: not known
        chains: dict[Hashable, list[int]] = {}
        for i, prompt in enumerate(prompts):
            chains.setdefault(prompt, []).append(i)
        for prompt, chosen in (*chains.items(), (_ALL, list(range(len(prompts))))):
            some = values[:, chosen].double()
            new = list(zip(some.nanmean(1).tolist(), (1 / (~some.isnan()).sum(1)).tolist(), strict=True))
            old = self.means.pop(prompt, [(math.nan, math.nan)] * len(new))
            self.means[prompt] = [self._mixed(*pair) for pair in zip(old, new, strict=True)]
        beyond = max(len(self.means) - 1 - max(self.most, len(chains)), 0)
        for prompt in list(self.means)[:beyond]:
            del self.means[prompt]

    def _mixed(self, old: tuple[float, float], new: tuple[float, float]) -> tuple[float, float]:
        if math.isnan(old[0]) or math.isnan(new[0]):
            return new if math.isnan(old[0]) else old
        w = self.smoothing
        return w * old[0] + (1 - w) * new[0], w**2 * old[1] + (1 - w) ** 2 * new[1]


class Trust:
    """The variance of its reward that each head explains beside the prompt's baseline; `observe`, then ask.

    A head explains `1 - E (R - Q)^2 / V` of the last `window` updates' chains, V = E (R - b)^2 / (1 + f) their variance
    within a prompt: b is the prompt's running mean over earlier updates, and f what its own error adds. So a head that
    only tells prompts apart explains nothing. It is trusted above `bar` times what can be explained: 1 less the share
    in V of the reward's own noise, which is half the mean square of what a second rating of the same images differs by.
    Of a reward that has some, what is explained must be above at its lower limit of confidence. The scores must be
    taken before the head learns from the same chains, or it seems to explain what nothing can. Where no prompt comes
    twice, b is the mean of all, and what tells prompts apart counts. Chains with a NaN score or reward are left out.
    """

    def __init__(self, heads: int, bar: float = 0.5, window: int = 5):
        self.bar, self.window = bar, window
        self.means = RunningMeans()
        self.sums: list[
            Tensor
        ] = []  # of each update [4, h]: chains; their sums of V, of V less the error's square, of that squared
        self.noise = torch.zeros(2, heads, dtype=torch.float64)  # chains rated again, their halved squared differences
        self.updates_again = 0

    @property
    def rates_again(self) -> bool:
        """Whether the next update's images are to be rated a second time."""
        return self.updates_again == 0 or (self.updates_again < _AGAIN and bool(self.noise[1].any()))

    def observe(
        self,
        scores: Tensor,  # [h, B]
        rewards: Tensor,  # [h, B]
        prompts: Sequence[Hashable],  # [B]
        again: Tensor | None = None,  # [h, B] a second rating, if asked for
    ) -> None:
        """Learn how an update's scores follow the rewards."""
        scores, rewards = scores.detach().double().cpu(), rewards.detach().double().cpu()
        rewards = torch.where((rewards + scores).isfinite(), rewards, torch.nan)
        baseline, added = self.means.before(prompts, len(rewards))
        self.means.add(prompts, rewards)
        reward = (rewards - baseline).square() / (1 + added)
        gain = reward - (rewards - scores).square()
        known = ~gain.isnan()
        rows = [row.where(known, 0.0).sum(1) for row in (torch.ones_like(gain), reward, gain, gain.square())]
        if known.any():
            self.sums = [*self.sums, torch.stack(rows)][-_KEPT:]
        if again is not None:
            half = (rewards - again.detach().double().cpu()).square() / 2
            self.noise += torch.stack([half.isfinite().sum(1), half.where(half.isfinite(), 0.0).sum(1)])
            self.updates_again += 1

    @property
    def noise_share(self) -> Tensor:  # [h]
        """Share of the reward's own noise in its variance within a prompt, 0 .. 1."""
        if not self.sums:
            return torch.zeros_like(self.noise[0])
        chains, squares, *_ = torch.stack(self.sums).sum(0)
        noise = self.noise[1] / self.noise[0].clamp_min(1)
        return (noise / (squares / chains)).nan_to_num(0.0).clamp(max=1.0)

    def measured(self) -> tuple[Tensor, Tensor]:  # each [h]
        """Share of variance that each head explains, and its standard error; NaN until there are enough updates."""
        if len(self.sums) < self.window:
            unknown = torch.full_like(self.noise[0], math.nan)
            return unknown, unknown
        chains, squares, gain, square = torch.stack(self.sums[-self.window :]).sum(0)
        spread = squares / chains
        variance = (square / chains - (gain / chains).square()) / chains
        return gain / chains / spread, variance.clamp_min(0).sqrt() / spread

    @property
    def trusted(self) -> list[bool]:  # [h]
        explained, error = self.measured()
        if len(self.sums) < self.window:
            return [False] * len(explained)
        share = self.noise_share
        limit = explained - torch.where(share > _NOISY, _SURE * error, 0.0)
        return (limit > self.bar * (1 - share).clamp_min(_LEAST)).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {
            "means": self.means.means,
            "sums": self.sums,
            "noise": self.noise,
            "updates_again": self.updates_again,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.means.means, self.updates_again = saved["means"], saved["updates_again"]
        self.sums, self.noise = [row.cpu() for row in saved["sums"]], saved["noise"].cpu()
