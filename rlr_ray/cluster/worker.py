"""What every TorchTrainer worker runs."""

from __future__ import annotations

from typing import Any

import ray
import ray.train
import torch.distributed
from torch import Tensor

from rlr_ray.cluster.folder import enter
from rlr_ray.config import RunConfig
from rlr_ray.engine import Engine
from rlr_ray.errors import UserError
from rlr_ray.loop import Process, train


def run_worker(loop_config: dict[str, Any]) -> None:
    """Train with the other workers. A user's error ends the run instead of being retried."""
    config: RunConfig = loop_config["config"]
    context = ray.train.get_context()
    mailbox = loop_config["mailbox"]
    if ray.get(mailbox.failure.remote()):  # restarted after a user's error
        return

    def report(row: dict[str, Any]) -> None:
        if context.get_world_rank() == 0:
            mailbox.put.remote(row)
        if (row["step"] + 1) % config.train.checkpoint_every == 0:  # a report costs about 0.1 s: not every update
            ray.train.report({name: value for name, value in row.items() if isinstance(value, int | float)})

    process = Process(context.get_world_rank(), context.get_world_size(), _all_reduce, loop_config["ran_on"])
    try:
        enter(loop_config["folder"])
        train(Engine(config), loop_config["rollouts"], report, process, mailbox.say.remote)
    except UserError as error:
        ray.get(mailbox.fail.remote(str(error)))
        if process.size > 1:
            raise  # the others wait for this worker's share: Ray Train ends them


def _all_reduce(value: Tensor) -> Tensor:
    total = value.clone()
    torch.distributed.all_reduce(total)
    return total
