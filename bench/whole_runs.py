"""What benches of whole runs share: one of the embedded model in its own process, and going on where a bench ended."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet

from rlr_ray.config.recipe import load_config

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
POINTS = 8  # held-out evaluations along a run
SWEEP_SEED = 100
Job = tuple[str, float, int]  # variant, learning rate, seed
_KEPT = ("steps", "denoiser_forwards", "denoiser_backwards", "reward_before", "reward_after", "gain", "gain_se")
_KEPT += ("scores", "seconds", "versions")


def cost_per_update(overrides: Sequence[str]) -> int:
    """Denoiser forwards, a backward as two."""
    config = load_config(str(ROOT / "configs" / "digits.yaml"), list(overrides))
    forwards, backwards = config.cost([config.plan_shape.draw(0, 0)])
    return forwards + 2 * backwards


def run(
    job: Job, updates: int, overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Its row for the results, its summary, and its updates' rows."""
    variant, rate, seed = job
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"seed={seed}", f"train.iterations={updates}", f"train.learning_rate={rate}", f"output_dir={folder}"]
        keys += [f"evaluation.every={max(updates // POINTS, 1)}", *overrides]
        command = [sys.executable, "-m", "rlr_ray", "train", "--config", "configs/digits.yaml"]
        command += [word for key in keys for word in ("--set", key)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((Path(folder) / "digits" / "summary.json").read_text())
        rows = pyarrow.parquet.read_table(Path(folder) / "digits" / "metrics.parquet").to_pylist()
    held_out = {row["step"] + 1: row["held_out_reward"] for row in rows if row.get("held_out_reward") is not None}
    curve = {0: summary["reward_before"], **held_out, updates: summary["reward_after"]}
    row = {"variant": variant, "learning_rate": rate, "seed": seed, "curve": curve}
    judge = summary["scores"]["digits_judge"]
    row |= {"judge_before": judge["before"], "judge_after": judge["after"]}
    return row | {name: summary[name] for name in _KEPT}, summary, rows


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run_missing(file: Path, jobs: Sequence[Job], make: Callable[[Job], dict[str, Any]], at_once: int) -> None:
    """Make and keep the rows of the jobs that the file lacks."""

    def keep(job: Job) -> None:
        row = make(job)
        with file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"{job}: gain {row['gain']:.3f}, judge {row['judge_after']:.3f}, {row['seconds']:.0f} s", flush=True)

    file.parent.mkdir(parents=True, exist_ok=True)
    seen = {(row["variant"], row["learning_rate"], row["seed"]) for row in read(file)}
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(keep, [job for job in jobs if job not in seen]))


def best_rate(rows: Iterable[dict[str, Any]], variant: str) -> float:
    """The learning rate of the highest gain in the sweep."""
    swept = [row for row in rows if row["variant"] == variant and row["seed"] == SWEEP_SEED]
    return max(swept, key=lambda row: row["gain"])["learning_rate"]
