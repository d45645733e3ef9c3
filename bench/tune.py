"""The reward at equal cost over the sub-chain's length and over the perturbation scale: `python bench/tune.py`.

Two searches of `rlr-ray tune` that try every point with five seeds; an interrupted one goes on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
from page import RESULTS  # beside this file

from rlr_ray.cli import main
from rlr_ray.config.tune import load_tune_config

SEARCHES = Path(__file__).resolve().parent / "searches"
KEPT = ("budget_gib", "status", "gain", "gain_se", "updates", "cost", "peak_gib", "predicted_gib", "seconds")


def searched(name: str) -> list[dict[str, Any]]:
    """The rows of a search's results."""
    file = str(SEARCHES / f"{name}.yaml")
    config = load_tune_config(file, [])
    begun = ["--resume"] if (config.folder / "tune.yaml").is_file() else []
    if main(["tune", "--config", file, *begun]):
        raise SystemExit(f"the search {name} did not end well")
    rows = pyarrow.parquet.read_table(config.folder / "results.parquet").to_pylist()
    return [{key: row[key] for key in (*config.space, *KEPT)} for row in rows if row["status"] == "finished"]


def measure() -> None:
    lengths, scales = searched("length"), searched("scale")
    config = load_tune_config(str(SEARCHES / "length.yaml"), [])
    rule = json.loads((config.folder / "closed_form.json").read_text())
    found = {"lengths": lengths, "scales": scales, "closed_form": rule}
    (RESULTS / "tune.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    measure()
