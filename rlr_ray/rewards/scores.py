"""Scores of held-out chains before and after, by reward and judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlr_ray.rewards.likeness import Pictures, within_prompt
from rlr_ray.rewards.mixture import WeightedSum


@dataclass(frozen=True)
class Evaluation:
    """Measurements of held-out chains at one theta."""

    scores: dict[str, Tensor]  # of each reward and judge, by label, [n]
    images: Tensor  # [pictures, 3, H, W] in [0, 1], or small videos [pictures, F, 3, h, w]
    divergence_by_step: Tensor  # [T, m] nats from the base model's chains, of the first m; nan at steps without noise
    features: Tensor  # [n, D] of all images
    prompts: Tensor  # [n] which prompt each is of, by number
    replaced: dict[str, Tensor] = field(default_factory=dict)  # [n] by label, which scores were not finite; {}: none

    @property
    def invalid(self) -> int:
        """Scores that were not finite and replaced."""
        return sum(int(marks.sum()) for marks in self.replaced.values())

    @property
    def divergence(self) -> Tensor:  # [m]
        """Of whole chains, steps without noise left out; nan if there is no other."""
        silent = self.divergence_by_step.isnan().all(0)
        return self.divergence_by_step.nansum(0).masked_fill(silent, float("nan"))

    @property
    def kl_by_step(self) -> list[float | None]:  # [T]
        """Mean nats a chain at each step; None at steps without noise."""
        means = self.divergence_by_step.double().mean(1).tolist()
        return [None if math.isnan(mean) else mean for mean in means]

    @property
    def pictures(self) -> Pictures:
        return Pictures(self.features, self.prompts)

    @property
    def diversity(self) -> float:
        """Mean distance between images of the same prompt; nan if no prompt has two."""
        return float(within_prompt(self.pictures).nanmean())

    def of(self, total: WeightedSum) -> Tensor:  # [n]
        """The maximised sum."""
        return total.parts(self.rows(total.labels)).sum(0)

    def rows(self, labels: Sequence[str]) -> Tensor:  # [m, n]
        return torch.stack([self.scores[label] for label in labels])

    def measured_rows(self, labels: Sequence[str]) -> Tensor:  # [m, n]
        """The scores, nan where one was replaced."""
        rows = self.rows(labels)
        if self.replaced:
            rows = rows.masked_fill(torch.stack([self.replaced[label] for label in labels]), math.nan)
        return rows


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of values [n] and its standard error; of paired differences, the gain and its."""
    values = values.double()
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@dataclass(frozen=True)
class Scores:
    """A reward's or a judge's scores of the same chains."""

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
            "before": mean_and_error(self.before)[0],
            "after": mean_and_error(self.after)[0],
            "gain": gain,
            "gain_se": error,
        }


def held_out_scores(total: WeightedSum, before: Evaluation, after: Evaluation) -> dict[str, Scores]:
    """By label, as in a row's columns `held_out_<label>`: the maximised sum as `reward`, the judges, and
    each reward if that is not the same.
    """
    scores = {"reward": Scores(before.of(total), after.of(total), trained=True)}
    for label, values in before.scores.items():
        trained = label in total.labels
        if not trained or len(total.labels) > 1 or total.standardised:
            scores[label] = Scores(values, after.scores[label], trained)
    return scores
