"""What the held-out chains were given before and after, by who gave it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlr_ray.rewards.mixture import Mixture


@dataclass(frozen=True)
class Evaluation:
    """What held-out chains at one theta are like."""

    scores: dict[str, Tensor]  # of each reward and judge, by label, [n]
    images: Tensor  # [pictures, 3, H, W] in [0, 1], or small videos [pictures, F, 3, h, w]
    divergence: Tensor  # nats from the base model's chains, of the first chains; nan without noise
    diversity: float  # mean distance between images of the same prompt; nan if no prompt has two
    invalid: int = 0  # scores that were not finite and replaced

    def of(self, rewards: Mixture) -> Tensor:  # [n]
        """What is maximised."""
        return rewards.parts(torch.stack([self.scores[label] for label in rewards.labels])).sum(0)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Of values [n]: their mean and its standard error. Of paired differences: the gain and its."""
    values = values.double()
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@dataclass(frozen=True)
class Scores:
    """One reward's or one judge's scores of the same chains."""

    before: Tensor  # [n]
    after: Tensor  # [n]
    trained: bool  # on it, so a rise proves little; a judge's is not

    @property
    def change(self) -> tuple[float, float]:
        """Mean and standard error, over pairs."""
        return mean_and_error(self.after - self.before)

    @property
    def summary(self) -> dict[str, float]:
        gain, error = self.change
        return {
            "before": float(self.before.mean()),
            "after": float(self.after.mean()),
            "gain": gain,
            "gain_se": error,
        }


def held_out_scores(rewards: Mixture, before: Evaluation, after: Evaluation) -> dict[str, Scores]:
    """By label, as in a row's columns `held_out_<label>`: what is maximised as `reward`, the judges, and each reward

    as it is, if that is not the same.
    """
    scores = {"reward": Scores(before.of(rewards), after.of(rewards), trained=True)}
    for label, own in before.scores.items():
        trained = label in rewards.labels
        if not trained or len(rewards.labels) > 1 or any(rewards.normalized):
            scores[label] = Scores(own, after.scores[label], trained)
    return scores
