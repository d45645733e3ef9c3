"""What the defaults reach on problems that they were not tuned on: the sets of bench/runs/learning.yaml.

    python -m bench.runs.learning digits --jobs 2     # resumable: a run that has a row is not run again
    python -m bench.runs.learning defaults --seeds 2 --dry-run

Rows are appended to bench/results/learning.jsonl, pictures lie in build/learning. Cost is in denoiser forwards, a
backward as two; evaluations cost nothing here. `python -m bench.pages` makes tables of the rows.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml

from bench.common import RESULTS, ROOT, Row, append_row, options, read_rows, revision
from bench.problems.problem import Problem, problems
from rlr_ray.config.recipe import resolve
from rlr_ray.config.run import RunConfig
from rlr_ray.utils.environment import prepare_process

FILE = Path(__file__).with_suffix(".yaml")
ROWS = RESULTS / "learning.jsonl"
TRUSTED = "surrogate_trusted"  # and the reward's label, if there are several: columns of an update's row
PICTURES = ROOT / "build" / "learning"
STANDARD = 24_000  # forwards, of which a problem's `cost` stands in the place
POINTS = {24_000: 6, 72_000: 9, 216_000: 9}  # evaluations along a run, so that 4k, 8k, 12k, 24k and 72k are among them
ENOUGH = 0.93  # of the cost: a run that was cheaper, since it seldom or never trusted a surrogate, is made longer
ATTEMPTS = 3  # at most: a longer run may trust at other times, and cost less
Job = dict[str, Any]  # problem, variant, forwards, seed, rate, chains
_SUMMARY: tuple[str, ...] = (
    "steps",
    "kl",
    "kl_by_step",
    "steps_off",
    "steps_back",
    "stopped",
    "best_update",
    "gain_se",
)
_SUMMARY += ("kept_update", "seconds", "warnings", "reward_before", "reward_after")


def jobs_of(name: str, seeds: int | None = None) -> list[Job]:
    """All runs of a set, first those of the first seed."""
    table = load()["sets"][name]
    rates = [None, *table.get("rates", ())]
    settings = [(rate, None) for rate in rates] + [(None, chains) for chains in table.get("chains", ())]
    ways = {variant: load()["variants"][variant]["way"] for variant in table["variants"]}
    axes = (range(table["seeds"])[:seeds], table["forwards"], table.get("problems", problems()), ways, settings)
    return [
        {"problem": problem, "variant": variant, "forwards": forwards, "seed": seed, "rate": rate, "chains": chains}
        for seed, forwards, problem, variant, (rate, chains) in itertools.product(*axes)
        if ways[variant] in problems()[problem].ways
    ]


def load() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text("utf-8"))


def config_of(job: Job, updates: int, every: int, folder: str) -> RunConfig:
    variant = load()["variants"][job["variant"]]
    chosen = {"train.learning_rate": job["rate"], "train.chains": job["chains"]}
    keys = [f"{key}={value}" for key, value in chosen.items() if value is not None]
    if job["chains"] is not None:
        keys += [f"train.chunk_size={min(job['chains'], 10)}"]
    keys += [f"seed={job['seed']}", f"train.iterations={updates}", f"evaluation.every={every}", f"output_dir={folder}"]
    return problem_of(job).config(variant["way"], [*variant.get("set", ()), *keys])


def problem_of(job: Job) -> Problem:
    return problems()[job["problem"]]


def settled(job: Job) -> RunConfig:
    """A job's recipe with the plan that follows from what its rewards say of themselves."""
    return resolve(config_of(job, 1, 1, "unused"))


def forwards_per_update(job: Job) -> int:
    """By the recipe's plan, as it is before anything is learned."""
    config = settled(job)
    forwards, backwards = config.cost([config.plan_shape.draw(0, 0)])
    return forwards + 2 * backwards


def expected(job: Job) -> float:
    """Forwards an update, over a run: as others of its kind had, else as if a surrogate were always trusted."""
    alike = ("problem", "variant", "chains")
    rows = [row for row in read_rows(ROWS) if all(row[key] == job[key] for key in alike)]
    if rows:
        return sum(row["spent"] for row in rows) / sum(row["steps"] for row in rows)
    config = settled(job)
    dear = 3 * config.sampler.steps * config.train.chains if config.estimator.surrogate else 0
    return max(forwards_per_update(job), dear)


def run(job: Job) -> Row:
    """Train until the cost is spent; the row of the results."""
    budget, started = job["forwards"] * problem_of(job).cost / STANDARD, time.monotonic()
    updates = max(round(budget / expected(job)), 2)
    for _ in range(ATTEMPTS):
        summary, metrics = train(job, updates)
        spent = costs(metrics)[-1]
        if ENOUGH * budget <= spent <= budget / ENOUGH or len(metrics) < updates:  # or it was stopped
            break
        updates = round(updates * budget / spent)
    return row_of(job, summary, metrics) | {"wall_seconds": time.monotonic() - started, "revision": revision()}


def train(job: Job, updates: int) -> tuple[Row, list[Row]]:
    """The summary and the updates' rows of a run in this process."""
    import pyarrow.parquet  # here and below, so that --dry-run and the pages need none of it

    from rlr_ray.cluster.run import run_recipe

    with tempfile.TemporaryDirectory() as folder:
        every = max(round(updates / POINTS[job["forwards"]]), 1)
        config = config_of(job, updates, every, folder)
        summary = run_recipe(config)
        if job["seed"] == 0:
            keep_picture(job, config.folder)
        return summary, pyarrow.parquet.read_table(config.folder / "metrics.parquet").to_pylist()


def keep_picture(job: Job, folder: Path) -> None:
    """Before and after, of a seed that somebody looks at."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    words = "-".join(str(value).replace(" ", "_") for value in job.values() if value is not None)
    for picture in (folder / "samples").glob("before_after.*"):
        shutil.copy(picture, PICTURES / f"{words}{picture.suffix}")


def costs(metrics: Sequence[Row]) -> list[int]:
    """Denoiser forwards up to the end of every update, a backward as two."""
    return list(itertools.accumulate(row["denoiser_forwards"] + 2 * row["denoiser_backwards"] for row in metrics))


def row_of(job: Job, summary: Row, metrics: Sequence[Row]) -> Row:
    problem = problem_of(job)
    spent, before = costs(metrics), start(summary, problem.score)
    points = []
    for row, cost in zip(metrics, spent, strict=True):
        if row.get("held_out_reward") is not None:
            points.append([cost, row[f"held_out_{problem.score}"] - before, row.get(f"held_out_{problem.judge}")])
    judge = summary["scores"][problem.judge]
    gain = end(summary, problem.score) - before
    points.append([spent[-1], gain, judge["after"]])
    told = {name: summary[name] for name in _SUMMARY if name in summary}
    return {
        **job,
        **told,
        "spent": spent[-1],
        "learning_rate": max((row.get("learning_rate") or 0 for row in metrics), default=0),
        "before": before,
        "gain": gain,
        "judge_before": judge["before"],
        "judge": judge["after"],
        "points": points,
        "to_gain_1": cost_of(points, 1.0),
        "lowest": min(point[1] for point in points),
        "reward_calls": reward_calls(job) * len(metrics),
        "trusted": share(value for row in metrics for name, value in row.items() if name.startswith(TRUSTED)),
        **{name: values["after"] for name, values in summary.get("likeness", {}).get("base", {}).items()},
    }


def start(summary: Row, score: str) -> float:
    return summary["reward_before"] if score == "reward" else summary["scores"][score]["before"]


def end(summary: Row, score: str) -> float:
    return summary["reward_after"] if score == "reward" else summary["scores"][score]["after"]


def cost_of(points: Sequence[Sequence[float]], gain: float) -> float | None:
    """Forwards at which a gain is first reached, by straight lines between the points from 0; None: it is not."""
    for (cost, before, *_), (later, after, *_) in itertools.pairwise([[0, 0.0], *points]):
        if after >= gain:
            return cost + (later - cost) * (gain - before) / (after - before)
    return None


def reward_calls(job: Job) -> int:
    """Pictures scored an update, by the recipe's plan."""
    config = settled(job)
    pairs = config.estimator.zeroth_order.count if config.plan_shape.has_zeroth_order else 0
    return config.train.chains + 2 * pairs


def share(values: Iterator[Any]) -> float | None:
    measured = [float(value) for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


def missing(jobs: Sequence[Job]) -> list[Job]:
    rows = read_rows(ROWS)
    return [job for job in jobs if not any(job.items() <= row.items() for row in rows)]


def run_missing(jobs: Sequence[Job], at_once: int) -> None:
    """Each process runs many: a start takes ten seconds."""
    context = multiprocessing.get_context("spawn")
    left = missing(jobs)
    with ProcessPoolExecutor(at_once, context, initializer=prepare_process, initargs=(1,)) as pool:
        running = {pool.submit(run, job): job for job in left}
        for number, future in enumerate(as_completed(running), 1):
            words = ", ".join(f"{key} {value}" for key, value in running[future].items() if value is not None)
            try:
                row = future.result()
            except Exception as error:  # of one run: the others go on, and it is asked for again next time
                print(f"[{number}/{len(left)}] {words}: {type(error).__name__}: {error}", flush=True)
                continue
            append_row(ROWS, row)
            result = f"gain {row['gain']:.2f}, judge {row['judge']:.2f}, KL {row['kl']}, {row['spent']:,} forwards"
            print(f"[{number}/{len(left)}] {words}: {result}, {row['wall_seconds']:.0f} s", flush=True)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("name", choices=load()["sets"], help="of learning.yaml's sets")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    parser.add_argument("--seeds", type=int, help="so many of the set's")
    parser.add_argument("--problems", nargs="+", help="these alone, in this order")
    parser.add_argument("--variants", nargs="+", help="these alone")
    parser.add_argument("--forwards", nargs="+", type=int, help="these costs alone")
    parser.add_argument("--dry-run", action="store_true", help="say what is left to run")
    args = parser.parse_args()
    chosen = {"problem": args.problems, "variant": args.variants, "forwards": args.forwards}
    jobs = jobs_of(args.name, args.seeds)
    jobs = [job for job in jobs if all(values is None or job[key] in values for key, values in chosen.items())]
    if args.problems:
        jobs.sort(key=lambda job: (job["seed"], args.problems.index(job["problem"])))
    if not args.dry_run:
        from bench.problems.build import build_missing

        build_missing()
        run_missing(jobs, args.jobs)
        return
    left = missing(jobs)
    print(f"{len(jobs) - len(left)} of {len(jobs)} runs are there")
    for job in left:
        print("left:", json.dumps(job), f"{forwards_per_update(job)} forwards an update at first")


if __name__ == "__main__":
    main()
