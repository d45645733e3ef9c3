"""The tables of bench/rewards.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from page import MACHINE, RESULTS, mean_se, table  # beside this file, as the next ones
from rewards import VARIANTS
from whole_runs import read

PAGE = """## Two rewards in one run, and a guard

`python bench/rewards.py`: the embedded model under the classifier (differentiable), the size as JPEG (a black box),
both in one run (first order carries the classifier, half order the JPEG size also on first order's steps), and the JPEG
size with guards: a penalty on the divergence from the base model and a moving average. Equal cost in denoiser forwards,
that of {updates} updates of the demo; seeds {seeds}, 400 paired held-out chains. Gains of the scores as they are
(log-probability; minus kilobytes), mean and standard error over seeds, of one seed over its chains; the base model's
scores for comparison. Judge: share of pictures that a classifier which is never trained on reads as the digit asked
for. Warned: runs whose report says that the reward may be gamed. Machine: {machine}.

{rows}

{words}
"""


def rewards() -> str:
    rows = read(RESULTS / "rewards.jsonl")
    groups = {name: [row for row in rows if row["variant"] == name] for name in VARIANTS}
    if not all(groups.values()):
        return ""
    heads = ("trained on", "updates", "seeds", "classifier", "JPEG, kB", "judge", "KL, nats", "warned")
    updates = statistics.mean(row["steps"] for row in groups["classifier"])
    return PAGE.format(
        updates=round(updates),
        seeds=", ".join(str(seed) for seed in sorted({row["seed"] for row in rows})),
        machine=MACHINE,
        rows=table(
            heads, [["(base model)", "", "", *_base(rows), "0", ""], *(_line(*item) for item in groups.items())]
        ),
        words=_trade_off(groups),
    )


def _score(row: dict[str, Any], label: str, when: str) -> float:
    return row["scores"][label][when]


def _base(rows: Sequence[dict[str, Any]]) -> list[str]:
    labels = ("digits", "jpeg_compressibility", "digits_judge")
    found = [[_score(row, label, "before") for row in rows] for label in labels]
    return [f"{statistics.mean(values):.3g}" for values in found]


def _line(name: str, runs: Sequence[dict[str, Any]]) -> list[str]:
    warned = sum(any("gamed" in text for text in run["warnings"]) for run in runs)
    cells = [name, str(runs[0]["steps"]), str(len(runs))]
    for label, digits in (("digits", 2), ("jpeg_compressibility", 4)):
        gains = [_score(run, label, "gain") for run in runs]
        error = _error(gains) if gains[1:] else _score(runs[0], label, "gain_se")
        cells.append(f"{statistics.mean(gains):+.{digits}f} ± {error:.{digits}f}")
    return [
        *cells,
        mean_se([_score(run, "digits_judge", "after") for run in runs]),
        _nats(runs),
        f"{warned} of {len(runs)}",
    ]


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def _nats(runs: Sequence[dict[str, Any]]) -> str:
    return f"{statistics.mean(run['kl'] for run in runs):.3g}"


def _trade_off(groups: dict[str, list[dict[str, Any]]]) -> str:
    """Where the mixed run lies against the line between the two single ones, for each reward at the other's level."""
    gains = {
        name: [
            statistics.mean(_score(run, label, "gain") for run in runs) for label in ("digits", "jpeg_compressibility")
        ]
        for name, runs in groups.items()
    }
    (c, cj), (j, jj), (b, bj) = gains["classifier"], gains["JPEG"], gains["both"]
    share = (b - j) / (c - j)  # of the way from JPEG alone to the classifier alone, by the classifier's score
    line = jj + share * (cj - jj)
    return (
        f"Between the two single runs, a mixture of models that gains {b:+.2f} of the classifier's score would gain "
        f"{line:+.4f} kB; the run on both gains {bj:+.4f} kB."
    )
