"""Rows on disk and in loggers: cut off where a checkpoint ends, whole after a kill, and no logger ends a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.compat.proto.event_pb2 import SessionLog
from torch import Tensor

from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError, first_line
from rlr_ray.loggers.jsonl import Journal
from rlr_ray.loggers.parquet import Parquet
from rlr_ray.loggers.registry import Logger, Loggers, build_loggers
from rlr_ray.loggers.tensorboard import TensorBoard
from rlr_ray.train.engine import Engine
from rlr_ray.train.loop import train
from rlr_ray.train.run_folder import RunFolder
from tests.runs import logged, small_run

ROWS: list[dict[str, Any]] = [{"step": step, "reward_mean": step / 7, "plan": "p"} for step in range(5)]


def written(file: Path, rows: Sequence[dict[str, Any]]) -> Journal:
    journal = Journal(file, 0)
    for row in rows:
        journal.add(row)
        journal.write()
    return journal


def test_a_journal_ends_where_the_checkpoint_does_and_grows_by_a_line_an_update(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    written(file, ROWS)
    sizes = [len(line) for line in file.read_bytes().splitlines()]
    assert max(sizes) - min(sizes) < 20 and len(sizes) == 5  # not all rows again with each
    journal = Journal(file, 3)
    assert journal.rows == ROWS[:3] == Journal(file, 99).rows  # what lay beyond is no longer there
    later = {"step": 3, "reward_mean": float("nan"), "held_out_reward": 0.1}
    journal.add(later)
    journal.write()
    assert str(Journal(file, 4).rows) == str([*ROWS[:3], later])


def test_a_line_cut_short_is_left_out_and_the_last_of_a_step_counts(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    written(file, ROWS)
    with file.open("ab") as stream:
        stream.write(b'{"step": 1, "reward_mean": 8.0}\n{"step": 2, "rewa')
    journal = Journal(file, 4)
    journal.add(ROWS[4])
    journal.write()
    rows = Journal(file, 5).rows
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[1]["reward_mean"] == 8.0 and rows[2] == ROWS[2]


def test_parquet_holds_all_rows_at_each_checkpoint_and_columns_that_come_later(tmp_path: Path) -> None:
    config = small_run(tmp_path, train={"checkpoint_every": 2})
    config.folder.mkdir()
    logger, file = Parquet(), config.folder / "metrics.parquet"
    logger.begin(config, config.folder, ROWS[:2])
    counts = []
    for row in ROWS[2:]:
        logger.update(row | {"later": 1.5} if row["step"] == 4 else row)
        counts.append(pyarrow.parquet.read_table(file).num_rows if file.exists() else 0)
    assert counts == [0, 4, 4]
    logger.end({})
    assert pyarrow.parquet.read_table(file).to_pylist() == [row | {"later": None} for row in ROWS[:4]] + [
        ROWS[4] | {"later": 1.5}
    ]


def test_tensorboard_hides_nothing_before_the_step_that_a_run_goes_on_with(tmp_path: Path) -> None:
    """Also where rows of the journal are lost."""
    logger = TensorBoard()
    logger.begin(small_run(tmp_path), tmp_path, ROWS[3:])
    logger.end({})
    events = list(EventFileLoader(str(logger.file)).Load())
    assert [event.step for event in events if event.session_log.status == SessionLog.START] == [5]


def test_all_writes_of_a_long_run_together_are_linear_in_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr("rlr_ray.loggers.parquet.replace_file", lambda file, write: written.append(len(logger.rows)))
    logger = Parquet()
    logger.begin(small_run(tmp_path), tmp_path, [])
    for step in range(3000):  # a checkpoint with every update
        logger.update({"step": step})
    assert written[:10] == list(range(1, 11)) and sum(written) < 12 * 3000 < sum(range(3000)) / 100


class Odd(Logger):
    """A user's own, which fails where its recipe says."""

    link = "http://odd/run"
    told: list[tuple[str, Any]] = []  # noqa: RUF012

    def __init__(self, fails: str = ""):
        self.fails = fails

    def _note(self, method: str, value: Any) -> None:
        if method == self.fails:
            raise ConnectionError
        self.told.append((method, value))

    def begin(self, config: RunConfig, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        self._note("begin", len(rows))

    def update(self, row: Mapping[str, Any]) -> None:
        self._note("update", row["step"])

    def evaluation(self, step: int, images: Tensor) -> None:
        self._note("evaluation", step)

    def end(self, summary: Mapping[str, Any]) -> None:
        self._note("end", None)


@pytest.mark.parametrize(("fails", "told"), [("", "begin update update end"), ("update", "begin end"), ("begin", "")])
def test_a_logger_that_fails_says_so_once_and_the_run_goes_on(tmp_path: Path, fails: str, told: str) -> None:
    Odd.told = []
    with logged() as said:
        loggers = Loggers(small_run(tmp_path, loggers={f"{__name__}:Odd": {"fails": fails}}), ROWS[:3])
        for row in ROWS[3:]:
            loggers.update(row)
        loggers.end({})
    assert " ".join(method for method, _ in Odd.told) == told
    assert loggers.links == ({} if fails == "begin" else {f"{__name__}:Odd": "http://odd/run"})
    assert len(said) == bool(fails) and all(
        "Odd: ConnectionError: ConnectionError; the run goes on" in text for text in said
    )


@pytest.mark.parametrize(
    ("loggers", "words"),
    [
        (["parkay"], r"loggers has 'parkay'; allowed: parquet, tensorboard.* as module:Class"),
        ([{"parquet": {"speed": 1}}], r"loggers.parquet cannot be made of {'speed': 1}: .*takes no arguments"),
        (["nowhere.at.all:Logger"], r"cannot be made of {}: No module named 'nowhere'"),
    ],
)
def test_loggers_that_cannot_be_are_refused(tmp_path: Path, loggers: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_loggers(small_run(tmp_path, loggers=loggers))


def test_loggers_are_named_or_have_options(tmp_path: Path) -> None:
    own = f"{__name__}:Odd"
    config = small_run(tmp_path, loggers=["parquet", {own: {"fails": "x"}}])
    assert config.loggers == {"parquet": {}, own: {"fails": "x"}}
    assert [type(logger) for logger in build_loggers(config).values()] == [Parquet, Odd]
    assert small_run(tmp_path, loggers=[]).loggers == {} and small_run(tmp_path).loggers.keys() == {
        "parquet",
        "tensorboard",
    }


def test_an_error_without_a_message_is_called_by_its_type() -> None:
    assert first_line(ValueError(" \n")) == first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("one\ntwo")) == "one"


def test_a_report_that_cannot_be_drawn_costs_no_run_but_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError("no axis")

    monkeypatch.setattr("rlr_ray.train.results.save_comparison", broken)
    config = small_run(tmp_path, train={"iterations": 1})
    RunFolder(config).begin(resume=False)
    with logged() as said:
        train(Engine(config), None, lambda row: None)
    assert "the pictures could not be made: ZeroDivisionError: no axis" in RunFolder(config).load_summary()["warnings"]
    assert "the pictures could not be made" in said and RunFolder(config).report.exists()
