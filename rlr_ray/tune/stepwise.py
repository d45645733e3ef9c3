"""Work that reports as it goes, taken one report at a time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


class _Ended(BaseException):
    """Raised in the work, at its report, so that it unwinds and frees what it holds."""


class Stepwise:
    """Runs `work`, which calls the function that it is given with each result, in a thread that waits in between."""

    def __init__(self, work: Callable[[Callable[[Any], None]], None]):
        self.work = work
        self.results: queue.Queue[Any] = queue.Queue()
        self.wanted = threading.Semaphore(0)
        self.ending = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def next(self) -> Any:
        """The work's next result, None at its end. Raises what the work raised."""
        self.wanted.release()
        if self.thread.ident is None:
            self.thread.start()
        result = self.results.get()
        if self.error is not None:
            raise self.error
        return result

    def end(self) -> None:
        """Give up a work that waits at a report, and wait until it has unwound."""
        self.ending = True
        self.wanted.release()
        if self.thread.ident is not None:
            self.thread.join()

    def _run(self) -> None:
        try:
            self._wait()
            self.work(self._report)
        except _Ended:
            pass
        except BaseException as error:
            self.error = error
        self.results.put(None)

    def _report(self, result: Any) -> None:
        self.results.put(result)
        self._wait()

    def _wait(self) -> None:
        self.wanted.acquire()
        if self.ending:
            raise _Ended
