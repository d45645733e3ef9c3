"""Calls of a reward computed one after the other, or several together. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Asked:
    """What one caller wants scored."""

    images: Tensor  # [B, 3, H, W] in [0, 1]
    prompts: Sequence[str]
    metadata: Sequence[dict[str, Any]]
    gradient: bool  # whether d score_i / d image_i is wanted

    @property
    def kind(self) -> tuple[Any, ...]:
        """Calls of one kind can be computed together."""
        return self.gradient, self.images.shape[1:], self.images.dtype


Answer = tuple[Tensor, Tensor | None]  # scores [B], gradients [B, 3, H, W] if wanted


class Batches:
    """Computes calls in one thread, in the order in which they come.

    With a `size`, calls that come within `wait_s` are computed as one, of so many images at most; a call is never
    split. Without, each is computed by itself, so that its bits do not depend on the others: matrix kernels round
    differently for other batch sizes.
    """

    def __init__(self, compute: Callable[[Asked], Answer], size: int | None, wait_s: float, threads: int):
        self.compute, self.size, self.wait_s = compute, size, wait_s
        self.thread = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,))
        self.waiting: list[tuple[Asked, asyncio.Future[Answer]]] = []
        self.arrived = asyncio.Event()
        self.serving: asyncio.Task[None] | None = None

    async def run(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, in the thread that computes."""
        return await asyncio.get_running_loop().run_in_executor(self.thread, work)

    async def __call__(self, asked: Asked) -> Answer:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self.waiting.append((asked, answer))
        self.arrived.set()
        if self.serving is None or self.serving.done():
            self.serving = asyncio.create_task(self._serve())
        return await answer

    async def _serve(self) -> None:
        while self.waiting:
            await self._gather()
            await self._answer(self._take())

    async def _gather(self) -> None:
        """Wait for calls that go with the first."""
        if self.size is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(self.wait_s):
                while sum(len(asked.images) for asked, _ in self._alike()) < self.size:
                    self.arrived.clear()
                    await self.arrived.wait()

    def _alike(self) -> list[tuple[Asked, asyncio.Future[Answer]]]:
        return [call for call in self.waiting if call[0].kind == self.waiting[0][0].kind]

    def _take(self) -> list[tuple[Asked, asyncio.Future[Answer]]]:
        """The first call, and as many of those that go with it as there is room for."""
        first, *others = self._alike()
        taken, room = [first], (self.size or 0) - len(first[0].images)
        for call in others:
            room -= len(call[0].images)
            if room < 0:
                break
            taken.append(call)
        self.waiting = [call for call in self.waiting if all(call is not one for one in taken)]
        return taken

    async def _answer(self, calls: list[tuple[Asked, asyncio.Future[Answer]]]) -> None:
        try:
            scores, gradients = await self.run(lambda: self.compute(_joined([asked for asked, _ in calls])))
            start = 0
            for asked, answer in calls:
                rows = slice(start, start := start + len(asked.images))
                # Copies: a view would take all other callers' rows along when it is sent.
                copies = scores[rows].clone(), None if gradients is None else gradients[rows].clone()
                if not answer.done():  # else its caller gave up
                    answer.set_result(copies)
        except Exception as error:
            for _, answer in calls:
                if not answer.done():
                    answer.set_exception(error)


def _joined(asked: Sequence[Asked]) -> Asked:
    if len(asked) == 1:
        return asked[0]
    return Asked(
        torch.cat([one.images for one in asked]),
        [prompt for one in asked for prompt in one.prompts],
        [metadata for one in asked for metadata in one.metadata],
        asked[0].gradient,
    )
