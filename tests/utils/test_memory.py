"""Peaks against known allocations, and runs held to a budget."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import torch

from rlr_ray.cluster.run import run
from rlr_ray.errors import OutOfMemory, UserError
from rlr_ray.train.run_folder import RunFolder
from rlr_ray.utils.memory import GIB, MemoryBudget, peak_bytes
from tests.runs import small_run

CPU = torch.device("cpu")
MIB = 2**20


def megabytes(count: int) -> torch.Tensor:
    return torch.empty(count * MIB, dtype=torch.uint8)


def test_the_peak_is_what_was_held_at_the_worst_moment() -> None:
    def work() -> None:
        first = megabytes(3)
        second = megabytes(2)  # 5 are held
        del first, second
        third = megabytes(4)
        del third

    assert peak_bytes(work, CPU) == 5 * MIB


def test_what_an_earlier_measurement_left_as_garbage_does_not_count() -> None:
    """A circle that the collector would meet while the work makes objects."""

    def leave() -> None:
        circle: list[object] = [megabytes(8)]
        circle.append(circle)
        gc.collect(0)  # it outlives the first collections

    def work() -> None:
        kept = [[i] for i in range(50_000)], megabytes(2)
        del kept

    assert peak_bytes(leave, CPU) == 8 * MIB
    assert peak_bytes(work, CPU) == 2 * MIB
    assert gc.isenabled()


def test_what_backpropagation_holds_counts() -> None:
    """Each of 8 multiplications by itself keeps its input of 1 MiB until the way back."""
    start = torch.ones(MIB // 4, requires_grad=True)

    def work() -> None:
        value = start
        for _ in range(8):
            value = value * value
        value.sum().backward()

    assert 8 * MIB <= peak_bytes(work, CPU) <= 11 * MIB  # and the gradients of the last one
    start.grad = None


def test_updates_in_between_are_not_traced_and_one_over_the_budget_ends_the_run() -> None:
    budget = MemoryBudget(4 * MIB / GIB, CPU, held=MIB)
    peaks = [budget.run(step, lambda: megabytes(2))[1] for step in range(50, 58)]  # of a run that was resumed
    assert [peak and peak * GIB / MIB for peak in peaks] == [3, 3, 3, None, 3, None, None, None]
    with pytest.raises(OutOfMemory, match=r"update 58 took .* but memory_budget_gib is") as caught:
        budget.run(58, lambda: megabytes(5))
    assert caught.value.peak_gib == 6 * MIB / GIB


def trained(folder: Path, budget_gib: float) -> float:
    config = small_run(folder, memory_budget_gib=budget_gib)
    run(config, lambda row: None, lambda: RunFolder(config).begin(resume=False))
    summary = json.loads((config.folder / "summary.json").read_text())
    peak: float = summary["peak_memory_gib"]
    return peak


def test_a_run_ends_if_and_only_if_it_needs_more_than_its_budget(tmp_path: Path) -> None:
    peak = trained(tmp_path / "enough", 1.0)
    assert trained(tmp_path / "just", 1.001 * peak) == pytest.approx(peak, rel=1e-3)
    with pytest.raises(OutOfMemory) as caught:
        trained(tmp_path / "less", 0.99 * peak)
    assert 0.99 * peak < caught.value.peak_gib <= peak  # an update before the one that needs most


def test_a_torch_that_counts_otherwise_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._C._profiler", None)  # importing it now fails
    with pytest.raises(UserError, match=r"cannot count the memory of CPUs .*leave out memory_budget_gib"):
        peak_bytes(lambda: None, CPU)
