"""Settings that Python, numpy and torch have once for a whole process, kept apart for a user's code."""

from __future__ import annotations

import logging
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch

Setting = tuple[Callable[[], Any], Callable[[Any], Any]]  # how it is read, and how it is set


def _attribute(owner: Any, name: str) -> Setting:
    return partial(getattr, owner, name), partial(setattr, owner, name)


def _random_of_numpy() -> tuple[Any, ...]:
    kind, words, *rest = np.random.get_state()
    return kind, np.asarray(words).tobytes(), *rest


def _set_random_of_numpy(state: tuple[Any, ...]) -> None:
    kind, words, *rest = state
    np.random.set_state((kind, np.frombuffer(words, np.uint32), *rest))


def _device() -> torch.device | None:
    """None: none was set, which is not the same as the CPU."""
    device = torch.get_default_device()
    return None if device == torch.device("cpu") else device


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


_SETTINGS: dict[str, Setting] = {
    "working folder": (os.getcwd, os.chdir),
    "silenced levels of logging": (lambda: logging.root.manager.disable, logging.disable),
    "numpy's errors": (np.geterr, lambda errors: np.seterr(**errors)),
    "default type": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (_device, torch.set_default_device),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "anomaly mode": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "determinism": (_deterministic, lambda how: torch.use_deterministic_algorithms(how[0], warn_only=how[1])),
    "cuDNN's choice": _attribute(torch.backends.cudnn, "benchmark"),
    "precision of cuBLAS": _attribute(torch.backends.cuda.matmul, "fp32_precision"),
    "precision of cuDNN": _attribute(torch.backends.cudnn.conv, "fp32_precision"),  # type: ignore[attr-defined]
    "precision of the CPU": _attribute(torch.backends.mkldnn.matmul, "fp32_precision"),  # type: ignore[attr-defined]
    "random": (random.getstate, random.setstate),
    "numpy.random": (_random_of_numpy, _set_random_of_numpy),
    "torch's generator": (
        lambda: torch.get_rng_state().numpy().tobytes(),
        lambda state: torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
    ),
}
_changed: dict[str, dict[str, Any]] = defaultdict(dict)  # by whose code: the settings that it changed, as it left them


@contextmanager
def apart(whose: str) -> Iterator[None]:
    """Let a user's code set what it likes: outside the block all is as before, and in its next block as it left it.

    Whether gradients are recorded is the caller's at each beginning. os._exit raises SystemExit, as sys.exit does.
    """
    changed, recording, leave = _changed[whose], torch.is_grad_enabled(), os._exit
    before = {name: read() for name, (read, _) in _SETTINGS.items()}
    _set(changed)
    inside = before | changed
    os._exit = partial(_raise_exit, os.getpid(), leave)
    try:
        yield
    finally:
        os._exit = leave
        torch.set_grad_enabled(recording)
        after = {name: read() for name, (read, _) in _SETTINGS.items()}
        changed.update({name: value for name, value in after.items() if value != inside[name]})
        _set({name: value for name, value in before.items() if value != after[name]})


def _set(values: dict[str, Any]) -> None:
    for name, value in values.items():
        _SETTINGS[name][1](value)


def _raise_exit(process: int, leave: Callable[[int], NoReturn], status: int) -> NoReturn:
    """In the process that runs the user's code; one that it forked ends as it means to."""
    if os.getpid() != process:
        leave(status)
    raise SystemExit(status)
