"""What the held-out chains were given before and after, by who gave it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlr_ray.evaluate import Evaluation, mean_and_error
from rlr_ray.rewards.mixture import Mixture


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
