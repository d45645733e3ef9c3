"""What a search leaves: a row for every point, and for each budget a recipe that `train` takes as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from torch.utils.tensorboard import SummaryWriter

from rlr_ray.config.tune import TuneConfig, base_values
from rlr_ray.tune.trial import over_budget, run_of
from rlr_ray.utils.files import replace_file

Row = dict[str, Any]
_FACTS = ("reward", "reward_se", "gain", "gain_se", "judge_after", "updates", "cost", "evaluation", "theta_sha256")


def row_of(config: TuneConfig, budget_gib: float, launch: dict[str, Any], result: Any) -> Row:
    """A trial with what it was given at its launch. `result` is Ray Tune's."""
    metrics, run = result.metrics or {}, run_of(launch)
    over = over_budget(run)
    status, why = "finished", ""
    if over is not None:
        status, why = "over budget", over["words"]
    elif result.error is not None or "reward" not in metrics:
        status, why = "failed", (str(result.error).strip() or type(result.error).__name__).splitlines()[-1]
    elif metrics["evaluation"] < config.evaluations:
        status = "stopped early"
    return {
        "trial": run.name,
        "budget_gib": budget_gib,
        "status": status,
        "feasible": over is None,
        "point": launch["point"],
        **{name: metrics.get(name) for name in _FACTS},
        "peak_gib": over["peak_gib"] if over else metrics.get("peak_gib"),
        "predicted_gib": launch["predicted_gib"],
        "seconds": metrics.get("time_total_s"),
        "why": why,
        "run": run.model_dump(mode="json"),
    }


def filtered_row(budget_gib: float, left_out: dict[str, Any]) -> Row:
    """A point that was not launched."""
    row = {"trial": None, "budget_gib": budget_gib, "status": "filtered", "feasible": False, "point": left_out["point"]}
    none = dict.fromkeys((*_FACTS, "peak_gib", "seconds", "run"))
    return row | none | {"predicted_gib": left_out["predicted_gib"], "why": left_out["why"]}


def best_rows(config: TuneConfig, rows: Sequence[Row]) -> dict[float, Row]:
    """For each budget the finished trial of highest reward that fits, also if it was another budget's."""
    best = {}
    for budget in config.budgets_gib:
        fits = [row for row in rows if row["status"] == "finished" and row["peak_gib"] <= budget]
        if fits:
            best[budget] = max(fits, key=lambda row: row["reward"])
    return best


def write_results(config: TuneConfig, rows: Sequence[Row]) -> list[Path]:
    """results.parquet, best.<budget>.yaml and TensorBoard's hparams. Returns the recipes."""
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    table = pyarrow.table({name: _column([row.get(name) for row in flat]) for name in names})
    replace_file(config.folder / "results.parquet", lambda part: pyarrow.parquet.write_table(table, part))
    _write_hparams(config.folder / "tensorboard", rows)
    return [_write_best(config, budget, row) for budget, row in best_rows(config, rows).items()]


def _flat(row: Row) -> Row:
    rest = {name: value for name, value in row.items() if name not in ("point", "run")}
    return {**rest, **{key: plain(value) for key, value in row["point"].items()}}


def _column(cells: Sequence[Any]) -> Sequence[Any]:
    """Numbers, or truths; else texts, also where a key's choices are of several kinds."""
    kinds = {type(cell) for cell in cells if cell is not None}
    if len(kinds) <= 1 or kinds == {int, float}:
        return cells
    return [None if cell is None else str(cell) for cell in cells]


def plain(value: Any) -> Any:
    """A point's value as one cell: a number or a text."""
    return value if isinstance(value, int | float | str) else json.dumps(value)


def _write_best(config: TuneConfig, budget: float, row: Row) -> Path:
    path = config.folder / f"best.{budget:g}.yaml"
    place = {"name": f"{config.name}-best-{budget:g}", "output_dir": base_values(config).get("output_dir", "runs")}
    command = f"rlr-ray train --config {path.name}"
    head = (
        f"# Trial {row['trial']} of the search {config.name}: reward {row['reward']:.4g} ± {row['reward_se']:.2g}\n"
        f"# after {row['updates']} updates, peak {row['peak_gib']:.4g} GiB. Run it: {command}\n"
    )
    text = head + yaml.safe_dump(row["run"] | place | {"memory_budget_gib": budget}, sort_keys=False)
    replace_file(path, lambda part: part.write_text(text, "utf-8"))
    return path


def _write_hparams(folder: Path, rows: Sequence[Row]) -> None:
    """One session a trial, for TensorBoard's HParams view."""
    shutil.rmtree(folder, ignore_errors=True)  # of this search before it went on: its sessions would be there twice
    with SummaryWriter(str(folder)) as writer:
        for row in rows:
            if row["reward"] is not None:
                values = {key: plain(value) for key, value in row["point"].items()}
                metrics = {name: row[name] for name in ("reward", "reward_se", "peak_gib") if row[name] is not None}
                writer.add_hparams(values | {"budget_gib": row["budget_gib"]}, metrics, run_name=row["trial"])
