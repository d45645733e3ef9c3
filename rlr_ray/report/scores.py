"""What the held-out chains were given before and after, by who gave it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlr_ray.config import RunConfig
from rlr_ray.evaluate import Evaluation, paired_gain


@dataclass(frozen=True)
class Scores:
    """One reward's or one judge's scores of the same chains."""

    before: Tensor  # [n]
    after: Tensor  # [n]
    trained: bool  # on it, so a rise proves little; a judge's is not

    @property
    def change(self) -> tuple[float, float]:
        """Mean and standard error, over pairs."""
        return paired_gain(self.before, self.after)


def held_out_scores(config: RunConfig, before: Evaluation, after: Evaluation) -> dict[str, Scores]:
    """By label, as in a row's columns `held_out_<label>`; the trained reward first."""
    scores = {"reward": Scores(before.rewards, after.rewards, trained=True)}
    if config.evaluation.judge and before.judge is not None and after.judge is not None:
        scores[config.evaluation.judge.name] = Scores(before.judge, after.judge, trained=False)
    return scores
