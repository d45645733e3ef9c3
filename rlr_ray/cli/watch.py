"""`rlr-ray watch`: a page on this machine alone that follows runs and searches while they go on."""

from __future__ import annotations

import argparse
import html
import json
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from rlr_ray.errors import UserError
from rlr_ray.evaluation.compare import comparison_parts
from rlr_ray.evaluation.followed import Followed, read_runs, run_folders, state_of
from rlr_ray.loggers.html import report_parts
from rlr_ray.loggers.page import page
from rlr_ray.utils.console import wide_console

_HERE = "127.0.0.1"
_STATE_S = 15  # after which a run that goes on is looked at again, though it has written nothing
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
_BODY = '<p id="said">Reading ...</p><main></main>'
_FOLLOW = """const texts = new Map()
let mark = ""
function show(parts) {  // what is new; a figure that is there stays, zoomed as it is
  const main = document.querySelector("main")
  let last = null
  for (const [name, text] of Object.entries(parts)) {
    const section = document.getElementById(name) ?? Object.assign(document.createElement("section"), { id: name })
    if (!section.parentNode) main.insertBefore(section, last ? last.nextSibling : main.firstChild)
    last = section
    if (texts.get(name) === text) continue
    texts.set(name, text)
    const known = new Map([...section.querySelectorAll(".figure")].map(figure => [figure.dataset.name, figure]))
    section.innerHTML = text
    for (const place of section.querySelectorAll(".figure")) {
      const figure = known.get(place.dataset.name)
      if (!figure) continue
      figure.querySelector("script").textContent = place.querySelector("script").textContent
      figure.style.height = place.style.height
      place.replaceWith(figure)
    }
    draw(section)
  }
  for (const section of [...main.children]) if (!(section.id in parts)) { texts.delete(section.id); section.remove() }
}
async function follow() {
  const said = document.getElementById("said"), began = performance.now()
  try {
    const run = new URLSearchParams(location.search).get("run") ?? ""
    const answer = await fetch("/parts?" + new URLSearchParams({ run, mark }))
    if (answer.status === 200) {
      const fresh = await answer.json()
      show(fresh.parts)
      mark = fresh.mark
    }
    said.textContent = answer.ok ? "" : await answer.text()
  } catch {
    said.textContent = "No answer: rlr-ray watch has ended. Start it again, and this page goes on."
  }
  setTimeout(follow, Math.max(2000, 10 * (performance.now() - began)))
}
addEventListener("load", follow)"""


def watch_command(options: argparse.Namespace) -> None:
    from rlr_ray.config.recipe import output_dir_of

    watcher = Watcher(options.runs, output_dir_of(options.set))
    with server(watcher, options.port) as serving:
        console = wide_console()
        console.print(f"{len(watcher.folders())} runs, followed at http://{_HERE}:{serving.server_port}", markup=False)
        serving.serve_forever()


class Watcher:
    """What is followed, read anew where something has changed."""

    def __init__(self, names: Sequence[str], output_dir: str):
        """Raises UserError for what is neither a run nor a folder."""
        self.names, self.output_dir = names, output_dir
        self._lock = threading.Lock()
        self._read: tuple[str, list[Followed]] = ("", [])
        self.folders()

    def folders(self) -> list[Path]:
        """A search, or a folder of runs, may have others than before."""
        return run_folders(self.names, self.output_dir)

    def parts(self, name: str, mark: str) -> tuple[str, dict[str, str]] | None:
        """The page of the run of this name, or of all of them, and its mark; None if the mark is that of before.

        Raises UserError if there is no such run.
        """
        with self._lock:
            known, runs = self._read
            now = state_of(folders := self.folders())
            if now != known:
                runs = read_runs(folders)
                self._read = now, runs
        fresh = now if all(run.finished for run in runs) else f"{now}.{time.time() // _STATE_S:.0f}"
        return None if fresh == mark else (fresh, _parts(runs, name))


def _parts(runs: Sequence[Followed], name: str) -> dict[str, str]:
    if not runs:
        return {"head": "<h1>No run yet</h1><p>This page shows the first one as soon as there is one.</p>"}
    chosen = [run for run in runs if name in ("", run.name)]
    if not chosen:
        raise UserError(f"no run {name!r} is followed; allowed: {', '.join(run.name for run in runs)}")
    if len(chosen) > 1:
        return {"links": _links(runs, name)} | comparison_parts(runs)
    (run,) = chosen
    links = {"links": _links(runs, name)} if len(runs) > 1 else {}
    parts = report_parts(run.config, run.rows, run.shown, run.state)
    if not run.finished:
        parts["head"] += f'<progress max="{run.config.train.iterations}" value="{len(run.rows)}"></progress>'
    return links | parts


def _links(runs: Sequence[Followed], name: str) -> str:
    """From one run's page to the others, and to that of all."""
    places = {"all runs": "/"} | {run.name: f"/?run={quote(run.name)}" for run in runs}
    shown = name or "all runs"
    texts = [
        f"<b>{html.escape(text)}</b>" if text == shown else f'<a href="{place}">{html.escape(text)}</a>'
        for text, place in places.items()
    ]
    return f"<p>{' · '.join(texts)}</p>"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing where a browser went away before it had its answer."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def server(watcher: Watcher, port: int) -> ThreadingHTTPServer:
    """Answers this machine alone, at a port of its own if it is 0. Raises UserError if the port is another's."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            place = urlsplit(self.path)
            if self.headers["Host"] not in [f"{name}:{serving.server_port}" for name in (_HERE, "localhost")]:
                return self._answer(403, "text/plain", "rlr-ray watch answers this machine's own browsers")
            if place.path == "/":
                return self._answer(200, "text/html", page("rlr-ray watch", [_BODY], _FOLLOW))
            if place.path != "/parts":
                return self._answer(404, "text/plain", "there is / and /parts")
            asked = {key: values[0] for key, values in parse_qs(place.query).items()}
            try:
                fresh = watcher.parts(asked.get("run", ""), asked.get("mark", ""))
            except UserError as error:
                return self._answer(404, "text/plain", str(error))
            if fresh is None:
                return self._answer(204, "text/plain", "")
            return self._answer(200, "application/json", json.dumps({"mark": fresh[0], "parts": fresh[1]}))

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", _POLICY)
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing: a page asks every other second."""

    try:
        serving = _Server((_HERE, port), Handler)
        return serving
    except (OSError, OverflowError) as error:  # the latter beyond 65535
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"--port {port}: {why}; allowed: a port that is free, or 0 for any") from error
