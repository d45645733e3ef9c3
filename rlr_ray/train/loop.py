"""The training loop: the same in this process and in every worker of a cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from rlr_ray.loggers import Report
from rlr_ray.rewards.mixture import WeightedSum
from rlr_ray.train.chain_log import ChainLog
from rlr_ray.train.contents import trained_on
from rlr_ray.train.engine import Engine, Rollouts
from rlr_ray.train.learning_rate import set_learning_rate
from rlr_ray.train.online import online_surrogate
from rlr_ray.train.process import ALONE, Process
from rlr_ray.train.results import Results
from rlr_ray.train.run_folder import Recorder, RunFolder
from rlr_ray.train.state import TrainState
from rlr_ray.train.surrogate import OnlineSurrogate
from rlr_ray.train.update import update
from rlr_ray.utils.memory import MemoryBudget, memory_errors
from rlr_ray.utils.signals import Ended, after_update, asked

logger = logging.getLogger(__name__)


@memory_errors()
def train(
    engine: Engine,
    rollouts: Rollouts | None,
    report: Report,
    process: Process = ALONE,
) -> None:
    """Run a prepared run folder's updates from its newest checkpoint, if any, to the end, and leave its results there.

    Every process takes the same updates; the leading one evaluates, writes, and says what went wrong. What needs no
    gradient is run by `rollouts` (None: by this process).
    """
    config = engine.config
    folder = RunFolder(config)
    state, online, results = _start(engine, folder, process, rollouts)
    total = _shared_sum(engine, results, process)
    recorder = Recorder(folder, state.step) if process.leads else None

    def whole() -> dict[str, Any]:
        learned = {} if online is None else {"online_surrogate": online.state_dict()}
        return state.state_dict() | learned | (results.state_dict() if results else {})

    log = None if config.save_chains is None else ChainLog(engine, process, config.save_chains, state.step)
    budget = MemoryBudget(config.memory_budget_gib, engine.device, engine.held_bytes())
    stopped, _ = _verdict(engine, results, process)
    with after_update():
        while state.step < config.train.iterations and not stopped:
            row, peak = budget.run(state.step, lambda: update(engine, state, rollouts, process, online, total, log))
            row |= {} if peak is None else {"peak_memory_gib": peak}
            measured = _due(state.step, config.evaluated_every, config.train.iterations)
            stopped = measured and _judged(engine, state, results, recorder, process, row)
            stopped = _told(state, results, row) or stopped
            last = stopped or state.step == config.train.iterations
            if log is not None and (last or state.step % config.train.checkpoint_every == 0):
                log.save()  # before the checkpoint, with which a resumed run goes on
            if recorder is not None and results is not None:
                recorder.add(row, whole, results.draft if measured else None, last=last)
            report(row)
            if not last:
                _heed_signals(recorder, log, state, whole)
    if recorder is not None and results is not None:
        results.finish(recorder, process.ran_on)


def _heed_signals(
    recorder: Recorder | None, log: ChainLog | None, state: TrainState, whole: Callable[[], dict[str, Any]]
) -> None:
    """Leave a checkpoint and raise Ended if a signal asked for that."""
    name = asked()
    if name is None or recorder is None:
        return
    if log is not None:
        log.save()
    recorder.save(state.step, whole())
    raise Ended(
        f"{name} after update {state.step}, whose checkpoint is saved; `rlr-ray train --resume "
        f"{recorder.folder.path}` goes on from there"
    )


def _start(
    engine: Engine, folder: RunFolder, process: Process, rollouts: Rollouts | None
) -> tuple[TrainState, OnlineSurrogate | None, Results | None]:
    """All that there is to begin with or to go on from; only the leading process has results.

    Nothing else of the checkpoint stays in memory.
    """
    config = engine.config
    state = TrainState(engine.model.initial_theta, config.train, config.estimator, config.guards)
    online = online_surrogate(engine)
    saved = _saved(folder, process, engine.device)
    if saved:
        state.load_state_dict(saved)
        if state.step_back is not None and trained_on(saved["contents"]) != trained_on(folder.contents):
            state.step_back.forget()
        if online is not None:
            online.load_state_dict(saved["online_surrogate"])
    measured = set_learning_rate(engine, state, process)
    if process.leads:
        notes = [f"going on from update {state.step}" if saved else "", engine.prompt_note()]
        notes += [f"learning rate {state.rate:g}, measured (train.learning_rate: auto)"] if measured else []
        for note in filter(None, notes):
            logger.info(note)
    results = None
    if process.leads:
        results = Results(engine, folder, state, saved, rollouts)
        if not saved:
            results.begin()
    return state, online, results


def _shared_sum(engine: Engine, results: Results | None, process: Process) -> WeightedSum:
    """The sum of rewards that every process maximises, standardised by the leading process's evaluation."""
    total = results.total if results else engine.rewards.weighted_sum()
    if not any(engine.rewards.normalized):
        return total
    standards = torch.tensor(total.standards, dtype=torch.float64, device=engine.device)
    shared = process.reduce(standards if process.leads else torch.zeros_like(standards))
    return replace(total, standards=tuple((mean, deviation) for mean, deviation in shared.tolist()))


def _verdict(engine: Engine, results: Results | None, process: Process) -> tuple[bool, bool]:
    """Whether the leading process ends the run before its time, and whether held-out chains are beyond kl_stop."""
    if not engine.config.guards.may_stop:
        return False, False
    verdict = [results.stopped, results.guards.too_far] if results else [False, False]
    stops, too_far = process.reduce(torch.tensor(verdict, dtype=torch.float32, device=engine.device)).tolist()
    return bool(stops), bool(too_far)


def _judged(
    engine: Engine,
    state: TrainState,
    results: Results | None,
    recorder: Recorder | None,
    process: Process,
    row: dict[str, Any],
) -> bool:
    """Evaluate; whether the run ends by that. Steps back from beyond guards.kl_stop."""
    if recorder is not None and results is not None:
        row |= results.measure()
        recorder.loggers.evaluation(row["step"], results.latest.images)
    stops, too_far = _verdict(engine, results, process)
    if engine.config.guards.kl_stop is not None and not stops:
        row["stepped_back"] += int(state.watch_divergence(too_far=too_far))
    return stops


def _told(state: TrainState, results: Results | None, row: dict[str, Any]) -> bool:
    """Log a step back; whether it was the last that there may be."""
    if not row["stepped_back"] or state.step_back is None:
        return False
    reason = state.step_back.stopped
    if results is not None:
        rate = f"the learning rate is {state.step_back.cut:.3g} of the recipe's now"
        logger.info(f"stepped back {state.step_back.told}; {rate}")
        results.guards.stopped = reason or results.guards.stopped
    return reason is not None


def _saved(folder: RunFolder, process: Process, device: torch.device) -> dict[str, Any] | None:
    """The state to go on from: the leading process finds it, the others read that same one. None at the start."""
    newest = folder.checkpoints.load(device) if process.leads else None
    step = int(process.reduce(torch.tensor([float(newest["step"]) if newest else 0.0], device=device)))
    return newest if process.leads or not step else folder.checkpoints.load_at(step, device)


def _due(step: int, every: int | None, last: int) -> bool:
    return every is not None and step % every == 0 and step < last
