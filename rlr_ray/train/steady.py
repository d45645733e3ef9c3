"""Stability of a run: gradients are scaled by kind and clipped, and theta steps back when the reward falls.

P trained numbers, G prompts of an update with B / G chains each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlr_ray.config.guards import StepBackConfig

_KEPT = 0.9  # of a running size, at each update
_SPIKE = 3.0  # times its running size, beyond which a norm counts for no more
_SURE = 3.0  # standard errors of the difference


class Sizes:
    """Running sizes of gradients, each kind's own, and of what is left once each is divided by its own.

    Adam's second moment is shared: without this, the larger of two kinds that take turns starves the other. A kind is
    which terms a gradient has, and whose reward first order carries.
    """

    def __init__(self, *, own_norms: bool, clip: float | None):
        self.own_norms, self.clip = own_norms, clip
        self.norms: dict[str, float] = {}  # by kind
        self.typical: float | None = None  # of updates, which are cut at `clip` times this

    def factor(self, kind: str, norm: float, numbers: int) -> float:
        """By what a gradient of this kind, norm and P numbers is to be multiplied.

        Its own running norm n follows n <- .9 n + .1 min(norm, 3 n); over n and times the root of P, its numbers have a
        root mean square of about 1, so an optimizer without moments takes steps of the learning rate, too. 0 stays 0.
        """
        if not norm:
            return 1.0
        factor = 1.0
        if self.own_norms:
            before = self.norms.get(kind, norm)
            self.norms[kind] = _KEPT * before + (1 - _KEPT) * min(norm, _SPIKE * before)
            factor = math.sqrt(numbers) / self.norms[kind]
        return factor * self._cut(factor * norm)

    def _cut(self, size: float) -> float:
        """Factor that cuts an update to `clip` times its running size, which a spike raises by at most a tenth."""
        if self.clip is None:
            return 1.0
        typical = size if self.typical is None else self.typical
        self.typical = typical + (1 - _KEPT) * (size - typical) if size < _SPIKE * typical else (2 - _KEPT) * typical
        return min(1.0, self.clip * self.typical / size)

    def state_dict(self) -> dict[str, Any]:
        return {"norms": dict(self.norms), "typical": self.typical}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.norms, self.typical = dict(saved["norms"]), saved["typical"]


class StepBack:
    """Decides when a run returns to an earlier theta, and to which, from numbers that are equal in every process.

    When the mean reward of the last updates lies below the best such mean by more than three standard errors of the
    difference, and by more than luck makes of the highest of n such means (in expectation at most sqrt(2 ln n) standard
    errors of one), the run returns to the average of theta of that best; where held-out chains went beyond
    guards.kl_stop, to the last average that did not. The `limit`th return is the last. Without the second part a reward
    that stands still is taken to fall in six of ten runs of 80 updates, and five times in most of 240.
    """

    def __init__(self, config: StepBackConfig, theta: Tensor):
        self.config = config
        self.seen: list[tuple[float, float]] = []  # of the last updates: mean reward, and variance of that mean
        self.best: tuple[float, float, Tensor] | None = None  # mean, its variance, the average of theta [P]
        self.windows = 0  # means so far, the best among them
        self.near = theta  # [P] last average within guards.kl_stop
        self.steps_back = 0
        self.told = ""  # the last one, in words
        self.last_mean: float | None = None  # of an update of a single prompt
        self.jumps: float | None = None  # running mean of half the squared difference of two such in a row

    @property
    def cut(self) -> float:
        """Factor of the learning rate: a half for each step back."""
        return 0.5**self.steps_back

    @property
    def stopped(self) -> str | None:
        """Why the run ends, if it does."""
        if self.steps_back < self.config.limit:
            return None
        return (
            f"{self.told}; that was step back {self.steps_back} of {self.config.limit} (guards.step_back.limit), the "
            f"learning rate is {self.cut:.2g} of the recipe's: start a run with a lower train.learning_rate or more "
            "train.chains, or see whether the reward is what is meant"
        )

    def note_rewards(self, update: int, rewards: Tensor, theta: Tensor) -> Tensor | None:
        """Take an update's rewards [G, B / G] and the average of theta [P] after it; where to return to, if at all."""
        spread = self._variance(rewards)
        if spread is not None:
            self.seen = [*self.seen, (float(rewards.mean()), spread)][-self.config.window :]
        count = len(self.seen)
        if spread is None or count < self.config.window:
            return None
        self.windows += 1
        mean, variance = sum(one for one, _ in self.seen) / count, sum(one for _, one in self.seen) / count**2
        if self.best is None or mean > self.best[0]:
            self.best = (mean, variance, theta.clone())
            return None
        best, its_variance, where = self.best
        error = math.sqrt(variance + its_variance)
        luck = math.sqrt(its_variance * 2 * math.log(max(self.windows / count, 1.0)))
        if not mean < best - _SURE * error - luck:
            return None
        self._count(
            f"after update {update}: the mean reward of {count} updates fell from its best {best:.4g} to {mean:.4g} "
            f"(standard error of the difference {error:.2g})"
        )
        return where

    def _variance(self, rewards: Tensor) -> float | None:
        """Variance of the mean of an update's rewards [G, B / G], prompts' difficulty included; None if not known yet.

        By the spread of the prompts' means; an update of a single prompt cannot tell how prompts differ, so there the
        running mean of half the squared difference between two updates in a row counts, if it is more.
        """
        means = rewards.mean(1)
        if len(means) > 1:
            return float(means.var()) / len(means)
        within = float(rewards.var()) / rewards.numel() if rewards.numel() > 1 else 0.0
        before, self.last_mean = self.last_mean, float(means)
        if before is None:
            return None
        jump = (self.last_mean - before) ** 2 / 2
        self.jumps = jump if self.jumps is None else _KEPT * self.jumps + (1 - _KEPT) * jump
        return max(within, self.jumps)

    def note_divergence(self, update: int, theta: Tensor, *, too_far: bool) -> Tensor | None:
        """Take into account whether held-out chains at the average theta [P] are beyond guards.kl_stop; see above."""
        if not too_far:
            self.near = theta.clone()
            return None
        self._count(f"after update {update}: KL to the base model above guards.kl_stop")
        self.best = None  # which may lie beyond, too
        return self.near

    def _count(self, told: str) -> None:
        self.steps_back, self.told, self.seen = self.steps_back + 1, told, []

    def forget(self) -> None:
        """No reward so far compares with those to come."""
        self.seen, self.best, self.windows, self.last_mean, self.jumps = [], None, 0, None, None

    def state_dict(self) -> dict[str, Any]:
        names = ("seen", "best", "windows", "near", "steps_back", "told", "last_mean", "jumps")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        for name, value in saved.items():
            setattr(self, name, value)
