"""A model whose steps see prompts of their own: Diffusive Chain-of-Thought (arXiv:2502.00639).

S stages, B chains, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rlr_ray.core.sampler import Conditioning
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

    def encode(self, prompts: Sequence[str], negatives: Sequence[str] = ()) -> Conditioning:
        """Embeddings [B, S, ...] of one prompt for all stages of a chain."""
        return self.encode_stages([(prompt,) * self.stages for prompt in prompts], negatives)

    def encode_stages(self, prompts: Sequence[Sequence[str]], negatives: Sequence[str] = ()) -> Conditioning:
        """Embeddings by name, each [B, S, ...], of S prompts a chain and one negative prompt for all its stages."""
        flat = self.model.encode(
            [prompt for stages in prompts for prompt in stages],
            [negative for negative in negatives for _ in range(self.stages)],
        )
        return {name: value.unflatten(0, (len(prompts), self.stages)) for name, value in flat.items()}

    def features(self, latents: Tensor, conditioning: Conditioning) -> Tensor:  # [B, C', H', W']
        """Under the prompts of the last stage."""
        return self.model.features(latents, {name: value[:, -1] for name, value in conditioning.items()})

    def decode(self, latents: Tensor, frames: Sequence[int] | None = None) -> Tensor:
        return self.model.decode(latents, frames)

    def truncated(self, texts: Sequence[str]) -> list[str]:
        return self.model.truncated(texts)

    def weights(self) -> int:
        return self.model.weights()

    def save_adapter(self, theta: Tensor, folder: Path) -> Path:
        return self.model.save_adapter(theta, folder)

    def load_adapter(self, folder: Path) -> Tensor:  # [P]
        return self.model.load_adapter(folder)
