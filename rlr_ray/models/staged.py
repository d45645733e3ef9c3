"""A model whose steps see prompts of their own: Diffusive Chain-of-Thought (arXiv:2502.00639).

S stages, B chains, T steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlr_ray.core.sampler import Conditioning, Start
from rlr_ray.models import Model


class Staged:
    """Any model, its conditioning [B, S, ...], of which each step is given its own stage's [B, ...].

    It is a Model itself. A timestep says which step it is, so the schedule must have every timestep once.
    """

    def __init__(self, model: Model, stage_of_step: Sequence[int]):  # [T], each in 0 .. S-1
        self.model = model
        self.schedule, self.latent_shape, self.initial_theta = model.schedule, model.latent_shape, model.initial_theta
        self.frames = model.frames
        self.stages = stage_of_step[-1] + 1
        self.stage_of = dict(zip(model.schedule.timesteps, stage_of_step, strict=True))
        assert len(self.stage_of) == len(stage_of_step), "two steps with one timestep"

    def __call__(self, theta: Tensor, latent: Tensor, timestep: float, conditioning: Conditioning) -> Tensor:
        """Prediction [B, C, H, W] under the prompts of the step's stage."""
        stage = self.stage_of[timestep]
        return self.model(theta, latent, timestep, {name: value[:, stage] for name, value in conditioning.items()})

    def encode(
        self, prompts: Sequence[str], negatives: Sequence[str] = (), columns: Sequence[Mapping[str, Any]] = ()
    ) -> Conditioning:
        """Embeddings [B, S, ...] of one prompt for all stages of a chain."""
        return self.encode_stages([(prompt,) * self.stages for prompt in prompts], negatives, columns)

    def encode_stages(
        self,
        prompts: Sequence[Sequence[str]],
        negatives: Sequence[str] = (),
        columns: Sequence[Mapping[str, Any]] = (),
    ) -> Conditioning:
        """Embeddings by name, each [B, S, ...], of S prompts a chain and one negative prompt for all its stages."""
        flat = self.model.encode(
            [prompt for stages in prompts for prompt in stages],
            [negative for negative in negatives for _ in range(self.stages)],
            [own for own in columns for _ in range(self.stages)],
        )
        return {name: value.unflatten(0, (len(prompts), self.stages)) for name, value in flat.items()}

    def begin(self, seeds: Sequence[int], conditioning: Conditioning) -> Start:
        """Under the prompts of the first stage; what is added to them is every stage's."""
        first = {name: value[:, 0] for name, value in conditioning.items()}
        latents, noises, begun = self.model.begin(seeds, first)
        changed = {name: value for name, value in begun.items() if value is not first.get(name)}
        added = {name: value[:, None].expand(-1, self.stages, *value.shape[1:]) for name, value in changed.items()}
        return latents, noises, {**conditioning, **added}

    def features(self, latents: Tensor, conditioning: Conditioning) -> Tensor:  # [B, C', H', W']
        """Under the prompts of the last stage."""
        return self.model.features(latents, {name: value[:, -1] for name, value in conditioning.items()})

    def decode(
        self, latents: Tensor, frames: Sequence[int] | None = None, conditioning: Conditioning | None = None
    ) -> Tensor:
        last = None if conditioning is None else {name: value[:, -1] for name, value in conditioning.items()}
        return self.model.decode(latents, frames, last)

    def truncated(self, texts: Sequence[str]) -> list[str]:
        return self.model.truncated(texts)

    def weights(self) -> int:
        return self.model.weights()

    def save_adapter(self, theta: Tensor, folder: Path, *, also: Sequence[str] = ()) -> Path:
        return self.model.save_adapter(theta, folder, also=also)

    def load_adapter(self, folder: Path) -> Tensor:  # [P]
        return self.model.load_adapter(folder)
