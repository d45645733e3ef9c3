"""Watches held-out chains for a reward that is gamed: what is best so far, and when to stop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from rlr_ray.config.guards import GuardsConfig
from rlr_ray.rewards.mixture import WeightedSum
from rlr_ray.rewards.scores import Evaluation, mean_and_error

_SIGNIFICANT = 2.0  # standard errors


@dataclass(frozen=True)
class Best:
    """The evaluation of the highest held-out reward so far, the start included."""

    update: int  # updates done
    value: float
    theta: Tensor  # [P]


class Guards:
    """Compares every evaluation with those before it, on the same chains."""

    def __init__(self, config: GuardsConfig, total: WeightedSum, judges: list[str], before: Evaluation, theta: Tensor):
        self.config, self.total, self.judges = config, total, judges
        self.peaks = {judge: (0, before.of(total), before.scores[judge]) for judge in judges}  # at each one's best
        self.best = Best(0, float(before.of(total).mean()), theta.cpu())
        self.gamed = 0  # evaluations in a row
        self.warning: str | None = None  # of the last evaluation
        self.too_far = False  # the last evaluation, beyond kl_stop
        self.stopped: str | None = None  # why

    def note(self, update: int, evaluation: Evaluation, theta: Tensor, *, last: bool = False) -> None:
        """Take an evaluation after so many updates into account; after the `last` one there is nothing to stop."""
        divergence = float(evaluation.divergence.mean())
        self.too_far = self.config.kl_stop is not None and divergence > self.config.kl_stop
        reward = float(evaluation.of(self.total).mean())
        if reward > self.best.value and not self.too_far:
            self.best = Best(update, reward, theta.cpu().clone())
        warnings = [self._compare(judge, update, evaluation) for judge in self.judges]
        self.warning = next(filter(None, warnings), None)
        self.gamed = self.gamed + 1 if self.warning else 0
        if last:
            return
        if self.too_far and self.config.step_back is None:
            self.stopped = f"after update {update}: KL to the base model {divergence:.3g} above kl_stop"
        elif self.config.patience is not None and self.gamed >= self.config.patience:
            self.stopped = f"after update {update}: {self.warning}"

    def _compare(self, judge: str, update: int, evaluation: Evaluation) -> str | None:
        """A warning if this judge fell, since it was highest, while the reward rose."""
        rewards, scores = evaluation.of(self.total), evaluation.scores[judge]
        since, rewards_then, scores_then = self.peaks[judge]
        if float(scores.mean()) >= float(scores_then.mean()):
            self.peaks[judge] = (update, rewards, scores)
            return None
        (rise, rise_se), (fall, fall_se) = mean_and_error(rewards - rewards_then), mean_and_error(scores - scores_then)
        if rise < _SIGNIFICANT * rise_se or -fall < _SIGNIFICANT * fall_se:
            return None
        return (
            f"the reward rose by {rise:.3g} +- {rise_se:.2g} since update {since} while the judge {judge} fell by "
            f"{-fall:.3g} +- {fall_se:.2g}: the reward may be gamed"
        )

    @property
    def _limits(self) -> tuple[float | None, ...]:
        step_back = self.config.step_back
        return self.config.kl_stop, self.config.patience, None if step_back is None else step_back.limit

    def state_dict(self) -> dict[str, Any]:
        names = ("peaks", "gamed", "warning", "stopped")
        return {name: getattr(self, name) for name in names} | {"best": vars(self.best), "limits": self._limits}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """A run that was stopped goes on if it is resumed with other limits."""
        self.peaks = {
            judge: (update, rewards.cpu(), scores.cpu())  # where evaluations are
            for judge, (update, rewards, scores) in saved["peaks"].items()
        }
        self.warning, self.best = saved["warning"], Best(**saved["best"])
        self.best = replace(self.best, theta=self.best.theta.cpu())
        if saved["limits"] == self._limits:
            self.gamed, self.stopped = saved["gamed"], saved["stopped"]
