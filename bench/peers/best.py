"""Peers at their best on the embedded digits: each swept over rates and chains an update, the best run on five seeds.

    python -m bench.peers.best                              # resumable: a finished run is not run again
    python -m venv ENV && ENV/bin/pip install -r bench/peers/requirements.txt
    python -m bench.peers.best --python ENV/bin/python      # with TRL's trainers, in an environment of their own
    python -m bench.peers.best --problems mixture           # the best two of methods.py on another problem
    python -m bench.peers.best --dry-run                    # what is left to run

All train the same adapter from the same values on the same prompts and reward (methods.py, trl_trainers.py). Cost in
denoiser forwards, a backward as two. The sweep: rates .01, .03 and .1 for 24,000 forwards on a seed of its own, and
further ones, a factor of about 3 apart, while the best lies at the edge. The best rate and chains then run on the
table's seeds for 72,000, the best two peers three times as long. Every point is judged on 400 held-out chains, those of
`rlr-ray train` with the seed. Rows: bench/results/peers_best.jsonl.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy
import torch
from torch import Tensor

from bench.common import RESULTS, Row, append_row, options, read_rows
from bench.peers.lockstep import Lockstep, base_of, judge
from bench.peers.methods import awm, diffusion_nft, flow_grpo, flow_grpo_window, lasro
from bench.peers.trl import TRAINERS, Trl, spec_of
from bench.problems.problem import problems
from bench.runs.sweep import CHOICE_SEED, Job, missing
from rlr_ray.errors import UserError

FILE = RESULTS / "peers_best.jsonl"
SWEPT, TABLE, LONG = 24_000, 72_000, 216_000  # forwards of a run
LADDER = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # rates; the sweep begins with those in the middle
POINTS = {
    SWEPT: (8_000, 12_000, 24_000),
    TABLE: (2_000, 4_000, 6_000, 8_000, 10_000, 12_000, 16_000, 24_000, 36_000, 48_000, 72_000),
}
POINTS[LONG] = (*POINTS[TABLE], 108_000, 144_000, 216_000)
METHODS: dict[str, Callable[..., Iterator[Tensor]]] = {
    "AWM": awm,
    "AWM, weights of its code": functools.partial(awm, robust=True, kl=0.003, pull=1.0),
    "Flow-GRPO": flow_grpo,
    "Flow-GRPO, window": flow_grpo_window,
    "DiffusionNFT": diffusion_nft,
    "DiffusionNFT, 3 steps": functools.partial(diffusion_nft, draws=3),
    "LaSRO-like": lasro,
}
CHAINS = dict.fromkeys(TRAINERS, (10, 20, 40, 80)) | dict.fromkeys(METHODS, (10, 20, 80))
FIRST = (20, 80, 10, 40)  # in what order they are swept


def swept(variant: str, rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["variant"] == variant and row["seed"] == CHOICE_SEED]


def best(variant: str, rows: Iterable[Row]) -> Row:
    """Of the sweep's rows the one of the highest gain at its end."""
    return max(swept(variant, rows), key=lambda row: row["points"][-1][1])


def rates(variant: str, chains: int, rows: Iterable[Row]) -> list[float]:
    """To be swept, as far as is known: a best one at the edge asks for the next."""
    gains = {row["learning_rate"]: row["points"][-1][1] for row in swept(variant, rows) if row["chains"] == chains}
    wanted = sorted({0.01, 0.03, 0.1} | set(gains))
    if set(wanted) == set(gains):
        top, low, high = LADDER.index(max(gains, key=gains.__getitem__)), *map(LADDER.index, (wanted[0], wanted[-1]))
        wanted += [LADDER[at] for at in (top - 1, top + 1) if not low <= at <= high and 0 <= at < len(LADDER)]
    return wanted


def sweep_jobs(variants: Sequence[str], rows: Sequence[Row]) -> list[Job]:
    fixed = {"problem": "digits", "seed": CHOICE_SEED, "forwards": SWEPT}
    return [
        fixed | {"variant": name, "chains": chains, "learning_rate": rate}
        for chains in FIRST
        for name in variants
        if chains in CHAINS[name]
        for rate in rates(name, chains, rows)
    ]


def table_jobs(
    variants: Sequence[str], rows: Sequence[Row], forwards: int = TABLE, problem: str = "digits", seeds: int = 5
) -> list[Job]:
    """Of the best rate and chains of each."""
    keys = ("variant", "chains", "learning_rate")
    chosen = [{key: best(name, rows)[key] for key in keys} for name in variants]
    return [{"problem": problem, **one, "seed": seed, "forwards": forwards} for one in chosen for seed in range(seeds)]


def best_two(rows: Sequence[Row], among: Collection[str]) -> list[str]:
    """The variants of the highest mean gain at the table's cost."""
    gains: dict[str, list[float]] = {}
    for row in rows:
        if row["forwards"] == TABLE and row["variant"] in among:
            gains.setdefault(row["variant"], []).append(row["points"][-1][1])
    return sorted(gains, key=lambda name: -sum(gains[name]) / len(gains[name]))[:2]


def batches(jobs: Iterable[Job]) -> list[list[Job]]:
    """Jobs that run in lockstep: those of a method that differ in rate and seed alone. TRL's run one by one."""
    groups: dict[Any, list[Job]] = {}
    for job in jobs:
        alike = (job["problem"], job["variant"], job["chains"], job["forwards"])
        alone = (job["learning_rate"], job["seed"]) if job["variant"] in TRAINERS else ()
        groups.setdefault((*alike, *alone), []).append(job)
    return list(groups.values())


def make(jobs: list[Job], python: str | None) -> list[Row]:
    """Rows of jobs in lockstep."""
    job, problem = jobs[0], jobs[0]["problem"]
    points = [round(cost * problems()[problem].cost / SWEPT) for cost in POINTS[job["forwards"]]]
    told, more = told_by_trl(job, points, python) if job["variant"] in TRAINERS else told_here(jobs, points)
    rows = []
    for run, job in enumerate(jobs):
        base = base_of(job["seed"], problem)
        judged = [judge(theta[run], job["seed"], problem) for _, theta in told]
        curve = [(cost, one.score - base.score) for (cost, _), one in zip(told, judged, strict=True)]
        row = job | {"points": curve, "judge_before": base.judge, "judge": judged[-1].judge}
        row |= judged[-1].against(base) | more
        rows.append(row if job["forwards"] == SWEPT else row | {"theta": packed(told[-1][1][run])})
    return rows


Told = tuple[list[tuple[int, Tensor]], Row]  # cost and theta [R, P] at each point; what else there is to tell


def told_by_trl(job: Job, points: list[int], python: str | None) -> Told:
    if python is None or job["problem"] != "digits":
        raise UserError(f"{job} needs --python, and TRL's trainers run on the digits alone")
    spec = spec_of(TRAINERS[job["variant"]], job["chains"], job["learning_rate"], job["seed"], points)
    results = trl(python).ask(spec)
    told = [(point["cost"], point["theta"][None]) for point in results["points"]]
    return told, {name: results[name] for name in ("reward_calls", "difference", "versions")}


def told_here(jobs: list[Job], points: list[int]) -> Told:
    task = Lockstep([job["seed"] for job in jobs], jobs[0]["chains"], jobs[0]["problem"])
    told = trace(task, METHODS[jobs[0]["variant"]](task, [job["learning_rate"] for job in jobs]), points)
    return told, {"reward_calls": task.calls}


def trace(task: Lockstep, updates: Iterator[Tensor], points: Sequence[int]) -> list[tuple[int, Tensor]]:
    """What a method would keep at the first update past each point of cost."""
    told, left = [], list(points)
    while left:
        theta = next(updates)
        if task.cost >= left[0]:
            told.append((task.cost, theta.clone()))
            left = [point for point in left if point > task.cost]
    return told


def packed(theta: Tensor) -> str:
    """Theta [P] as base64 of little-endian float32, so that a later measure needs no run."""
    return base64.b64encode(theta.numpy().astype("<f4").tobytes()).decode()


def unpacked(text: str) -> Tensor:
    return torch.from_numpy(numpy.frombuffer(base64.b64decode(text), "<f4").copy())


@functools.lru_cache(maxsize=1)
def trl(python: str) -> Trl:
    return Trl(python)


def run(jobs: Sequence[Job], python: str | None, at_once: int) -> None:
    """Make and keep the rows that the file lacks."""
    todo = batches(missing(FILE, jobs))
    work = functools.partial(make, python=python)
    if at_once == 1:
        keep(map(work, todo))
    else:
        with ProcessPoolExecutor(at_once, mp_context=get_context("spawn")) as pool:
            keep(pool.map(work, todo))


def keep(results: Iterable[list[Row]]) -> None:
    for rows in results:
        for row in rows:
            append_row(FILE, row)
            cost, gain = row["points"][-1]
            words = f"{row['variant']}, {row['chains']} chains, rate {row['learning_rate']:g}, seed {row['seed']}"
            print(f"{words}: gain {gain:.2f} at {cost:,}, judge {row['judge']:.2f}, KL {row['kl']:.0f}", flush=True)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--python", help="of the environment of bench/peers/requirements.txt; without it none of TRL's")
    parser.add_argument("--variants", nargs="+", choices=list(CHAINS), help="these alone")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once, one thread each")
    parser.add_argument("--dry-run", action="store_true", help="say what is left to run")
    parser.add_argument(
        "--problems", nargs="+", choices=list(problems()), help="other ones, ten seeds at the sweep's cost"
    )
    args = parser.parse_args()
    names = args.variants or [name for name in CHAINS if args.python or name not in TRAINERS]
    for stage in others(args.problems) if args.problems else stages(names):
        while left := missing(FILE, stage(read_rows(FILE))):
            if args.dry_run:
                print(*(f"left: {job}" for job in left), sep="\n")
                return
            run(left, args.python, args.jobs)


Stage = Callable[[list[Row]], list[Job]]  # of the rows that there are


def stages(variants: Sequence[str]) -> list[Stage]:
    return [
        functools.partial(sweep_jobs, variants),
        functools.partial(table_jobs, variants),
        lambda rows: table_jobs([name for name in best_two(rows, CHAINS) if name in variants], rows, LONG),
    ]


def others(names: Sequence[str]) -> list[Stage]:
    return [lambda rows, name=name: table_jobs(best_two(rows, METHODS), rows, SWEPT, name, 10) for name in names]  # type: ignore[misc]


if __name__ == "__main__":
    main()
