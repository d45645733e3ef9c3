"""One process a run: a lock that the kernel frees when its holder ends, however it ends."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from rlr_ray.config import RunConfig
from rlr_ray.disk import replace_file
from rlr_ray.errors import UserError


@contextmanager
def locked(config: RunConfig) -> Iterator[None]:
    """Keep every other process from the run of this name until the block ends. Raises UserError if one has it.

    The lock lies beside the run's folder, so that it outlives a run that is overwritten.
    """
    folder = config.folder.resolve()  # one lock, by whichever links it is reached
    file, holder = (folder.with_name(f".{folder.name}.{kind}") for kind in ("lock", "holder"))
    lock = FileLock(file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        me = {"process": os.getpid(), "host": platform.node(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        replace_file(holder, lambda part: part.write_text(json.dumps(me), "utf-8"))
    except Timeout:
        raise UserError(
            f"the run {folder} is held by {_told(holder)}; wait for it or end it, or start another run with "
            "--set name=..."
        ) from None
    except OSError as error:
        lock.release()
        raise UserError(
            f"the run {folder} could not be locked: {error}; make room in {folder.parent}, or set output_dir to a "
            "folder that you may write"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _told(holder: Path) -> str:
    try:
        other = json.loads(holder.read_text("utf-8"))
    except OSError:  # it has the lock and is about to say so
        return "another process"
    return f"process {other['process']} on {other['host']} since {other['since']}"
