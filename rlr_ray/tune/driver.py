"""A trial on the cluster as a driver of its own, which ends with the trial; then Ray frees all that the run had.

A placement group that an actor made lives as long as its job (ray-project/ray#54305). In the search's own job, the
places of a stopped trial's workers and rollout actors would stay taken until the search ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection, Pipe

import ray

from rlr_ray.cluster.resources import enter
from rlr_ray.cluster.run import run
from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.loggers import Report
from rlr_ray.train.run_folder import RunFolder, locked

_END_S = 60.0  # for a run whose trial is stopped to shut its workers down
_ROOM_S = 3600.0  # for trials that end to make room, and for nodes to come


def run_here(config: RunConfig, report: Report) -> None:
    """Train, or go on, as a driver in this process."""
    folder = RunFolder(config)
    resume = folder.holds_run
    with locked(config.folder):
        if resume:
            folder.check(resume=True, overwrite=False)
        run(config, report, lambda: folder.begin(resume=resume))


def run_as_driver(config: RunConfig, report: Report) -> None:
    """Train on the Ray of this process, as a driver of its own. Raises what the run raised."""
    assert config.cluster != "none"
    # The environment has this Ray's address; other trials need time to make room.
    cluster = config.cluster.model_copy(update={"address": None, "wait_s": _ROOM_S})
    here, there = Pipe()
    command = [sys.executable, "-m", "rlr_ray.tune.driver", str(there.fileno())]
    child = subprocess.Popen(command, pass_fds=[there.fileno()], env=_environment())
    there.close()
    try:
        here.send((config.model_copy(update={"cluster": cluster}), os.getcwd()))
        while (news := here.recv()) is not None:
            if isinstance(news, BaseException):
                raise news
            report(news)
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(f"the process of the run ended with exit status {child.wait()}") from error
    finally:
        here.close()  # which interrupts a run that has not ended
        child.wait()


def _environment() -> dict[str, str]:
    """Of a driver that finds this Ray, and whose workers find what those of this job do."""
    context = ray.get_runtime_context()
    job = {"runtime_env": {key: value for key, value in context.runtime_env.items() if key != "env_vars"}}
    return dict(os.environ) | {"RAY_ADDRESS": context.gcs_address, "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps(job)}


def _main(connection: Connection) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray's processes block it, and children inherit that
    config, folder = connection.recv()
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    enter(folder)
    try:
        run_here(config, connection.send)
    except Exception as error:
        connection.send(error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}"))
    else:
        connection.send(None)


def _end_with(connection: Connection) -> None:
    """Interrupt this process as Ctrl-C does when its trial is no more."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(_END_S)
        os._exit(1)


if __name__ == "__main__":
    _main(Connection(int(sys.argv[1])))
