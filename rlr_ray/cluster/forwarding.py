"""What the driver shows of a run on Ray: the leading worker's rows and words, and that workers do not start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from rlr_ray.cluster.background import repeating

if TYPE_CHECKING:
    from rlr_ray.loop import Report, Say

_LOOK_S = 0.5  # between two looks into the mailbox
_AWAITED_S = 60.0  # without a worker; then it is said, and again each time that it has doubled


class _Forwarder:
    def __init__(self, mailbox: ActorHandle, report: Report, say: Say, missing: Callable[[], str]):
        self.mailbox, self.report, self.say, self.missing = mailbox, report, say, missing
        self.due = _AWAITED_S

    def forward(self) -> None:
        try:
            items, awaited = ray.get([self.mailbox.take.remote(), self.mailbox.awaited_s.remote()])
        except RayActorError:  # the mailbox is lost: who asks it for the run's failure says so
            return
        for news in items:
            self.say(news) if isinstance(news, str) else self.report(news)
        if awaited > self.due:
            self.say(f"no training worker has started for {awaited:.0f} s: {self.missing()}")
            self.due *= 2
        elif not awaited:
            self.due = _AWAITED_S


@contextmanager
def forwarding(mailbox: ActorHandle, report: Report, say: Say, missing: Callable[[], str]) -> Iterator[None]:
    """Hand on what the mailbox gets until the block ends; `missing` says what workers wait for that do not start."""
    forwarder = _Forwarder(mailbox, report, say, missing)
    try:
        with repeating(forwarder.forward, _LOOK_S):
            yield
    finally:
        forwarder.forward()
