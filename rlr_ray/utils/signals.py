"""SIGTERM and SIGHUP: a run that gets one ends after its update, with a checkpoint; all else ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlr_ray.errors import UserError

_HEEDED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_asked: str | None = None  # the signal that a run has yet to heed
_waiting = 0  # blocks, in whichever threads, whose update is worth its end
_lock = threading.Lock()  # of that number; no handler takes it
_heeding = False


class Terminated(KeyboardInterrupt):
    """A signal ended this process's work; its name is the message."""


class Ended(UserError):
    """A signal ended a run, which has left a checkpoint."""


def status_of(name: str) -> int:
    """The exit status of a process that a signal ended."""
    return 128 + int(signal.Signals[name])


def asked() -> str | None:
    """The signal by which this run is to end after its update, if there was one."""
    return _asked


def ask(name: str | None) -> None:
    """Have this process's run end after its update by a signal that came elsewhere; None: there was none."""
    global _asked
    _asked = name or _asked


@contextmanager
def heeded() -> Iterator[None]:
    """Heed the signals until the block ends, in a main thread; one that is ignored, as by nohup, stays so."""
    global _heeding, _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _HEEDED}
    _heeding, _asked = True, None
    heed()
    try:
        yield
    finally:
        _heeding, _asked = False, None
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def heed() -> None:
    """Heed them again where something else has put its own handlers, as Ray does."""
    for number in _HEEDED if _heeding else ():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)


@contextmanager
def after_update() -> Iterator[None]:
    """Let the first signal wait for whoever looks at `asked` until the block ends."""
    global _waiting
    with _lock:
        _waiting += 1
    try:
        yield
    finally:
        with _lock:
            _waiting -= 1


def _handle(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if not _waiting or _asked is not None:
        raise Terminated(name)
    ask(name)
    text = f"\n{name}: the run ends after this update, with a checkpoint; once more ends it at once\n"
    os.write(2, text.encode())  # no lock is taken in a handler
