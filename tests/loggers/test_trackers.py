"""Trackers by their own storage on this disk: numbers, pictures, config, and one run there for all parts of a run."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.loggers import tracker as module
from rlr_ray.loggers.mlflow import MLflow
from rlr_ray.loggers.pictures import save_grid
from rlr_ray.loggers.registry import Loggers, build_loggers
from rlr_ray.loggers.tracker import Tracker
from rlr_ray.train.engine import Engine
from rlr_ray.train.loop import train
from rlr_ray.train.run_folder import RunFolder
from tests.runs import logged, small_run

VALUES = [0.1234567, 0.2345678, 0.3456789]


def tracked(folder: Path, name: str, **options: Any) -> dict[str, Any]:
    """Two updates, an evaluation and the end; then a resumed run with one more. Returns what is kept of the id."""
    config = small_run(folder, loggers={name: options})
    (config.folder / "samples").mkdir(parents=True)
    save_grid(config.folder / "samples" / "before_after", torch.zeros(1, 3, 16, 16))
    kept = []
    for part in (range(2), range(2, 3)):
        logger = build_loggers(config)[name]
        logger.begin(config, config.folder, [{}] * part.start)
        for step in part:
            logger.update({"step": step, "reward_mean": VALUES[step], "plan": "x"})
        videos = () if part.start == 0 else (2,)
        logger.evaluation(part[-1], torch.rand(2, *videos, 3, 16, 16))
        logger.end({"steps": part[-1] + 1, "gain": 0.5})
        kept.append(json.loads((config.folder / "trackers" / f"{name}.json").read_text()))
    assert kept[0]["id"] == kept[1]["id"] and kept[1]["link"] == logger.link
    assert [file.name for file in (config.folder / "trackers").iterdir()] == [f"{name}.json"]  # no pictures stay
    return kept[1]


def suffixes(folder: Path, pattern: str) -> list[str]:
    return sorted(file.suffix for file in folder.rglob(pattern) if not file.parent.is_symlink())


def test_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="rlr-ray[wandb] is not installed")
    kept = tracked(tmp_path, "wandb", mode="offline")
    folders = sorted((tmp_path / "short" / "wandb").glob(f"offline-run-*-{kept['id']}"))
    first, second = (next(folder.glob("*.wandb")) for folder in folders)
    deadline = time.monotonic() + 20  # a process of wandb's own writes, also after `finish`
    while str(VALUES[2]).encode() not in second.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.02)
    parts = first.read_bytes(), second.read_bytes()
    assert [str(value).encode() in parts[0] for value in VALUES] == [True, True, False]
    assert [str(value).encode() in parts[1] for value in VALUES] == [False, False, True]
    assert b"learning_rate" in parts[0]
    assert suffixes(tmp_path / "short" / "wandb", "media/*/held_out*") == [".gif", ".png"]
    assert kept["link"] == str(folders[1])


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="rlr-ray[mlflow] is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = str(tmp_path / "mlruns")
    kept = tracked(tmp_path, "mlflow", tracking_uri=uri)
    client = mlflow.MlflowClient(uri)
    points = [(point.step, point.value) for point in client.get_metric_history(kept["id"], "reward_mean")]
    assert points == list(enumerate(VALUES)) and kept["link"] == uri
    monkeypatch.setattr(mlflow, "MlflowClient", lambda uri: MagicMock(tracking_uri=uri))
    for uri in ("https://me:secret@host/mlflow", "postgresql://me:s@cret@host/mlflow"):
        logger = MLflow(tracking_uri=uri)
        logger.start(small_run(tmp_path), "7")
        assert "host/mlflow" in str(logger.link) and "cret" not in str(logger.link)
    assert client.get_run(kept["id"]).info.status == "FINISHED"
    artifacts = {file.path for place in (None, "held_out") for file in client.list_artifacts(kept["id"], place)}
    assert {"config.yaml", "summary.json", "held_out/held_out_000002.png", "held_out/held_out_000003.gif"} <= artifacts


def test_swanlab(tmp_path: Path) -> None:
    pytest.importorskip("swanlab", reason="SwanLab 0.10 needs a protobuf below 7; constraints.txt has a newer one")
    kept = tracked(tmp_path, "swanlab", mode="offline")
    folders = sorted((tmp_path / "short" / "swanlab").glob(f"run-*-{kept['id']}"))
    parts = [next(folder.glob("*.swanlab")).read_bytes() for folder in folders]
    binary = [struct.pack("<d", value) for value in VALUES]
    assert [[value in part for value in binary] for part in parts] == [[True, True, False], [False, False, True]]
    assert "learning_rate" in (folders[0] / "files" / "config.yaml").read_text("utf-8")
    assert suffixes(tmp_path / "short" / "swanlab", "media/*/*") == [".gif", ".png", ".png", ".png"]


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="Trackio 0.43 needs a Pillow below 13; constraints.txt has a newer one")
    from trackio.sqlite_storage import SQLiteStorage

    kept = tracked(tmp_path, "trackio", project="p")
    logs = SQLiteStorage.get_logs("p", kept["id"])
    assert [log["reward_mean"] for log in logs if "reward_mean" in log] == VALUES
    assert suffixes(tmp_path / "trackio" / "media", "*.*") == [".gif", ".png", ".png", ".png"]


class Noted(Tracker):
    """A user's own, which keeps what it is told."""

    told: list[Any] = []  # noqa: RUF012
    hangs: threading.Event | None = None

    def start(self, config: RunConfig, id: str | None) -> str:
        self.told.append(("start", id))
        self.link = "http://here/7"
        return "7"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self.hangs is not None:
            self.hangs.wait()
        self.told.append(("scalars", step, "held_out_reward" in values))
        if step == 1:
            raise ConnectionError("no route\nto host")

    def picture(self, step: int, name: str, file: Path) -> None:
        self.told.append(("picture", step, name))
        assert file.stat().st_size > 0

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.told.append(("finish", summary["links"]))


def test_a_run_is_tracked_and_goes_on_in_the_same_place(tmp_path: Path) -> None:
    name, Noted.told = f"{__name__}:Noted", []
    links = {name: "http://here/7"}
    for updates in (3, 4):
        config = small_run(tmp_path, loggers=[name], train={"iterations": updates}, evaluation={"every": 2})
        folder = RunFolder(config)
        folder.begin(resume=updates == 4)
        with logged() as said:
            train(Engine(config), None, lambda row: None)
        assert folder.load_summary()["links"] == links
        folder.check(resume=False, overwrite=True)  # all that lies there is known to be the run's
        assert said.count(f"logger {name}: ConnectionError: no route; the run goes on") == (updates == 3)
    assert Noted.told == [
        ("start", None),
        ("scalars", 0, False),
        ("picture", 1, "held_out"),
        ("scalars", 1, True),
        ("scalars", 2, False),
        ("picture", 2, "before_after"),
        ("finish", links),
        ("start", "7"),
        ("scalars", 3, False),
        ("picture", 3, "before_after"),
        ("finish", links),
    ]


def test_a_server_that_hangs_holds_up_no_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_run(tmp_path, loggers=[f"{__name__}:Noted"])
    config.folder.mkdir()
    monkeypatch.setattr(Noted, "hangs", threading.Event())
    with logged() as said:
        loggers = Loggers(config, [])
        monkeypatch.setattr(module, "PATIENCE_S", 0.05)
        for step in range(100):
            loggers.update({"step": step})
        loggers.end({"steps": 100, "links": {}})
    assert len(said) == 1 and "Noted: TimeoutError: no answer in 0.05 s; what it was not told is in" in said[0]
    assert Noted.hangs is not None
    Noted.hangs.set()


def test_a_package_that_ends_its_process_ends_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quits(*arguments: Any) -> str:
        raise SystemExit("log in first")

    config = small_run(tmp_path, loggers=[f"{__name__}:Noted"])
    config.folder.mkdir()
    with logged() as said:
        monkeypatch.setattr(Noted, "picture", quits)
        loggers = Loggers(config, [])
        loggers.evaluation(0, torch.zeros(1, 3, 8, 8))
        loggers.end({"steps": 1, "links": {}})
        assert [file.name for file in (config.folder / "trackers").iterdir()] == ["noted.json"]
        monkeypatch.setattr(Noted, "start", quits)
        assert not Loggers(config, []).begun
    assert [text.partition("Noted: ")[2] for text in said] == [
        "RuntimeError: it gave up: log in first; the run goes on"
    ] * 2


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab", "trackio"])
def test_a_tracker_without_its_package_is_refused_with_the_extra(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"loggers has {name}, .* pip install 'rlr-ray\[{name}\]'"):
        build_loggers(small_run(tmp_path, loggers=[name]))
