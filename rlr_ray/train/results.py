"""Results of a run, for people: held-out rewards, adapter, pictures, summary."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rlr_ray.core.gradient import TERMS
from rlr_ray.errors import first_line
from rlr_ray.loggers.curves import held_out_points
from rlr_ray.loggers.pictures import save_comparison, save_grid, save_reward_curve
from rlr_ray.loggers.shown import Shown, pairs_of
from rlr_ray.loggers.surrogate import surrogate_summary
from rlr_ray.loggers.warnings import warnings
from rlr_ray.rewards.likeness import Likeness, Reference, summarised
from rlr_ray.rewards.scores import Evaluation, held_out_scores, mean_and_error
from rlr_ray.train.engine import Engine, Rollouts
from rlr_ray.train.guards import Guards
from rlr_ray.train.held_out import evaluate
from rlr_ray.train.picture_engine import chain_rows
from rlr_ray.train.reference import picture_features, real_reference
from rlr_ray.train.run_folder import Recorder, RunFolder
from rlr_ray.train.state import TrainState
from rlr_ray.utils.environment import versions
from rlr_ray.utils.files import Unreadable, disk_errors, load_sealed, replace_file, save_sealed

_FORMAT = 4  # of before.pt; raise it when Evaluation changes
logger = logging.getLogger(__name__)


class Results:
    """Measures held-out chains before, during and after, and writes what came of it."""

    def __init__(
        self,
        engine: Engine,
        folder: RunFolder,
        state: TrainState,  # as the run begins or goes on, and from then on as it is
        saved: Mapping[str, Any] | None,
        rollouts: Rollouts | None = None,  # who draws held-out chains; None: this process
    ):
        self.engine, self.folder, self.state, self.rollouts = engine, folder, state, rollouts
        real = real_reference(engine)  # it may be refused, so before what takes longer
        self.before = self._before(state.initial_theta)
        self.references = {"base": Reference.base(self.before.pictures)} | ({"real": real} if real else {})
        self.likeness_before = self._likeness(self.before)
        rewards, config = engine.rewards, engine.config
        self.total = rewards.weighted_sum(self.before.measured_rows(rewards.labels))
        self.guards = Guards(
            config.guards, self.total, list(config.evaluation.judges), self.before, state.initial_theta
        )
        if saved and saved["asked"] | {"pictures": 0} == self._asked | {"pictures": 0}:  # else best is best no more
            self.guards.load_state_dict(saved["guards"])
        self.latest = self.before  # evaluation

    @property
    def stopped(self) -> bool:
        """Whether the run is to end before its time."""
        return self.guards.stopped is not None

    def state_dict(self) -> dict[str, Any]:
        return {"guards": self.guards.state_dict(), "asked": self._asked, "contents": self.folder.contents}

    def _before(self, theta: Tensor) -> Evaluation:
        """The evaluation at the start, measured once and kept for a resumed run.

        Measured again if it is damaged or of another version, if others are asked now, or more pictures are wanted.
        """
        file, asked = self.folder.samples / "before.pt", self._asked
        with suppress(Unreadable):
            kept = load_sealed(file, torch.device("cpu"))
            if (kept.pop("format", None), kept.pop("asked", None)) == (_FORMAT, asked):
                return Evaluation(**kept)
        before = self._evaluated(theta)
        with disk_errors():
            save_grid(self.folder.samples / "before", before.images)
            save_sealed(file, vars(before) | {"asked": asked, "format": _FORMAT})
        return before

    @property
    def _asked(self) -> dict[str, Any]:
        """Keys and accepted contents on which an evaluation depends and which a resumed run may change."""
        rewards, evaluation = self.engine.config.rewards, self.engine.config.evaluation
        return {
            "invalid": {label: reward.invalid for label, reward in rewards.items()},
            "judges": {
                label: one.model_dump(mode="json", exclude={"actors"}) for label, one in evaluation.judges.items()
            },
            "features": [evaluation.clip, picture_features(self.engine)[0]],
            "pictures": evaluation.pictures,
            "contents": self.folder.contents,
        }

    def measure(self) -> dict[str, float]:
        """Evaluate the state as it is; returns the columns that an update's row gets."""
        self.latest = self._evaluated(self.state.theta_to_save)
        self.guards.note(self.state.step, self.latest, self.state.theta_to_save)
        return self._columns(self.latest)

    def _evaluated(self, theta: Tensor) -> Evaluation:
        return evaluate(self.engine, theta, rollouts=self.rollouts)

    def _columns(self, after: Evaluation) -> dict[str, float]:
        """Means and standard errors: of what is maximised, and of each judge and of several rewards alone."""
        scores = held_out_scores(self.total, self.before, after)
        columns: dict[str, float] = {"diversity": after.diversity}
        columns |= {"evaluation_invalid": after.invalid} if after.invalid else {}
        measured = {"kl": after.divergence} | {f"held_out_{label}": one.after for label, one in scores.items()}
        for name, values in measured.items():
            columns[name], columns[f"{name}_se"] = mean_and_error(values)
        for reference, likeness in self._likeness(after).items():
            start = "" if reference == "base" else f"{reference}_"
            columns |= {f"{start}{name}": value for name, value in likeness.means.items()}
        return {name: value for name, value in columns.items() if not math.isnan(value)}

    def _likeness(self, evaluation: Evaluation) -> dict[str, Likeness]:
        return {name: reference.of(evaluation.pictures) for name, reference in self.references.items()}

    @disk_errors()
    def begin(self) -> None:
        """Leave what there is of the start, for pages that follow the run."""
        self._shown(self._so_far(0, self.before, []), self.before).save(self.folder.path)

    def draft(self, rows: list[dict[str, Any]]) -> None:
        """Write the report of a run that goes on, with its latest evaluation. Raises OSError."""
        summary = self._so_far(rows[-1]["step"] + 1, self.latest, rows)
        with _for_people("report", summary):
            self._report(rows, summary, self.latest)

    def finish(self, recorder: Recorder, ran_on: str) -> None:
        """Write the adapter, the pictures, the report, what loggers keep and, last of all, the summary.

        Done again, all are the same, but for the report's date.
        """
        updates, theta, rows = self.state.step, self.state.theta_to_save, recorder.rows
        after, kept = self._evaluated(theta), updates
        self.guards.note(updates, after, theta, last=True)  # of a run that was stopped too: it may have stepped back
        best, last = self.guards.best, after
        if self.engine.config.guards.keep == "best" and best.update != updates:
            theta, kept = best.theta.to(theta), best.update
            after = self._evaluated(theta) if kept else self.before
        with disk_errors():
            adapter = self.engine.model.save_adapter(theta, self.folder.path, also=self.engine.config.save_also)
            kept_and_last = {"kept_update": kept, "reward_last": mean_and_error(last.of(self.total))[0]}
            summary = self._so_far(updates, after, rows, kept_and_last) | {
                "ran_on": ran_on,
                "adapter": str(adapter.relative_to(self.folder.path)),
                "trained_numbers": len(theta),
                "theta_sha256": hashlib.sha256(theta.cpu().numpy().tobytes()).hexdigest(),
                "versions": versions(),
                "links": recorder.loggers.links,
                "pipeline": self.engine.model.described,
            }
            with _for_people("pictures", summary):
                self._save_pictures(after, rows, kept)
            with _for_people("report", summary):
                self._report(rows, summary, after)
            with _for_people("model card", summary):
                self._card(summary)
            recorder.loggers.end(summary)
            self.folder.save_summary(summary)

    def _card(self, summary: dict[str, Any]) -> None:
        from rlr_ray.loggers.card import write_card  # here: a start need not wait for the hub's library

        folder = Path(summary["adapter"]).parts[0]
        place = f"{self.engine.config.output_dir}/{self.engine.config.name}/{folder}"
        write_card(self.folder.path / folder, self.folder.samples, self.engine.config, summary, place)

    def _report(self, rows: list[dict[str, Any]], summary: dict[str, Any], after: Evaluation) -> None:
        from rlr_ray.loggers.html import write_report  # here: plotly takes a second, which no first update waits for

        shown = self._shown(summary, after)
        shown.save(self.folder.path)
        write_report(self.folder.report, self.engine.config, rows, shown)

    def _shown(self, summary: dict[str, Any], after: Evaluation) -> Shown:
        prompts = [prompt.text for prompt in self.engine.held_out(range(len(after.images)))[1]]
        scores = held_out_scores(self.total, self.before, after)
        return Shown(summary, scores, pairs_of(self.before, after, prompts))

    def _so_far(
        self,
        updates: int,
        after: Evaluation,
        rows: list[dict[str, Any]],
        known: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """The part of the summary that there is before the run has ended, and warnings of it and of what is `known`."""
        scores = held_out_scores(self.total, self.before, after)
        reward = scores["reward"]
        (mean, error), (gain, gain_se) = mean_and_error(reward.after), reward.change
        summary = {
            "name": self.engine.config.name,
            "reward_before": mean_and_error(reward.before)[0],
            "reward_after": mean,
            "reward_after_se": error,
            "gain": gain,
            "gain_se": gain_se,
            "scores": {label: one.summary for label, one in scores.items() if label != "reward"},
            "judges": list(self.engine.config.evaluation.judges),
            "kl": _known(float(after.divergence.mean())),
            "kl_by_step": after.kl_by_step,
            "steps_off": list(range(len(self.engine.sampler)))[self.engine.sampler.trained :],
            "diversity_before": _known(self.before.diversity),
            "diversity_after": _known(after.diversity),
            "likeness": summarised(self.likeness_before, self._likeness(after)),
            "compared_by": picture_features(self.engine)[0],
            "stopped": self.guards.stopped,
            "gamed": self.guards.warning,
            "invalid_before": self.before.invalid,
            "invalid_after": after.invalid,
            "best_update": self.guards.best.update,
            "changes": self.folder.changes,
            "learning_rate": self.state.rate,
            "plan": str(self.engine.shape),
            "steps": updates,
            **_over_updates(rows),
        }
        summary |= known
        return summary | {"warnings": warnings(self.engine.config, rows, summary, scores) if updates else []}

    def _save_pictures(self, after: Evaluation, rows: list[dict[str, Any]], updates: int) -> None:
        samples, before = self.folder.samples, self.before
        seeds, prompts = self.engine.held_out(range(len(after.images)))
        texts = [prompt.text for prompt in prompts]
        save_grid(samples / "after", after.images)
        titles = [f"reward {float(run.of(self.total).mean()):.3g}" for run in (before, after)]
        save_comparison(samples / "before_after", before.images, after.images, texts, *titles)
        chains = chain_rows(seeds, prompts)
        replace_file(
            samples / "chains.json", lambda file: file.write_text(json.dumps(chains, indent=2) + "\n", "utf-8")
        )
        points = held_out_points(rows, held_out_scores(self.total, before, after), updates)["reward"]
        save_reward_curve(self.folder.path / "reward_curve.png", rows, points)


@contextmanager
def _for_people(name: str, summary: dict[str, Any]) -> Iterator[None]:
    """A defect in what is only to be looked at costs no run that went well: it is logged, and a warning of the run."""
    try:
        yield
    except OSError:  # a full disk, which resuming mends
        raise
    except Exception as error:
        logger.exception(f"the {name} could not be made")
        summary["warnings"].append(f"the {name} could not be made: {type(error).__name__}: {first_line(error)}")


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _over_updates(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the updates' columns come to."""
    peaks = [row["peak_memory_gib"] for row in rows if row.get("peak_memory_gib")]
    return {
        "steps_back": sum(row.get("stepped_back") or 0 for row in rows),
        "noise_shares": _medians(rows, "noise_share"),
        "clipped": _medians(rows, "clipped"),
        "surrogate": surrogate_summary(rows),
        "denoiser_forwards": sum(row["denoiser_forwards"] for row in rows),
        "denoiser_backwards": sum(row["denoiser_backwards"] for row in rows),
        "peak_memory_gib": max(peaks, default=None),
        "seconds": sum(row["seconds"] for row in rows),
    }


def _medians(rows: list[dict[str, Any]], column: str) -> dict[str, float]:
    """Each term's median of the column `TERM_column`, over the updates that have it."""
    values = {name: [row.get(f"{name}_{column}") for row in rows] for name in TERMS}
    known = {name: [value for value in each if value is not None] for name, each in values.items()}
    return {name: statistics.median(each) for name, each in known.items() if each}
