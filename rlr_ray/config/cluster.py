"""The `cluster` key of a recipe: the resources that a run asks of Ray."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlr_ray.config.base import Strict

Resources = dict[str, float]


class Role(Strict):
    """Resources of one process of a role. CPUs and GPUs may be fractions; `resources` are others of Ray's, by name."""

    cpus: float = Field(1, ge=0, allow_inf_nan=False)  # of one process, a fraction too
    gpus: float = Field(0, ge=0, allow_inf_nan=False)  # of one process, a fraction too; 0: none
    # Others of Ray's, by name: {trainer: 1} is a process on nodes that have it
    resources: Resources = Field(default_factory=dict)

    @field_validator("resources")
    @classmethod
    def _named(cls, resources: Resources) -> Resources:
        wrong = [kind for kind, amount in resources.items() if kind in ("CPU", "GPU") or not amount > 0]
        if wrong:
            raise ValueError(f"found {wrong}; allowed: names other than CPU and GPU (cpus, gpus), amounts above 0")
        return resources

    @property
    def demand(self) -> Resources:
        """Ray's resources for one process, those of 0 left out."""
        resources = {"CPU": self.cpus, "GPU": self.gpus} | self.resources
        return {kind: amount for kind, amount in resources.items() if amount}


class WorkerConfig(Role):
    """What one of the TorchTrainer's workers takes; CPUs and GPUs may be fractions."""

    # The denoiser's frozen weights lie in parts on the workers, each block gathered while it computes (FSDP2): for
    # bases that do not fit one device. Needs plain LoRA on linear layers; rollout actors hold the whole base
    shard: bool = False


class WorkerRange(Strict):
    """Elastic training: as many workers as the cluster has room for."""

    min: int = Field(1, ge=1)  # workers without which the run does not start
    max: int = Field(ge=1)  # workers at most

    @model_validator(mode="after")
    def _ordered(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError(f"found min {self.min} above max {self.max}; allowed: min up to max")
        return self


class RolloutsConfig(Role):
    """The pool of actors that run what needs no gradient; it grows and shrinks while the run goes on."""

    cpus: float = Field(0.5, ge=0, allow_inf_nan=False)  # of one actor
    min_actors: int = Field(1, ge=0)  # the run starts once these are there
    max_actors: int = Field(2, ge=0)  # actors at most; 0: workers do their work, too
    # Share of an update's perturbation pairs that it waits for. 1: all, so the update repeats bit for bit; lower: it
    # goes on without late ones, which costs variance
    quorum: float = Field(1.0, gt=0, le=1)
    hedge_after: float | None = Field(3.0, gt=1, allow_inf_nan=False)  # medians until an idle actor runs a chunk too
    timeout_s: float = Field(600, gt=0, allow_inf_nan=False)  # of one chunk, then its actor is ended
    # Of actors' frozen weights; None: as model.dtype, and then the same bits as in one process
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    compile: bool = False  # actors' denoiser by torch.compile, whatever model.compile is
    # By how much of their size chains of actors with such keys may end away from the workers' when the run starts
    tolerance: float = Field(0.05, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _ordered(self) -> RolloutsConfig:
        if self.min_actors > self.max_actors:
            raise ValueError(
                f"found min_actors {self.min_actors} above max_actors {self.max_actors}; allowed: min_actors up to "
                "max_actors"
            )
        return self


class ClusterConfig(Strict):
    address: str | None = None  # of a running Ray; None: RAY_ADDRESS, else a local one is started
    workers: Annotated[int, Field(ge=1)] | WorkerRange = 1  # of the TorchTrainer
    worker: WorkerConfig = WorkerConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    max_failures: int = Field(3, ge=0)  # restarts of the training workers without a new update between them
    stall_s: float = Field(3600, gt=0, allow_inf_nan=False)  # without an update until a run is taken to hang
    wait_s: float = Field(15, gt=0, allow_inf_nan=False)  # for the cluster to have room; minutes if it has to grow

    @property
    def worker_range(self) -> WorkerRange:
        if isinstance(self.workers, WorkerRange):
            return self.workers
        return WorkerRange(min=self.workers, max=self.workers)
