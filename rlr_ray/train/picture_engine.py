"""Model and prompts of one recipe: enough to draw its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlr_ray.config.run import RunConfig
from rlr_ray.core.sampler import Conditioning, Sampler, Start, Trajectory
from rlr_ray.core.seeds import seed_of
from rlr_ray.errors import UserError
from rlr_ray.models import Model
from rlr_ray.models.finite import check_finite
from rlr_ray.prompts.load import prompt_sets
from rlr_ray.prompts.prompt import Prompt

if TYPE_CHECKING:
    from rlr_ray.models.sharding import Shards


def pick_device(name: str) -> torch.device:
    """The device that config.device says. Raises UserError if it is not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device is 'cuda', but torch finds no CUDA device here; set device: auto or device: cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def chain_rows(seeds: Sequence[int], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Rows with all that plain diffusers needs to draw these chains again."""
    return [
        {"prompt": prompt.text}
        | ({"negative_prompt": prompt.negative} if prompt.negative else {})
        | prompt.drawn_columns
        | {"seed": seed}
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]


class PictureEngine:
    """Model and prompts of one recipe, on one device: enough to draw its pictures; `shards`: cut among processes.

    Raises UserError if the process does not compute with the recipe's `threads`; see prepare_process.
    """

    def __init__(self, config: RunConfig, shards: Shards | None = None):
        from rlr_ray.models.loading import load_model  # only here: who loads no model is spared seconds of imports

        if torch.get_num_threads() != config.threads:  # set once: to do so here would change what others compute
            raise UserError(
                f"torch computes with {torch.get_num_threads()} CPU threads here, but the recipe says threads: "
                f"{config.threads}, and they change the last bits; call rlr_ray.utils.environment.prepare_process"
                f"({config.threads}) at the process's start"
            )
        self.config = config
        self.device = pick_device(config.device)
        sets = prompt_sets(config)
        self.prompts, self.held_out_prompts = sets.train, sets.held_out
        stages = () if config.dcot is None else config.dcot.stage_of_step(config.sampler.steps)
        self.model: Model = load_model(
            config.model, config.adapter, config.sampler, self.device, self.prompts[0].request, stages, shards
        )

    @property
    def sampler(self) -> Sampler:
        schedule = self.model.schedule
        return Sampler(self.model, schedule, self.config.adapter.steps_off(schedule), self.model.base_theta)

    def prompt_note(self) -> str:
        """A note of the prompts, negative ones among them, that the model cuts for their length; "" if none."""
        texts = dict.fromkeys(text for prompt in (*self.prompts, *self.held_out_prompts) for text in prompt.texts)
        cut = self.model.truncated(list(texts))
        if not cut:
            return ""
        return (
            f"note: {len(cut)} of {len(texts)} prompts are longer than the model's tokenizer takes, so their ends are "
            f"cut off; the first: {cut[0]!r}"
        )

    def held_out(self, indices: range) -> tuple[list[int], list[Prompt]]:
        """Seeds and prompts of held-out chains, which no update uses, the same at every evaluation."""
        chosen = self.config.evaluation.seed
        seeds = [seed_of(self.config.seed if chosen is None else chosen, "held-out", index) for index in indices]
        return seeds, [self.held_out_prompts[index % len(self.held_out_prompts)] for index in indices]

    def start(self, seeds: Sequence[int], prompts: Sequence[Prompt]) -> Start:
        """First latents and noises as a plain diffusers pipeline draws them for these prompts, one generator a seed."""
        return self.model.begin(seeds, self.encode(prompts))

    @torch.no_grad()
    def sample(self, theta: Tensor, indices: range) -> tuple[Trajectory, Tensor]:
        """Held-out chains at theta [P] and their images [B, 3, H, W], or videos [B, F, 3, H, W]."""
        trajectory = self.sampler.sample(theta, *self.start(*self.held_out(indices)))
        return trajectory, self.decode(trajectory.latents[-1], trajectory.conditioning)

    def decode(self, latents: Tensor, conditioning: Conditioning, frames: Sequence[int] | None = None) -> Tensor:
        """Images or videos of these frames. Raises UserError if one is not finite, and some reward allows no such."""
        images = self.model.decode(latents, frames, conditioning)
        if any(reward.invalid == "stop" for reward in self.config.rewards.values()):
            check_finite(images, latents, conditioning, self.config.model.dtype)
        return images

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        staged = self.config.dcot is not None
        texts = [(prompt.stages or (prompt.text,) * 3) if staged else prompt.text for prompt in prompts]
        columns = [prompt.drawn_columns for prompt in prompts]
        return self.model.encode(texts, [prompt.negative for prompt in prompts], columns)
