"""Waiting for actors to be ready for work."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import ray
from ray.exceptions import RayActorError, RayTaskError, RuntimeEnvSetupError

from rlr_ray.errors import UserError

_RETURN_S = 3.0  # until an actor that died is asked again


def await_ready(ready: Mapping[str, Callable[[], ray.ObjectRef]], tries: int, remedy: str) -> None:
    """Wait for all of them, each by what it is called; one that dies, Ray starts again.

    Raises UserError if one cannot start, or died `tries` times; `remedy` is what may help then.
    """
    calls = {name: ask() for name, ask in ready.items()}  # all at once
    for name, call in calls.items():
        _await(name, call, ready[name], tries, remedy)


def _await(name: str, call: ray.ObjectRef, ask: Callable[[], ray.ObjectRef], tries: int, remedy: str) -> None:
    for _ in range(tries):
        try:
            ray.get(call)
            return
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise UserError(f"{name} cannot start: {error}") from error
        except RuntimeEnvSetupError as error:
            raise UserError(f"{name} cannot start in its environment: {error}") from error
        except RayActorError:
            time.sleep(_RETURN_S)
            call = ask()
    raise UserError(f"{name} died {tries} times while it started; {remedy}")
