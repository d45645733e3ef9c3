"""The common part of Weights & Biases, MLflow, SwanLab and Trackio."""

from __future__ import annotations

import json
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from torch import Tensor

from rlr_ray.config.run import RunConfig
from rlr_ray.loggers.pictures import save_grid
from rlr_ray.loggers.registry import Logger
from rlr_ray.utils.files import replace_file

PATIENCE_S = 60.0  # with a server, at the start and again at the end; in between nothing waits for it


class Tracker(Logger, ABC):
    """A program or service that shows runs. All that it does is done in a thread, so that no update waits for it.

    The id that it has for the run lies in the run's folder: a resumed run goes on there. Its keys belong in the
    environment or where its own login puts them, not in a recipe. What most have in common stands here.
    """

    package: Any  # whose Image and Video pictures are
    run: Any

    @abstractmethod
    def start(self, config: RunConfig, id: str | None) -> str:
        """Import `package` and begin `run`, or go on with the one of this id; set `link`. Returns its id."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, file: Path) -> None:
        """Take a .png, or a .gif of a video, which may be gone afterwards."""
        kind = self.package.Video if file.suffix == ".gif" else self.package.Image
        self.run.log({name: kind(str(file))}, step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.run.finish()

    def begin(self, config: RunConfig, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        self.samples, self.folder = folder / "samples", folder / "trackers"
        self.folder.mkdir(exist_ok=True)
        file = self.folder / f"{type(self).__name__.lower()}.json"
        known = json.loads(file.read_text("utf-8"))["id"] if file.exists() else None
        self.error: Exception | None = None  # of the thread, until it is raised here
        self.tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name=file.stem).start()
        id = _answer(self._ask(lambda: self.start(config, known)))
        text = json.dumps({"id": id, "link": self.link})
        replace_file(file, lambda part: part.write_text(text, "utf-8"))

    def update(self, row: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        step = int(values.pop("step"))
        self._ask(lambda: self.scalars(step, values))
        self._raise()

    def evaluation(self, step: int, images: Tensor) -> None:
        file = save_grid(self.folder / f"held_out_{step + 1:06d}", images)

        def send() -> None:
            try:
                self.picture(step, "held_out", file)
            finally:
                file.unlink()

        self._ask(send)
        self._raise()

    def end(self, summary: Mapping[str, Any]) -> None:
        def close() -> None:
            for file in sorted(self.samples.glob("before_after.*")):
                self.picture(summary["steps"] - 1, "before_after", file)
            self.finish(summary)

        _answer(self._ask(close))
        self.tasks.put(None)
        self._raise()

    def _ask(self, task: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self.tasks.put((future, task))
        return future

    def _raise(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while (asked := self.tasks.get()) is not None:
            future, task = asked
            try:
                future.set_result(task())
            except (Exception, SystemExit) as error:  # a package ends what it takes for its own process
                self.error = error if isinstance(error, Exception) else RuntimeError(f"it gave up: {error}")
                future.set_exception(self.error)


def _answer(future: Future[Any]) -> Any:
    if not wait([future], PATIENCE_S).done:
        raise TimeoutError(f"no answer in {PATIENCE_S:g} s; what it was not told is in metrics.jsonl")
    return future.result()
