"""Whole runs whose reward dies, answers nonsense or dawdles: they go on or stop, as their recipe says."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rlr_ray.errors import UserError
from tests.rewards.servers import ServerApart, pixels, server
from tests.runs import small_run, train_here

PLAN = {"first_order": {"steps": 0}, "sub_chain": {"length": 0}, "rest": "half_order", "half_order": {"weight": 1.0}}


def run(folder: Path, url: str, *, resume: bool = False, on_row: Any = lambda row: None, **changes: Any) -> Any:
    """Its summary and its rows."""
    reward = {"name": "http", "options": {"url": url, "patience_s": 20}} | changes.pop("reward", {})
    keys = {"prompts": ["1", "2"], "estimator": PLAN, "reward": reward, "train": {"iterations": 3}} | changes
    rows: list[dict[str, Any]] = []
    done = train_here(small_run(folder, **keys), lambda row: (rows.append(row), on_row(row)), resume=resume)
    return done.load_summary(), rows


def test_a_server_that_is_killed_and_comes_back_costs_nothing(tmp_path: Path) -> None:
    """SIGKILL after the first update, back two seconds later: the run ends as the undisturbed one does."""
    first = ServerApart(of_size=0.1)
    expected, _ = run(tmp_path, first.url, name="undisturbed")
    later: list[ServerApart] = []

    def come_back() -> None:
        time.sleep(2)
        later.append(ServerApart(first.port, of_size=0.1))

    def disturb(row: dict[str, Any]) -> None:
        if row["step"] == 0:
            first.kill()
            threading.Thread(target=come_back).start()

    found, rows = run(tmp_path, first.url, name="killed", on_row=disturb)
    later[0].kill()
    assert found["theta_sha256"] == expected["theta_sha256"] and found["gain"] == expected["gain"]
    assert max(row["reward_s"] for row in rows) > 1.5  # where the time went


def test_a_server_that_stays_away_stops_the_run_which_goes_on_later(tmp_path: Path) -> None:
    first = ServerApart(of_size=0.1)
    expected, _ = run(tmp_path, first.url, name="undisturbed")
    impatient = {"reward": {"name": "http", "options": {"url": first.url, "patience_s": 0.2}}}
    with pytest.raises(UserError, match=r"gave no scores .*see whether the server runs"):
        run(
            tmp_path, first.url, name="away", on_row=lambda row: first.kill() if row["step"] == 1 else None, **impatient
        )
    second = ServerApart(first.port, of_size=0.1)
    found, rows = run(tmp_path, first.url, name="away", resume=True, **impatient)
    second.kill()
    assert found["theta_sha256"] == expected["theta_sha256"] and [row["step"] for row in rows] == [2]


class Nonsense:
    """The brightness of a picture, but for one picture of the second batch of training."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        self.batches += 1
        scores: list[float | None] = [float(picture.mean()) for picture in pixels(asked)]
        if self.batches == 3:  # the first is the base model's evaluation
            scores[1] = None
        return {"scores": scores}


def test_a_score_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with (
        server(Nonsense()) as (url, _),
        pytest.raises(UserError, match=r"'http' returned nan for image 1 \(prompt '1'"),
    ):
        run(tmp_path, url)


def test_or_is_replaced_and_told(tmp_path: Path) -> None:
    reward = {"invalid": -1.0}
    with server(Nonsense()) as (url, _):
        options = {"name": "http", "options": {"url": url, "patience_s": 20}}
        summary, rows = run(tmp_path, url, reward=options | reward)
    assert [row["reward_invalid"] for row in rows] == [1, 0, 0]
    assert any("1 images had a score that was not finite" in text for text in summary["warnings"])
    assert rows[0]["reward_mean"] < 0.3 < rows[1]["reward_mean"]  # one of four scored -1: seen, not averaged away


class First:
    """The brightness of the pictures that it saw first, and of no other."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        scores = [float(picture.mean()) for picture in pixels(asked)]
        self.seen = self.seen or scores
        return {"scores": [score if score in self.seen else None for score in scores]}


@pytest.mark.parametrize("judges", [{"first": {"invalid": -1.0}}, {}, {"digits_judge": {}}], ids=str)
def test_a_trained_run_whose_judge_fails_at_its_end_is_finished_with_another(
    tmp_path: Path, judges: dict[str, Any]
) -> None:
    with server(First()) as (url, _):

        def judged(asked: dict[str, Any], **more: Any) -> Any:
            own = {"first": {"name": "http", "options": {"url": url}}}
            keys = {"reward": {"name": "digits", "options": {}}, "prompts": ["a handwritten three"]}
            judges = {label: own.get(label, {}) | one for label, one in asked.items()}
            return run(tmp_path, url, **keys, evaluation={"judge": None, "judges": judges}, **more)

        with pytest.raises(UserError, match=r"'first' returned nan for image 0 .*`invalid`"):
            judged({"first": {}})
        summary, rows = judged(judges, resume=True)
    assert rows == [] and summary["judges"] == list(judges) and summary["steps"] == 3
    assert summary["invalid_after"] == (2 if "first" in judges else 0)
    assert summary["scores"].keys() == judges.keys()


def test_a_slow_server_is_waited_for(tmp_path: Path) -> None:
    quick, slow = ServerApart(of_size=0.1), ServerApart(of_size=0.1, delay_s=0.3)
    expected, rows = run(tmp_path, quick.url, name="quick")
    found, slower = run(tmp_path, slow.url, name="slow")
    quick.kill()
    slow.kill()
    assert found["theta_sha256"] == expected["theta_sha256"]
    assert sum(row["reward_s"] for row in slower) > 0.6 + sum(row["reward_s"] for row in rows)
