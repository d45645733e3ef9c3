"""The run's coordinator: an actor that carries messages between driver and leading worker, and the driver's threads.

Imports nothing heavy (no torch): the coordinator is a process of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError

from rlr_ray.utils.console import messages_by
from rlr_ray.utils.signals import asked

if TYPE_CHECKING:
    from rlr_ray.loggers import Report

logger = logging.getLogger(__name__)
Message = tuple[int, str, str]  # level, logger's name and text of a log record


class RunCoordinator:
    """Carries updates' rows, messages and errors to the driver, and the rollout actors to the leading worker."""

    def __init__(self, name: str = "") -> None:
        self.name = name  # by which processes of the run find it
        self.news: list[dict[str, Any] | Message] = []
        self.error: Exception | None = None  # a user's
        self.actors: list[Any] = []  # of one reference to name -> actor, since unpacking actors' handles imports torch
        self.version = 0  # of the actors
        self.built = False  # the leading worker has its engine
        self.begun = False  # the run's folder is made
        self.furthest = -1  # the last update that came back
        self.starts, self.size = 0, 0  # starts of the workers since then, those after a resize left out; how many
        self.awaited_since: float | None = None  # when workers were asked for that have not started yet
        self.signal: str | None = None  # that the driver got
        self.trouble = ""  # the traceback that ended the workers, since their last start

    def called(self) -> str:
        return self.name

    def put(self, row: dict[str, Any]) -> str | None:
        """An update's row; the signal by which the run is to end, if the driver got one."""
        self.news.append(row)
        if row["step"] > self.furthest:
            self.furthest, self.starts = row["step"], 0
        return self.signal

    def end(self, signal: str) -> None:
        """Have the run end after its update."""
        self.signal = signal

    def log(self, message: Message) -> None:
        self.news.append(message)

    def take(self) -> list[dict[str, Any] | Message]:
        """Rows and messages since the last call, in order."""
        news, self.news = self.news, []
        return news

    def note_built(self) -> None:
        self.built = True

    def is_built(self) -> bool:
        return self.built

    def begin(self) -> None:
        """Note that the run's folder is made: workers may write there."""
        self.begun = True

    def has_begun(self) -> bool:
        return self.begun

    def start(self, size: int) -> tuple[int, str]:
        """Note that so many workers start; how often they have since the last new update, and why they ended, if known.

        Another number of workers is a resize, which is no failure.
        """
        self.starts, self.size = self.starts + 1 if size == self.size else max(self.starts, 1), size
        trouble, self.trouble, self.awaited_since = self.trouble, "", None
        return self.starts, trouble

    def await_workers(self, text: str = "") -> None:
        """Note that workers are to start from now on, and why, unless the run has failed."""
        self.awaited_since = time.monotonic()
        if text and not self.error:
            self.log((logging.WARNING, __name__, text))

    def awaited_s(self) -> float:
        """For how long workers that were to start have not."""
        return 0.0 if self.awaited_since is None else time.monotonic() - self.awaited_since

    def started(self) -> bool:
        """Whether workers have their places, and the first rollout actors their engines."""
        return self.begun and (self.starts > 0 or self.furthest >= 0)

    def note_trouble(self, text: str) -> None:
        """Keep a worker's traceback; the first counts, since one that ends takes the others with it."""
        self.trouble = self.trouble or text

    def fail(self, error: Exception) -> None:
        """End the run with a user's error; the first one counts."""
        self.error = self.error or error

    def failure(self) -> Exception | None:
        return self.error

    def set_actors(self, actors: list[Any]) -> None:
        self.actors = actors
        self.version += 1

    def actors_since(self, version: int) -> tuple[int, list[Any]] | None:
        """The rollout actors' version and reference; None if it is still that version."""
        return None if version == self.version else (self.version, self.actors)


# --- in the leading worker


@contextmanager
def messages_to(coordinator: ActorHandle, alive: Callable[[], None]) -> Iterator[None]:
    """Send what this process logs to the driver until the block ends, and call `alive` with each message.

    After the block the coordinator has all rows and messages: Ray Train kills a worker that is done at once.
    """
    with messages_by(_ToDriver(coordinator, alive)):
        yield
    with suppress(RayActorError):  # it is lost, as the driver says
        ray.get(coordinator.failure.remote())  # a process's calls are answered in their order


class _ToDriver(logging.Handler):
    def __init__(self, coordinator: ActorHandle, alive: Callable[[], None]):
        super().__init__()
        self.coordinator, self.alive = coordinator, alive

    def emit(self, record: logging.LogRecord) -> None:
        self.alive()  # whoever says that it waits for something does not hang
        self.coordinator.log.remote((record.levelno, record.name, self.format(record)))


# --- in the driver


_LOOK_S = 0.5  # between two questions for news
_AWAITED_S = 60.0  # without a worker; then it is said, and again each time that it has doubled


@contextmanager
def forwarding(coordinator: ActorHandle, report: Report, missing: Callable[[], str]) -> Iterator[None]:
    """Hand on rows and messages until the block ends; `missing` says what workers wait for that do not start."""
    forwarder = _Forwarder(coordinator, report, missing)
    with repeating(forwarder.forward, _LOOK_S, "forwarding the workers' news", at_end=True):
        yield


@dataclass
class _Forwarder:
    coordinator: ActorHandle
    report: Report
    missing: Callable[[], str]
    due: float = _AWAITED_S

    def forward(self) -> None:
        try:
            if (name := asked()) is not None:
                self.coordinator.end.remote(name)
            news, awaited = ray.get([self.coordinator.take.remote(), self.coordinator.awaited_s.remote()])
        except RayActorError:  # it is lost: who asks it for the run's failure says so
            return
        failed: Exception | None = None
        for one in news:
            try:
                self._hand_on(one)
            except Exception as error:  # the others reach the driver all the same
                failed = failed or error
        if awaited > self.due:
            logger.warning(f"no training worker has started for {awaited:.0f} s: {self.missing()}")
            self.due *= 2
        elif not awaited:
            self.due = _AWAITED_S
        if failed:
            raise failed

    def _hand_on(self, one: dict[str, Any] | Message) -> None:
        if isinstance(one, dict):
            self.report(one)
        else:
            level, name, text = one
            logging.getLogger(name).log(level, text)


@contextmanager
def repeating(act: Callable[[], None], every_s: float, name: str, *, at_end: bool = False) -> Iterator[None]:
    """Call `act` every so many seconds, in a thread, until the block ends, and once more if so `at_end`.

    An error is logged, once as long as it is the same, and `act` is called again all the same.
    """
    ended, last = threading.Event(), ""

    def attempt() -> None:
        nonlocal last
        try:
            act()
            last = ""
        except Exception as error:
            if repr(error) != last:
                last = repr(error)
                defect = not isinstance(error, RayError)  # else a process or node was lost: no traceback tells more
                logger.warning(f"{name} failed, and is tried again every {every_s:g} s: {last}", exc_info=defect)

    def repeat() -> None:
        while not ended.wait(every_s):
            attempt()

    thread = threading.Thread(target=repeat, daemon=True, name=name)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if at_end:
            attempt()


Result = TypeVar("Result")


def beside(act: Callable[[], Result]) -> Future[Result]:
    """What `act` comes to, in a thread that does not outlive the process."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
