"""Peak memory of a piece of work, and a run's memory budget."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import torch

from rlr_ray.errors import OutOfMemory, UserError, first_line

GIB = 2**30
Result = TypeVar("Result")


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Bytes that torch's allocator handed out at the worst moment of `work`, beyond what was held before it.

    On CUDA the caching allocator counts them; on CPUs the profiler traces every allocation, as exactly, but not what
    libraries below torch take for themselves.
    """
    return _cuda_peak(work, device) if device.type == "cuda" else _cpu_peak(work)


def _cuda_peak(work: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(work: Callable[[], Any]) -> int:
    """Traces allocations as `torch.profiler.profile` does, without operators, whose events would take half a GiB.

    Garbage waits meanwhile: what an earlier measurement left of it would count against this one.
    Raises UserError with a torch that has none of this.
    """
    try:
        from torch._C._profiler import ProfilerActivity, RecordScope  # torch's own, so it may change: only here
        from torch.autograd import _disable_profiler, _enable_profiler, _prepare_profiler
        from torch.autograd.profiler import profile
    except ImportError as error:
        raise UserError(
            f"torch {torch.__version__} cannot count the memory of CPUs as torch 2.6 to 2.13 do ({error}); install the "
            "torch of constraints.txt, leave out memory_budget_gib, or measure on a GPU"
        ) from error
    collecting = gc.isenabled()
    gc.disable()
    settings, only = profile(profile_memory=True).config(), {ProfilerActivity.CPU}
    _prepare_profiler(settings, only)
    _enable_profiler(settings, only, {RecordScope.USER_SCOPE})  # type: ignore[call-arg]
    try:
        work()
    finally:
        result = _disable_profiler()
        if collecting:
            gc.enable()
    events = [event for event in result.events() if event.name() == "[memory]"]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events)  # type: ignore[attr-defined]
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    return peak


def free_bytes(device: torch.device) -> int:
    """Bytes that tensors may still take on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return int(psutil.virtual_memory().available)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raise OutOfMemory where a GPU's memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"the GPU's memory ran out ({first_line(error)}); {_REMEDY}",
            torch.cuda.max_memory_allocated() / GIB,
        ) from error


class MemoryBudget:
    """Holds a process to `memory_budget_gib`, and finds the peak.

    On CUDA the allocator refuses more than the budget. On CPUs nothing can, short of counting what Python and Ray map
    too: there the updates 0, 1, 2, 4, 8 ... of a process are traced, and one that took more ends the run.
    """

    def __init__(self, gib: float | None, device: torch.device, held: int):
        self.gib, self.device, self.held = gib, device, held  # bytes that stay loaded
        self.updates = 0  # in this process
        if gib is not None and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total), device)

    def run(self, step: int, work: Callable[[], Result]) -> tuple[Result, float | None]:
        """Do the work; its result, and the peak of the process's tensors in GiB, None for an update that is not traced.

        Raises OutOfMemory if it is over the budget.
        """
        number, self.updates = self.updates, self.updates + 1
        if self.gib is None or (self.device.type == "cpu" and number & (number - 1)):
            return work(), None
        results: list[Result] = []
        peak = (self.held + peak_bytes(lambda: results.append(work()), self.device)) / GIB
        if peak > self.gib:
            raise OutOfMemory(
                f"update {step} took {peak:.4g} GiB, but memory_budget_gib is {self.gib:g}; raise it, or {_REMEDY}",
                peak,
            )
        return results[0], peak


_REMEDY = (
    "lower train.chunk_size or estimator.zeroth_order.chunk_size, set estimator.checkpoint_steps or "
    "model.gradient_checkpointing: true, or lower estimator.sub_chain.length"
)
