"""Pages of runs, finished or not, against what the runs left."""

from __future__ import annotations

import html
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest

from rlr_ray.cli import main
from rlr_ray.errors import UserError
from rlr_ray.evaluation.compare import comparison_parts
from rlr_ray.evaluation.followed import Followed, read_run, read_runs, run_folders, state_of
from rlr_ray.loggers.html import report_parts
from rlr_ray.loggers.shown import Shown
from tests.loggers.test_html import Read, pictures
from tests.runs import small_run, train_here

RUN: dict[str, Any] = {"evaluation": {"every": 2, "pictures": 3, "chains": 4}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs: the second differs in its rate, the third in its base model's pictures too."""
    root = tmp_path_factory.mktemp("runs")
    changes: list[dict[str, Any]] = [
        {"name": "one"},
        {"name": "two", "train": {"learning_rate": 0.05}},
        {"name": "three", "evaluation": RUN["evaluation"] | {"seed": 7}},
    ]
    return [train_here(small_run(root, **RUN | keys), shown=True).path for keys in changes]


@pytest.fixture
def runs(folders: list[Path]) -> list[Followed]:
    return read_runs(folders)


def table(part: str) -> dict[str, list[str]]:
    """Cells of a part's table, by the first one of each line."""
    lines = [re.findall(r"<t[hd]>(.*?)</t[hd]>", line) for line in re.findall(r"<tr>(.*?)</tr>", part)]
    return {
        html.unescape(first): [html.unescape(cell).replace("\u00a0", " ") for cell in cells] for first, *cells in lines
    }


def figures(part: str) -> dict[str, Any]:
    """A part's figures, by title."""
    found = re.findall(r'data-name="(.*?)".*?<script type="application/json">(.*?)</script>', part)
    return {html.unescape(name): json.loads(text) for name, text in found}


def test_what_a_report_shows_is_kept_beside_it(runs: list[Followed], folders: list[Path]) -> None:
    run = runs[0]
    assert (
        run.shown is not None and run.finished and run.summary == json.loads((folders[0] / "summary.json").read_text())
    )
    report = (folders[0] / "report.html").read_text("utf-8")
    parts = report_parts(run.config, run.rows, run.shown, run.state)
    for name in ("results", "facts", "reward", "pictures", "terms", "cost"):
        assert parts[name] in report, name


def test_the_table_has_each_runs_results_and_their_paired_difference(runs: list[Followed]) -> None:
    cells = table(comparison_parts(runs)["results"])
    assert cells[""] == ["one", "two", "three"]
    for column, run in enumerate(runs):
        summary = run.summary
        assert cells["gain ± se"][column] == f"{summary['gain']:+.3g} ± {summary['gain_se']:.2g}"
        assert cells["KL, nats"][column] == f"{summary['kl']:.3g}"
        assert cells["denoiser forwards"][column] == f"{sum(row['denoiser_forwards'] for row in run.rows):,}"
    saved = [json.loads((run.folder / "report.json").read_text())["scores"]["reward"] for run in runs]
    difference = numpy.subtract(saved[1]["after"], saved[0]["after"])
    error = difference.std(ddof=1) / len(difference) ** 0.5
    assert cells["against one ± se"] == ["", f"{difference.mean():+.3g} ± {error:.2g}", ""]  # the third's seeds differ


def test_curves_lie_where_updates_work_and_time_put_them(runs: list[Followed]) -> None:
    shown = figures(comparison_parts(runs[:2])["reward"])
    rows = runs[1].rows
    work = numpy.cumsum([row["denoiser_forwards"] + 2 * row["denoiser_backwards"] for row in rows])
    seconds = numpy.cumsum([row["seconds"] for row in rows])
    places = {"Over updates": [0, 2, 4], "Over denoiser work": [0, work[1], work[3]]}
    places["Over time"] = [0, seconds[1], seconds[3]]
    assert list(shown) == list(places)
    for title, expected in places.items():
        thin, held_out = shown[title]["data"][2:]
        assert held_out["name"] == "two" and held_out["x"] == pytest.approx(expected)
        assert held_out["y"][0] == pytest.approx(runs[1].summary["reward_before"])
        assert held_out["y"][2] == pytest.approx(runs[1].summary["reward_after"])
        assert thin["y"] == pytest.approx([row["reward_mean"] for row in rows])
    assert shown["Over time"]["layout"]["xaxis"]["title"]["text"] == "seconds of updates"


def test_recipes_differ_where_they_do(runs: list[Followed]) -> None:
    differences = table(comparison_parts(runs)["recipes"])
    assert differences == {
        "key": ["one", "two", "three"],
        "train.learning_rate": ["0.02", "0.05", "0.02"],
        "evaluation.seed": ["null", "null", "7"],
    }


def test_pictures_share_their_base_models_where_that_is_one(runs: list[Followed]) -> None:
    def sources(some: list[Followed]) -> list[str]:
        return re.findall(r'src="(.*?)"', comparison_parts(some)["pictures"])

    one, two, three = ([(pair.before, pair.after) for pair in run.shown.pairs] for run in runs if run.shown)
    together = [
        picture for (before, after), (_, other) in zip(one, two, strict=True) for picture in (before, after, other)
    ]
    assert sources(runs[:2]) == together
    assert sources([runs[0], runs[2]]) == [picture for pair in (*one, *three) for picture in pair]


def test_commands_write_pages_of_one_and_of_several(folders: list[Path], tmp_path: Path) -> None:
    root = folders[0].parent
    assert main(["report", "one", "two", "--set", f"output_dir={root}"]) == 0
    read = Read((root / "report.html").read_text("utf-8"))
    assert len(pictures(read)) == 3 * 3
    assert main(["report", str(folders[1]), "--out", str(tmp_path / "one.html")]) == 0
    assert len(pictures(Read((tmp_path / "one.html").read_text("utf-8")))) == 2 * 3
    assert main(["report", str(folders[1]), "--out", str(tmp_path / "nowhere" / "one.html")]) == 2
    assert main(["report", str(tmp_path)]) == 2  # a folder without a run


def test_runs_are_named_by_themselves_or_by_what_holds_them(folders: list[Path], tmp_path: Path) -> None:
    root = folders[0].parent
    assert run_folders(["one", str(folders[1])], str(root)) == folders[:2]
    assert run_folders([], str(root)) == run_folders([str(root)], "elsewhere") == folders
    (tmp_path / "search").mkdir()
    shutil.copytree(folders[0], tmp_path / "search" / "trials" / "t-1")
    assert run_folders(["search"], str(tmp_path)) == [tmp_path / "search" / "trials" / "t-1"]
    with pytest.raises(UserError, match="no run lies in"):
        run_folders(["nothing"], str(root))


def test_a_run_is_followed_from_its_first_moment_to_its_end(folders: list[Path], tmp_path: Path) -> None:
    folder, marks = tmp_path / "going", set[str]()

    def now() -> Followed:
        marks.add(state_of([folder]))
        run = read_run(folder)
        assert {"head", "facts", "reward"} <= set(report_parts(run.config, run.rows, run.shown, run.state))
        comparison_parts([run, read_run(folders[1])])
        return run

    folder.mkdir()
    shutil.copy(folders[0] / "config.yaml", folder)
    assert now().state == "No update of 4 yet; the start is not measured yet."
    shown = Shown.load(folders[0])
    assert shown is not None
    gone = ("ran_on", "adapter", "trained_numbers", "versions", "links", "kept_update", "theta_sha256")
    summary = {name: value for name, value in shown.summary.items() if name not in gone}
    Shown(summary | {"steps": 0, "warnings": []}, shown.scores, shown.pairs).save(folder)
    assert now().state == "No update of 4 yet: the start is measured."
    lines = (folders[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:40])  # its last line is being written
    assert re.fullmatch(r"Update 2 of 4, \S+ s each: about \S+ s left, evaluations apart\.", now().state)
    for name in ("metrics.jsonl", "report.json", "summary.json"):
        shutil.copy(folders[0] / name, folder)
    assert now().finished and now().state == "Finished after 4 updates, on this process."
    assert len(marks) == 4


def test_a_run_that_says_nothing_may_have_ended(folders: list[Path], tmp_path: Path) -> None:
    import os
    import time

    folder = tmp_path / "silent"
    shutil.copytree(folders[0], folder)
    (folder / "summary.json").unlink()
    an_hour_ago = time.time() - 3600
    os.utime(folder / "metrics.jsonl", (an_hour_ago, an_hour_ago))
    state = read_run(folder).state
    assert "nothing new for 60 min" in state and f"rlr-ray train --resume {folder}" in state


def test_what_others_wrote_into_a_runs_folder_is_text(runs: list[Followed]) -> None:
    bad = "<script>alert('x')</script>\"><img src=x>"
    first = runs[0].shown
    assert first is not None
    shown = Shown(
        dict(first.summary) | {"warnings": [bad]}, first.scores, [replace(first.pairs[0], prompt=bad, after=bad)]
    )
    run = replace(runs[0], name=bad, shown=shown)
    parts = comparison_parts([run, runs[1]]) | report_parts(run.config, run.rows, shown, bad)
    assert "<script>alert" not in "".join(parts.values()) and "<img src=x>" not in "".join(parts.values())
