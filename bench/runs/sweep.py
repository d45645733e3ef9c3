"""Many runs of a recipe at equal cost, each in a process of its own: the sweeps of bench/runs/sweeps.yaml.

    python -m bench.runs.sweep ablation --jobs 2      # resumable: a finished run is not run again
    python -m bench.runs.sweep length --dry-run       # what is left to run

Rows are appended to bench/results/NAME.jsonl; `python -m bench.pages` makes tables of them.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet
import yaml

from bench.common import RESULTS, ROOT, Row, append_row, options, read_rows
from rlr_ray.config.recipe import load_config

FILE = Path(__file__).with_name("sweeps.yaml")
POINTS = 8  # held-out evaluations along a run
CHOICE_SEED = 100
Job = dict[str, Any]  # variant, seed and the grid's values by the last part of their key
_SUMMARY: tuple[str, ...] = ("steps", "denoiser_forwards", "denoiser_backwards", "reward_before", "reward_after")
_SUMMARY += ("gain", "gain_se", "scores", "seconds", "versions", "kl", "warnings", "peak_memory_gib")


@dataclass(frozen=True)
class Sweep:
    """One of sweeps.yaml, which says what the fields mean."""

    name: str
    seeds: list[int]
    set: list[str]
    recipe: str = "bench/runs/digits_80.yaml"
    variants: dict[str, list[str]] = field(default_factory=lambda: {"": []})
    grid: dict[str, list[Any]] = field(default_factory=dict)
    choose: bool = False
    forwards: int = 0
    updates: int = 0
    columns: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.jsonl"

    def stages(self, variants: Sequence[str], seeds: Sequence[int]) -> Iterator[list[Job]]:
        """Jobs that may run side by side; the second stage depends on the first one's rows."""
        names = [key.rpartition(".")[2] for key in self.grid]
        points = [dict(zip(names, values, strict=True)) for values in itertools.product(*self.grid.values())]
        if not self.choose:
            yield [{"variant": name, **point, "seed": s} for s in seeds for point in points for name in variants]
            return
        yield [{"variant": name, **point, "seed": CHOICE_SEED} for name in variants for point in points]
        swept = read_rows(self.file)
        chosen = {name: {key: best(swept, name)[key] for key in names} for name in variants}
        yield [{"variant": name, **chosen[name], "seed": s} for s in seeds for name in variants]

    def overrides(self, job: Job) -> list[str]:
        point = [f"{key}={job[key.rpartition('.')[2]]}" for key in self.grid]
        return [*self.set, *self.variants[job["variant"]], *point, f"seed={job['seed']}"]

    def updates_of(self, job: Job) -> int:
        return self.updates or round(self.forwards / forwards_per_update(self.recipe, self.overrides(job)))

    def run(self, job: Job) -> Row:
        """Train; the row of the results."""
        overrides, updates = self.overrides(job), self.updates_of(job)
        overrides += [f"train.iterations={updates}", f"evaluation.every={max(updates // POINTS, 1)}"]
        summary, metrics = train(self.recipe, overrides)
        held_out = {
            row["step"] + 1: row["held_out_reward"] for row in metrics if row.get("held_out_reward") is not None
        }
        curve = {0: summary["reward_before"], **held_out, updates: summary["reward_after"]}
        rate = load_config(self.recipe, overrides).train.learning_rate
        row = {**job, "learning_rate": rate, "curve": curve}
        judge = summary["scores"].get("digits_judge")
        row |= {f"judge_{when}": judge[when] for when in ("before", "after")} if judge else {}
        row |= {name: [update.get(name) for update in metrics] for name in self.columns}
        return row | {name: summary[name] for name in _SUMMARY if name in summary}


def forwards_per_update(recipe: str, overrides: Sequence[str]) -> int:
    """Denoiser forwards, a backward as two."""
    config = load_config(str(ROOT / recipe), list(overrides))
    forwards, backwards = config.cost([config.plan_shape.draw(0, 0)])
    return forwards + 2 * backwards


def train(recipe: str, overrides: Sequence[str], checkout: Path = ROOT) -> tuple[Row, list[Row]]:
    """The summary and the updates' rows of a run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        keys = [*overrides, "name=run", f"output_dir={folder}"]
        command = [sys.executable, "-m", "rlr_ray", "train", "--config", recipe]
        command += [word for key in keys for word in ("--set", key)]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
        run = Path(folder) / "run"
        summary = json.loads((run / "summary.json").read_text("utf-8"))
        return summary, pyarrow.parquet.read_table(run / "metrics.parquet").to_pylist()


def missing(file: Path, jobs: Sequence[Job]) -> list[Job]:
    """The jobs that the file has no row of."""
    rows = read_rows(file)
    return [job for job in jobs if not any(job.items() <= row.items() for row in rows)]


def run_missing(file: Path, jobs: Sequence[Job], make: Callable[[Job], Row], at_once: int = 1) -> None:
    """Make and keep the rows of the jobs that the file lacks."""
    left = missing(file, jobs)
    count = itertools.count(len(jobs) - len(left) + 1)

    def keep(job: Job) -> None:
        row = make(job)
        append_row(file, row)
        words = ", ".join(f"{key} {value}" for key, value in job.items())
        print(f"[{next(count)}/{len(jobs)}] {words}: gain {row['gain']:.3f}, {row['seconds']:.0f} s", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(keep, left))


def best(rows: Iterable[Row], variant: str) -> Row:
    """The row of the highest gain among those by which the grid's values are chosen."""
    return max((r for r in rows if r["variant"] == variant and r["seed"] == CHOICE_SEED), key=lambda row: row["gain"])


def load_sweep(name: str) -> Sweep:
    return Sweep(name, **yaml.safe_load(FILE.read_text("utf-8"))[name])


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("name", choices=yaml.safe_load(FILE.read_text("utf-8")))
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--variants", nargs="+", help="these alone")
    parser.add_argument("--seeds", type=int, help="so many of the table's")
    parser.add_argument("--dry-run", action="store_true", help="say what is left to run")
    args = parser.parse_args()
    sweep = load_sweep(args.name)
    for jobs in sweep.stages(args.variants or list(sweep.variants), sweep.seeds[: args.seeds]):
        if not args.dry_run:
            run_missing(sweep.file, jobs, sweep.run, args.jobs)
            continue
        left = missing(sweep.file, jobs)
        print(f"{len(jobs) - len(left)} of {len(jobs)} runs are there")
        for job in left:
            print(f"left: {job}, {sweep.updates_of(job)} updates")
        if left:
            break


if __name__ == "__main__":
    main()
