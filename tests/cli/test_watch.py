"""The live page: what the server says, and what a browser makes of it."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from rlr_ray.cli import main
from rlr_ray.cli.watch import _BODY, _FOLLOW, Watcher, server
from rlr_ray.loggers.page import drawn, page
from tests.runs import small_run, train_here

CHROMIUM = shutil.which("chromium")
browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium (Debian: apt-get install chromium)")


@pytest.fixture(scope="module")
def going(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as it was after two of four updates, and beside it a finished one."""
    root = tmp_path_factory.mktemp("watched")
    finished = train_here(small_run(root, name="finished"), shown=True).path
    shutil.copytree(finished, root / "going")
    (root / "going" / "summary.json").unlink()
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "going" / "metrics.jsonl").write_text("".join(lines[:2]))
    return root / "going"


@pytest.fixture
def port(going: Path) -> Iterator[int]:
    with served(str(going)) as number:
        yield number


class served:
    """A server of these runs, at a port of its own, until the block ends."""

    def __init__(self, *names: str):
        self.serving = server(Watcher(names, "nowhere"), 0)

    def __enter__(self) -> int:
        threading.Thread(target=self.serving.serve_forever, args=(0.05,)).start()
        return self.serving.server_port

    def __exit__(self, *error: object) -> None:
        self.serving.shutdown()
        self.serving.server_close()


def get(port: int, place: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", place, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_parts_come_when_there_is_something_new(port: int, going: Path) -> None:
    status, text = get(port, "/parts")
    first = json.loads(text)
    assert (
        status == 200
        and "Update 2 of 4" in first["parts"]["head"]
        and '<progress max="4" value="2">' in text.replace('\\"', '"')
    )
    assert get(port, f"/parts?mark={first['mark']}") == (204, "")
    lines = (going.parent / "finished" / "metrics.jsonl").read_text().splitlines(keepends=True)
    before = (going / "metrics.jsonl").read_text()
    with (going / "metrics.jsonl").open("a") as file:
        file.write(lines[2])
    try:
        status, text = get(port, f"/parts?mark={first['mark']}")
    finally:
        (going / "metrics.jsonl").write_text(before)
    assert status == 200 and "Update 3 of 4" in json.loads(text)["parts"]["head"]


def test_several_runs_are_compared_and_each_has_its_page(going: Path) -> None:
    with served(str(going.parent)) as port:
        everything = json.loads(get(port, "/parts")[1])["parts"]
        one = json.loads(get(port, "/parts?run=finished")[1])["parts"]
        assert get(port, "/parts?run=other") == (404, "no run 'other' is followed; allowed: finished, going")
    assert {"links", "results", "recipes"} <= set(everything) and '<a href="/?run=going">' in everything["links"]
    assert "Finished after 4 updates" in one["head"] and "<b>finished</b>" in one["links"] and "terms" in one


def test_only_this_machines_browsers_are_answered(port: int) -> None:
    status, text = get(port, "/")
    assert status == 200 and "http://" not in text.replace("http://www.w3.org/", "").split("</script>")[-1]
    assert get(port, "/", Host="evil.example")[0] == get(port, "/parts", Host=f"evil.example:{port}")[0] == 403
    assert get(port, "/", Host=f"localhost:{port}")[0] == 200
    assert get(port, "/../config.yaml")[0] == 404


def test_a_browser_that_goes_away_leaves_no_traceback(going: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serving = served(str(going)).serving
    for error, told in ((BrokenPipeError(), ""), (KeyError("a defect"), "a defect")):
        try:
            raise error
        except (OSError, KeyError):
            serving.handle_error(None, ("127.0.0.1", 1))
        said = capsys.readouterr().err
        assert told in said and bool(said) == bool(told)
    serving.server_close()


def test_a_taken_port_and_a_folder_that_is_not_there_are_refused(
    port: int, going: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(going), "--port", str(port)]) == main(["watch", str(going), "--port", "99999"]) == 2
    assert main(["watch", str(going / "nothing")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"--port {port}: Address already in use; allowed: a port that is free" in said and "no run lies in" in said
    assert "--port 99999: " in said


def test_an_empty_folder_is_watched_until_there_is_a_run(tmp_path: Path) -> None:
    with served(str(tmp_path)) as port:
        assert "No run yet" in json.loads(get(port, "/parts")[1])["parts"]["head"]
        (tmp_path / "odd").mkdir()
        (tmp_path / "odd" / "config.yaml").write_text("nonsense: 1")
        status, text = get(port, "/parts")
        assert status == 404 and f"the run in {tmp_path / 'odd'} cannot be read: " in text and "nonsense" in text


def dom(place: str, folder: Path) -> str:
    """A page as Chromium has it after ten seconds of its own time."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", place]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout  # type: ignore[arg-type]


@pytest.mark.slow
@browser
def test_chromium_draws_the_live_page(port: int, tmp_path: Path) -> None:
    shown = dom(f"http://127.0.0.1:{port}/", tmp_path)
    body = shown[shown.index("<body>") :]
    assert body.count('<svg class="main-svg"') >= 8 and "Update 2 of 4" in body and 'id="pictures"' in body
    assert '<p id="said"></p>' in body


ASKED = """let asked = 0
fetch = async () => {
  if (asked === 1) await Plotly.relayout(document.querySelector(".figure"), { "xaxis.range": [1, 2] })
  const answer = answers[Math.min(asked++, 1)]
  return { status: asked > 2 ? 204 : 200, ok: true, json: async () => answer }
}
setTimeout(() => {
  const figure = document.querySelector(".figure"), parts = [...document.querySelector("main").children]
  document.title = JSON.stringify([figure.layout.xaxis.range, figure.data[0].x.length, parts.map(part => part.id)])
}, 8000)
"""


@pytest.mark.slow
@browser
def test_a_figure_keeps_its_zoom_while_numbers_come(tmp_path: Path) -> None:
    def parts(count: int) -> dict[str, Any]:
        figure = go.Figure(go.Scatter(x=list(range(count)), y=list(range(count))))
        return {"head": f"<h1>{count}</h1>", "reward": drawn(figure, 300, "Reward"), f"only-{count}": "<p>here</p>"}

    answers = json.dumps([{"mark": str(count), "parts": parts(count)} for count in (3, 9)]).replace("</", "<\\/")
    script = f"const answers = {answers}\n{ASKED}"
    file = tmp_path / "page.html"
    file.write_text(page("t", [_BODY], script + _FOLLOW), "utf-8")
    shown = dom(f"file://{file}", tmp_path / "profile")
    title = shown[shown.index("<title>") + 7 : shown.index("</title>")]
    assert json.loads(title) == [[1, 2], 9, ["head", "reward", "only-9"]]
