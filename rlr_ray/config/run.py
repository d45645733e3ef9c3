"""The typed configuration of a run: unknown keys are refused, ranges are checked when it loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlr_ray.config.base import FREE, Strict
from rlr_ray.config.cluster import ClusterConfig
from rlr_ray.config.estimator import DcotConfig, EstimatorConfig, Weight, in_keys
from rlr_ray.config.evaluation import EvaluationConfig
from rlr_ray.config.guards import GuardsConfig
from rlr_ray.config.model import AdapterConfig, ModelConfig, SamplerConfig
from rlr_ray.config.prompts import PromptsConfig, Source, check_texts
from rlr_ray.config.rewards import Judges, Rewards
from rlr_ray.config.short_forms import by_name, written_out
from rlr_ray.config.train import TrainConfig
from rlr_ray.core.forward_term import forward_steps, output_weight
from rlr_ray.core.plan import Plan, Position
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.schedule import Schedule
from rlr_ray.utils.environment import path_of


class RunConfig(Strict):
    name: Annotated[str, FREE] = Field(pattern=r"^\w[\w.-]*$")  # of the run, and of its folder in output_dir
    output_dir: Annotated[str, FREE] = "runs"  # folder of all runs
    seed: int = 0  # of every random number: chains, plans, perturbations, prompts
    # auto: a GPU where there is one, on a cluster where a role has a share of one
    device: Annotated[Literal["auto", "cpu", "cuda"], FREE] = "auto"
    threads: int = Field(1, ge=1)  # CPU threads a process; fixed, since they change the last bits
    model: ModelConfig  # the diffusion model
    adapter: AdapterConfig = AdapterConfig()
    sampler: SamplerConfig = SamplerConfig()  # how its chains are drawn
    rewards: Rewards = Field(min_length=1)  # by label; or one, as `reward`
    prompts: Source | PromptsConfig  # what chains are drawn for
    dcot: DcotConfig | None = None  # for prompts with a part for each range of steps: where the ranges begin
    estimator: EstimatorConfig = EstimatorConfig()  # how the gradient of the reward is estimated
    train: TrainConfig = TrainConfig()  # the updates
    evaluation: EvaluationConfig = EvaluationConfig()  # held-out chains, which no update uses
    guards: GuardsConfig = GuardsConfig()
    # What the run asks of Ray; none: it is one process
    cluster: Annotated[Literal["none"] | ClusterConfig, FREE] = ClusterConfig()
    # Where numbers and pictures go: names, or their options by name; see docs/loggers.md
    loggers: Annotated[dict[str, dict[str, Any]], FREE] = {"parquet": {}, "tensorboard": {}}  # noqa: RUF012
    # GiB of chains that the run keeps beside its results, the newest: chains/*.parquet, prompt, seed, rewards and last
    # latent of each; null: none
    save_chains: Annotated[float | None, FREE] = Field(None, gt=0, allow_inf_nan=False)
    # Files of a LoRA beside diffusers' own: comfyui, lora/comfyui.safetensors, for programs that read tensors alone
    save_also: Annotated[list[Literal["comfyui"]], FREE] = Field(default_factory=list)
    # Of a process; a run that needs more ends, saying so
    memory_budget_gib: Annotated[float | None, FREE] = Field(None, gt=0)

    @field_validator("prompts", mode="before")
    @classmethod
    def _prompts_are_texts(cls, prompts: Any) -> Any:
        return check_texts(prompts)

    @property
    def folder(self) -> Path:
        return path_of(self.output_dir).absolute() / self.name

    @property
    def sampled_at_once(self) -> int:
        """Chains of an evaluation."""
        return self.evaluation.chunk_size or self.train.chunk_size

    @property
    def evaluated_every(self) -> int | None:
        """Updates between two evaluations."""
        every = self.evaluation.every
        return math.ceil(self.train.iterations / 4) if every == "auto" else every

    @property
    def chooses_plan(self) -> bool:
        """True if the plan is yet to be chosen by measurement; until then its shape owns no step."""
        return self.estimator.preset == "measure"

    @property
    @in_keys()
    def plan_shape(self) -> PlanShape:
        estimator, half_order, steps = self.estimator, self.estimator.half_order, self.sampler.steps
        use = estimator.surrogate.use if estimator.surrogate else None
        return PlanShape(
            steps,
            steps if estimator.first_order.steps == "all" else estimator.first_order.steps,
            estimator.sub_chain.length if half_order.score != "forward" else 0,
            self._place,
            estimator.rest,
            estimator.sub_chain.count,
            estimator.truncation,
            residual=use == "residual",
            mixed=use != "residual" and self.mixed,
            score=half_order.score,
            branch_steps=None if half_order.branch_steps == "all" else half_order.branch_steps,
            draws=half_order.draws,
            linear=estimator.first_order.adjoint == "linear",
            switch=use == "switch" and bool(self.black_box),
        )

    @in_keys()
    def shape_on(self, schedule: Schedule) -> PlanShape:
        """The plan's shape on the model's schedule, whose last steps may be the base model's.

        Raises UserError if a sub-chain does not fit before them, or half order has no noise or weight at a step.
        """
        shape = self.plan_shape.without_last(self.adapter.steps_off(schedule))
        if shape.score == "forward":
            half_order = self.estimator.half_order
            steps = forward_steps(schedule, *half_order.signal, stop=shape.trained)
            for k in steps:
                output_weight(schedule, k, half_order.weighting)
            shape = replace(shape, forward_steps=steps)
        shape.check_noise(schedule)
        return shape

    @property
    def _place(self) -> Position:
        """The position of sub-chains, a stage of dcot as its range."""
        ranges: dict[Any, Any] = self.dcot.ranges(self.sampler.steps) if self.dcot else {}
        place: Position = ranges.get(self.estimator.sub_chain.place, self.estimator.sub_chain.place)
        return place

    @property
    def baseline_size(self) -> int:
        """Chains of an update that share a baseline."""
        return self.train.chains_per_prompt if self.estimator.half_order.by_prompt else self.train.chains

    @property
    def differentiable(self) -> bool:
        """True if every reward has a gradient."""
        return not self.black_box

    @property
    def remote_rewards(self) -> Judges:
        """Rewards and judges that have actors of their own."""
        rewards: Judges = {**self.rewards, **self.evaluation.judges}
        return {label: reward for label, reward in rewards.items() if reward.actors is not None}

    @property
    def black_box(self) -> list[str]:
        """Labels of the rewards without a gradient."""
        return [label for label, reward in self.rewards.items() if not reward.has_gradient]

    @property
    def mixed(self) -> bool:
        """True if some rewards have a gradient and some have none."""
        return 0 < len(self.black_box) < len(self.rewards)

    @property
    def guided(self) -> bool:
        """True if zeroth order looks along a few directions only."""
        return self.plan_shape.has_zeroth_order and self.estimator.zeroth_order.directions == "guided"

    @property
    def weights(self) -> dict[str, Weight]:
        """The stated weights of the terms that the plan has, beside first order's 1."""
        stated: dict[str, Weight] = {
            "half_order": self.estimator.half_order.weight,
            "zeroth_order": self.estimator.zeroth_order.weight,
        }
        return {name: weight for name, weight in stated.items() if getattr(self.plan_shape, f"has_{name}")}

    @property
    def biased(self) -> bool:
        """True if the estimate's expectation is not the whole gradient: by steps left out, a span, or a weight."""
        clipped = self.estimator.first_order.clip is not None and self.plan_shape.first_order_steps > 0
        clipped |= self.estimator.zeroth_order.clip is not None and self.plan_shape.has_zeroth_order
        return clipped or self.plan_shape.biased or self.guided or any(weight != 1 for weight in self.weights.values())

    def cost(self, plans: Sequence[Plan], *, checkpoint_steps: bool | None = None) -> tuple[int, int]:
        """Denoiser forwards and backwards, counted per chain, of an update whose chunks have these plans.

        `checkpoint_steps` is what an engine measured, if that is to be.
        """
        size, pulled = self.train.chains // len(plans), self.estimator.half_order.pull > 0
        checkpoint_steps = self.estimator.checkpointed if checkpoint_steps is None else checkpoint_steps
        pairs = self.estimator.zeroth_order.count * plans[0].pair_forwards
        forwards = sum(size * plan.forwards(checkpoint_steps, pulled=pulled) for plan in plans) + pairs
        compared = self.train.chains * self.compared_steps
        backwards = sum(size * plan.backwards for plan in plans) + compared
        again = backwards if self.model.gradient_checkpointing else 0
        forwards += 2 * self.train.looked_at if self.train.max_change is not None else 0
        return forwards + 2 * compared + again, backwards

    @property
    def actors_sample(self) -> bool:
        """True if rollout actors, where there are any, draw the very chains of a worker: on the same kind of device."""
        return self.cluster == "none" or bool(self.cluster.worker.gpus) == bool(self.cluster.rollouts.gpus)

    @property
    def on_actors(self) -> RunConfig:
        """This config for rollout actors."""
        if self.cluster == "none":
            return self
        asked = self.cluster.rollouts
        model = {"dtype": asked.dtype or self.model.dtype, "compile": asked.compile or self.model.compile}
        return self.on(asked.gpus).model_copy(update={"model": self.model.model_copy(update=model)})

    @property
    def actors_differ(self) -> bool:
        """True if rollout actors compute otherwise than workers, so that their chains have other bits."""
        return self.on_actors.model != self.model

    @property
    def needs_actors(self) -> bool:
        """True if updates have work for rollout actors: perturbation pairs, or chains sampled without a gradient."""
        if self.cluster != "none" and not self.cluster.rollouts.max_actors:
            return False
        return self.chooses_plan or self.plan_shape.has_zeroth_order or (self.samples and self.actors_sample)

    @property
    def samples(self) -> bool:
        """True if some update samples steps without a gradient, as it may until a surrogate is trusted."""
        shape = self.plan_shape
        not_all = shape.linear or shape.truncation != "fixed" or shape.first_order_steps < shape.trained
        return not_all or shape.residual or shape.switch

    @property
    def compared_steps(self) -> int:
        """Steps an update at which chains are compared with the base model's."""
        drawn, steps = self.guards.kl_steps, self.sampler.steps
        return (steps if drawn == "all" else drawn or min(2, steps)) if self.guards.kl_penalty else 0

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, values: Any) -> Any:
        return written_out(values)

    @field_validator("loggers", mode="before")
    @classmethod
    def _names(cls, loggers: Any) -> Any:
        return by_name(loggers)

    def on(self, gpus: float) -> RunConfig:
        """This config for a role of the cluster: `device: auto` means a GPU if the role has a share of one."""
        device = self.device if self.device != "auto" else "cuda" if gpus else "cpu"
        return self.model_copy(update={"device": device})
