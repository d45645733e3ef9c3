"""Keys of a cluster that do not go together, refused when the config loads."""

from __future__ import annotations

import math

from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError


def check_cluster(config: RunConfig) -> None:
    """Raise UserError for the first combination that does not work."""
    for check in (_reward_patience, _reward_actors, _devices, _workers, _shard, _actors_otherwise):
        check(config)


def _reward_actors(config: RunConfig) -> None:
    if config.cluster == "none" and config.remote_rewards:
        label = next(iter(config.remote_rewards))
        key = f"rewards.{label}" if label in config.rewards else f"evaluation.judges.{label}"
        raise UserError(
            f"{key}.actors asks for Ray actors, but cluster is 'none'; allowed: a cluster, e.g. cluster: {{}} for a "
            "Ray on this machine; or leave actors out, and the reward is in this process"
        )


def _reward_patience(config: RunConfig) -> None:
    """A reward that hangs must be told of before the rollouts that wait for it are taken to hang."""
    if config.cluster == "none" or config.chooses_plan or not config.needs_actors:
        return
    limit = config.cluster.rollouts.timeout_s
    for label, reward in config.rewards.items():
        if reward.actors and reward.actors.timeout_s >= limit:
            raise UserError(
                f"rewards.{label}.actors.timeout_s is {reward.actors.timeout_s:g}, but rollouts that ask the reward "
                f"are ended after cluster.rollouts.timeout_s, {limit:g}; allowed: below that; lower the one or "
                "raise the other"
            )


def _devices(config: RunConfig) -> None:
    if config.cluster == "none":
        return
    for key, role in (("worker", config.cluster.worker), ("rollouts", config.cluster.rollouts)):
        if config.device == "cuda" and not role.gpus:
            raise UserError(
                f"device is 'cuda', but cluster.{key}.gpus is 0; allowed: a number above 0, e.g. 1; or set device: "
                "auto, which uses a GPU in the roles that have one"
            )
        if config.device == "cpu" and role.gpus:
            raise UserError(f"device is 'cpu', but cluster.{key}.gpus is {role.gpus:g}; set it to 0, or device: auto")


def _workers(config: RunConfig) -> None:
    if config.cluster == "none":
        return
    if not config.cluster.worker.demand:
        raise UserError("cluster.worker takes nothing, but Ray Train's workers need something; set its cpus above 0")
    most, gpus = config.cluster.worker_range.max, config.cluster.worker.gpus
    key = "train.sampling_size" if config.train.sampling_size else "train.chunk_size"
    shares = math.ceil(config.train.chains / (config.train.sampled_together * config.train.chunk_size))
    if most > shares:
        raise UserError(
            f"cluster.workers is {most}, but an update has {shares} chunks to share (train.chains / {key}); allowed: "
            f"1 to {shares}; lower cluster.workers or {key}"
        )
    if most > 1 and 0 < gpus < 1:
        raise UserError(
            f"cluster.worker.gpus is {gpus:g} for {most} workers, but NCCL refuses two workers on one GPU; set it to "
            "1, or cluster.workers: 1"
        )


def _shard(config: RunConfig) -> None:
    """Blocks' weights come and go: what reads them otherwise, or in one process, does not work."""
    if config.cluster == "none" or not config.cluster.worker.shard:
        return
    adapter = config.adapter
    wrong = {
        f"adapter.type is {adapter.type!r}": ("set adapter.type: LORA", adapter.type != "LORA"),
        "adapter.use_dora is true, which reads the base's weights": (
            "leave it out",
            bool(adapter.options.get("use_dora")),
        ),
        "adapter.from is set, which is read into whole weights": ("leave it out", adapter.from_ is not None),
        "model.compile is true": ("set model.compile: false", config.model.compile),
        "model.quantization is set, whose weights cannot be cut": ("leave it out", config.model.quantization),
        "estimator.preset is 'measure', which measures in one process": (
            "name a preset, or set estimator.preset: auto",
            config.chooses_plan,
        ),
    }
    for said, (remedy, is_so) in wrong.items():
        if is_so:
            raise UserError(
                f"cluster.worker.shard is true, but {said}; allowed: plain LoRA on linear layers, not compiled, with a "
                f"plan that is stated; {remedy}, or set cluster.worker.shard: false"
            )


def _actors_otherwise(config: RunConfig) -> None:
    """Actors that compute otherwise are to be there: no worker draws their chains."""
    if config.cluster == "none" or config.cluster.rollouts.max_actors or not config.actors_differ:
        return
    raise UserError(
        "cluster.rollouts.dtype or compile says how actors compute, and max_actors is 0, so there are none; leave them "
        "out, or raise cluster.rollouts.max_actors"
    )
