"""Warnings of a run's results, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlr_ray.config.describe import bias_notes
from rlr_ray.config.run import RunConfig
from rlr_ray.loggers.surrogate import never_trusted
from rlr_ray.rewards.likeness import LIKENESS, REFERENCES
from rlr_ray.rewards.scores import Scores

_SURE = 2  # standard errors
_SURE_OF_SIX = 3  # of several measures of pictures, so that one seldom falls by chance
_FALLS = {
    "precision": "more are like none of these",
    "recall": "they vary less than these",
    "pairwise": "those of one prompt are more alike",
}
_HIGH = 0.8  # share of noise in the squared gradient from which a run says so
_REMEDIES = {
    "half_order": "raise train.chains, or set estimator.half_order.weight: auto",
    "zeroth_order": "raise estimator.zeroth_order.count, train fewer numbers, or use directions: guided, weight: auto",
}


def warnings(
    config: RunConfig,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    scores: Mapping[str, Scores],
) -> list[str]:
    """The gravest first; empty if there is nothing to say."""
    texts = [f"stopped early: {summary['stopped']}"] if summary.get("stopped") else []
    texts += _changes(summary)
    texts += _gaming(scores) or _gamed(summary)
    texts += _pictures(summary, scores["reward"])
    texts += _start_kept(summary) or _gain(scores["reward"])
    texts += _steps_back(summary)
    texts += [*never_trusted(summary.get("surrogate")), *_variance(summary["noise_shares"]), *_counts(rows, summary)]
    return texts + bias_notes(config)


def _changes(summary: Mapping[str, Any]) -> list[str]:
    return [
        f"after update {change['update']} other contents of {', '.join(change['what'])} were accepted: what was "
        "measured before compares with nothing after"
        for change in summary.get("changes") or ()
    ]


def _gaming(scores: Mapping[str, Scores]) -> list[str]:
    """A trained reward that rose for sure while a judge fell for sure."""
    gain, error = scores["reward"].change
    if gain <= _SURE * error:
        return []
    changes = {label: score.change for label, score in scores.items() if not score.trained}
    return [
        f"the trained reward rose by {gain:.3g} while judge {label} fell by {-change:.3g} ± {change_se:.2g}: it may be "
        "gamed; see docs/rewards.md on guards"
        for label, (change, change_se) in changes.items()
        if change < -_SURE * change_se
    ]


def _gamed(summary: Mapping[str, Any]) -> list[str]:
    """The last evaluation's warning: it compares with those before it."""
    told = summary.get("gamed")
    return [f"{told}; see docs/rewards.md on guards"] if told and not summary.get("stopped") else []


def _pictures(summary: Mapping[str, Any], reward: Scores) -> list[str]:
    """Measures of pictures that fell for sure while the reward rose for sure."""
    gain, error = reward.change
    if gain <= _SURE * error:
        return []
    texts = []
    for reference, measures in summary.get("likeness", {}).items():
        falls = [
            f"{LIKENESS[name]} from {one['before']:.2f} to {one['after']:.2f} ± {one['change_se']:.2f} ({_FALLS[name]})"
            for name, one in measures.items()
            if name in _FALLS and one["change"] < -_SURE_OF_SIX * one["change_se"]
        ]
        if falls:
            texts.append(
                f"the trained reward rose by {gain:.3g} while likeness to {REFERENCES[reference]} fell: "
                f"{'; '.join(falls)}; look at the pictures, and see docs/rewards.md on guards"
            )
    return texts


def _start_kept(summary: Mapping[str, Any]) -> list[str]:
    """An adapter that is left as it began, since no evaluation was better."""
    if summary.get("kept_update") != 0 or not summary["steps"]:
        return []
    return [
        f"no evaluation beat the start, so the adapter that is left changes nothing: the held-out reward was "
        f"{summary['reward_before']:.4g} there and {summary['reward_last']:.4g} after the last update; lower "
        "train.learning_rate, raise train.chains or train longer"
    ]


def _steps_back(summary: Mapping[str, Any]) -> list[str]:
    count = summary.get("steps_back")
    if not count or summary.get("stopped"):
        return []
    return [
        f"the run stepped back {count} time{'s' * (count > 1)}, from a falling reward or from beyond guards.kl_stop, "
        f"and went on at {0.5**count:g} of its learning rate; a lower train.learning_rate may do better"
    ]


def _gain(reward: Scores) -> list[str]:
    gain, error = reward.change
    if gain < -_SURE * error:
        return [f"the held-out reward fell by {-gain:.3g} ± {error:.2g}; lower train.learning_rate"]
    if gain <= _SURE * error:
        return [
            f"the gain, {gain:.3g} ± {error:.2g}, is within {_SURE} standard errors of none; train longer, or raise "
            "evaluation.chains"
        ]
    return []


def _variance(shares: Mapping[str, float]) -> list[str]:
    """If most of the gradient was noise of half or zeroth order: how much, from where, and what helps."""
    shares = {name: share for name, share in shares.items() if name in _REMEDIES}
    if sum(shares.values()) < _HIGH:
        return []
    worst = max(shares, key=lambda name: shares[name])
    return [
        f"variance is high: {min(sum(shares.values()), 1):.0%} of the squared gradient was noise, "
        f"{shares[worst]:.0%} from {worst.replace('_', ' ')} (medians over updates); {_REMEDIES[worst]}"
    ]


def _counts(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    """Scores and rollouts that were not as they should be, over all updates and evaluations."""
    words = {
        "reward_invalid": "images had a score that was not finite, which was replaced; mend the reward",
        "evaluation_invalid": "held-out images had a score that was not finite, which was replaced",
        "rollouts_missing": "perturbation pairs were not waited for (cluster.rollouts.quorum)",
        "rollouts_rerun": "rollouts ran again, since their actor was lost or late; the result is the same",
    }
    sums = {name: sum(row.get(name) or 0 for row in rows) for name in words}
    sums["evaluation_invalid"] += summary.get("invalid_before", 0) + summary.get("invalid_after", 0)
    return [f"{count:g} {words[name]}" for name, count in sums.items() if count]
