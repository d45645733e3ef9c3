"""Any diffusers pipeline of one denoising loop, by its own call, as a function of its adapters' numbers.

B chains, T steps, P numbers, S stages whose steps see prompts of their own. A latent is [B, ...] as the pipeline's
scheduler has it, which some pack.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlr_ray.core.sampler import Conditioning, Start
from rlr_ray.core.seeds import chains_noise
from rlr_ray.errors import UserError, first_line
from rlr_ray.models.arguments import Requests, call_arguments
from rlr_ray.models.batches import Batches
from rlr_ray.models.call import Batch, Left, PipelineCall
from rlr_ray.models.facts import fact_of
from rlr_ray.models.features import middle_of, on_grid, outputs_of, pooled
from rlr_ray.models.offload import loaded_bytes, placed
from rlr_ray.models.schedulers import solver_of
from rlr_ray.models.seams import recomputed
from rlr_ray.models.trained import Trained


class Program:
    """A pipeline whose chains start, step and decode as its own call does.

    A chain's conditioning names what it is asked for: `request`, the number of a prompt, or [S] of its stages'
    (Diffusive Chain-of-Thought, arXiv:2502.00639), and `seed`, of what the call itself draws. What its model says at a
    step is that step's output after guidance of whatever kind, at theta [P], or at each chain's own [B, P].
    """

    def __init__(
        self,
        pipeline: Any,
        config: Any,
        adapter: Any,
        sampler: Any,
        device: torch.device,
        request: Mapping[str, Any],
        stage_of_step: Sequence[int] = (),  # [T], each in 0 .. S-1
    ):
        self.fact = fact_of(type(pipeline).__name__)
        self.pipeline = placed(pipeline, device, offload=config.offload)
        self.device, self.stage_of_step = device, stage_of_step
        self.tuned = Trained(pipeline, adapter, self.fact.untrained)
        parts, self.initial_theta, self.base_theta = list(self.tuned.modules), self.tuned.now, self.tuned.base
        self.trained = ", ".join(parts)
        for part in (getattr(pipeline, name) for name in parts):
            if config.gradient_checkpointing:  # of what has a gradient: not under torch.no_grad()
                part.enable_gradient_checkpointing(recomputed)
            if config.compile:  # dynamic shapes are slower; there are few here, each compiled when it first comes
                part.forward = torch.compile(part.forward, dynamic=False)
        solver = solver_of(pipeline.scheduler, sampler.timestep_spacing)
        self.requests = Requests(pipeline)
        self._call = PipelineCall(pipeline, solver, self.tuned, config.decode_slice)
        self._call.arguments = call_arguments(pipeline, config, sampler)
        example = self.requests.add(**request)
        self._batches = Batches(self._call, self.requests, sampler, example, alone=self.fact.alone)
        self.schedule, self.latent_shape = self._batches.schedule, self._batches.latent_shape
        self._step_of_time = {time: k for k, time in enumerate(self.schedule.timesteps)}
        self.frames = self._frames()
        self._check_sides(config)

    def _frames(self) -> int | None:
        if "num_frames" not in self.requests.signature and "video" not in self.requests.signature:
            return None
        if self.fact.decoded_from is not None:
            return self.fact.frames(self.pipeline, self.latent_shape[1])
        return self._nothing.shape[1] if self._nothing.dim() == 5 else None

    @functools.cached_property
    @torch.no_grad()
    def _nothing(self) -> Tensor:  # [1, 3, h, w] or [1, n, 3, h, w]
        """The picture of a latent of zeros, or as few frames of its video as can be."""
        zeros = torch.zeros(1, *self.latent_shape, device=self.device)
        return self.decode(zeros, None if self.fact.decoded_from is None else [0])

    def _check_sides(self, config: Any) -> None:
        """Raise UserError for sides or frames that the call rounds to others without a word."""
        made = {"num_frames": self.frames}
        if config.height is not None or config.width is not None:
            made["height"], made["width"] = self._nothing.shape[-2:]
        for name, size in made.items():
            if (said := getattr(config, name)) not in (None, size):
                raise UserError(
                    f"model.{name} is {said}, of which a {type(self.pipeline).__name__} of this model makes {size}; "
                    "set what it makes"
                )

    def encode(
        self,
        prompts: Sequence[str | Sequence[str]],
        negatives: Sequence[str] = (),
        columns: Sequence[Mapping[str, Any]] = (),
    ) -> dict[str, Tensor]:
        """Each chain's request, or its stages'; `columns` are its prompt's others, of which the call takes some."""
        rows = zip(prompts, negatives or [""] * len(prompts), columns or [{}] * len(prompts), strict=True)
        numbers = [
            [self.requests.add(text, negative, own) for text in ([texts] if isinstance(texts, str) else texts)]
            for texts, negative, own in rows
        ]
        requests = torch.tensor(numbers, device=self.device)  # [B, S]
        return {
            "request": requests.squeeze(1),
            "seed": torch.zeros(len(numbers), dtype=torch.long, device=self.device),
            "prompt": torch.stack([torch.cat([self._embedding(one) for one in chain]) for chain in numbers]),
        }

    @functools.lru_cache(maxsize=2**14)  # noqa: B019  # a model lives as long as its process
    def _embedding(self, request: int) -> Tensor:  # [1, D]
        """For surrogates, which read prompts so."""
        return self._batches.embedding(request).to(self.device)

    def _each(
        self, function: Any, conditioning: Conditioning, *rows: Tensor, stage: int = -1, alone: bool = False
    ) -> Tensor:
        requests = conditioning["request"]
        requests = requests if requests.dim() == 1 else requests[:, stage]
        return self._batches.each(function, requests, conditioning["seed"], *rows, alone=alone)

    @torch.no_grad()
    def begin(self, seeds: Sequence[int], conditioning: Conditioning) -> Start:
        """How the plain pipeline begins with one generator a seed: first latents, noises, and what it is asked for."""
        seeded = {**conditioning, "seed": torch.tensor(list(seeds), device=self.device)}
        if self._batches.plain:
            first, noise = chains_noise(seeds, len(self.schedule), self.latent_shape)
        else:
            first, *noises = self._each(self._batches.begun, seeded, stage=0).unbind(1)
            noise = torch.stack(noises)
        return first.to(self.device), noise.to(self.device), seeded

    def __call__(self, theta: Tensor, latent: Tensor, timestep: float, conditioning: Conditioning) -> Tensor:
        """What the model says at the step of that time, [B, ...] as the latent.

        Where the call changes latents between its steps, as inpainting does, that is said in it: the step's mean is as
        from the changed latent.
        """
        k = self._step_of_time[timestep]
        predict, stage = (
            functools.partial(self._batches.output, k=k),
            self.stage_of_step[k] if self.stage_of_step else -1,
        )
        apart = (self.fact.apart or self.tuned.apart) and theta.dim() == 2
        output = self._each(predict, conditioning, theta, latent, stage=stage, alone=apart)
        if theta.requires_grad and not self.tuned.whole:  # a step of an expert that is not trained has gradient 0
            output = output + 0 * theta.sum()
        return output

    def decode(
        self, latents: Tensor, frames: Sequence[int] | None = None, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Pictures [B, 3, h, w], or videos [B, n, 3, h, w] of these frames (None: of all), in [0, 1]; differentiable.

        Latents of the same chains n times over are decoded under the conditioning as often.
        """
        if conditioning is None:
            conditioning = {"request": torch.tensor([self._batches.example]), "seed": torch.zeros(1, dtype=torch.long)}
        times = len(latents) // len(conditioning["seed"])
        asked = {name: torch.cat([conditioning[name]] * times) for name in ("request", "seed")}
        if frames is None:
            return self._each(self._batches.decoded, asked, latents)
        if self.fact.decoded_from is None:
            return self._each(self._batches.decoded, asked, latents)[:, list(frames)]
        needed, among = self.fact.decoded(self.pipeline, frames)
        return self._each(self._batches.decoded, asked, latents[:, :, needed])[:, among]

    def features(self, latents: Tensor, conditioning: Conditioning) -> Tensor:  # [B, ...] -> [B, C', H', W']
        """What the base model's middle block sees of last latents at the last step's noise level; differentiable.

        The call is left there. Pooled, see `rlr_ray.models.features`; nothing stays behind in the model.
        """
        blocks, last = [middle_of(getattr(self.pipeline, name)) for name in self.tuned.modules], len(self.schedule) - 1

        def seen(batch: Batch, latent: Tensor) -> Tensor:
            self._call.output(batch, last, None, None)  # what passes over steps may call blocks to learn its shapes
            with outputs_of(blocks, Left) as outputs:
                self._call.output(batch, last, self._batches.parted(latent), self.initial_theta)
            return pooled(outputs[0], self.grid, len(latent))

        return self._each(seen, conditioning, latents)

    @functools.cached_property
    def grid(self) -> tuple[int, int, int]:
        """Frames, height and width of a latent; of a packed picture its pixels', whose ratio is its own."""
        if len(self.latent_shape) > 2:
            *frames, height, width = self.latent_shape[1:]
            return math.prod(frames), height, width
        if self.frames is not None or len(self.latent_shape) == 1:
            raise UserError(
                f"a surrogate is to see latents of a {type(self.pipeline).__name__}, which are packed; allowed: those "
                "of pictures; leave estimator.surrogate out"
            )
        height, width = self._nothing.shape[-2:]
        return 1, height, width

    def as_pictures(self, latents: Tensor) -> Tensor:  # [B, ...] -> [B, C, (F,) H, W]
        """Latents as they lie in the picture; only packed ones change."""
        return latents if latents.dim() > 3 else on_grid(latents, self.grid)[:, :, 0]

    @property
    def described(self) -> dict[str, Any]:
        """What plain diffusers needs to draw as this model does, for who reads of a run without loading one."""
        signature, told = self.requests.signature, self._call.arguments
        call = {name: value for name, value in told.items() if name != "output_type" and name in signature}
        example = self.requests.asked[self._batches.example]
        return {
            "class": self.requests.kind,
            "parts": list(self.tuned.modules),
            "scheduler": type(self._call.solver).__name__,
            "frames": self.frames,
            "call": call,
            "prompt": example.get("prompt", ""),
            "columns": sorted(set(example) - {"prompt", "negative_prompt"}),
        }

    def truncated(self, texts: Sequence[str]) -> list[str]:
        return self.requests.truncated(texts, self._call.arguments)

    def weights(self) -> int:
        """Bytes of the pipeline's parameters and buffers."""
        return loaded_bytes(self.pipeline, self.device)

    def save_adapter(self, theta: Tensor, folder: Path, *, also: Sequence[str] = ()) -> Path:
        """See Trained.save."""
        return self.tuned.save(theta, folder, also)

    def load_adapter(self, folder: Path) -> Tensor:  # [P]
        """See Trained.load."""
        return self.tuned.load(folder)


def program_of(pipeline: Any, config: Any, *arguments: Any) -> Program:
    """Raises UserError for whatever the pipeline's own call says of its arguments."""
    try:
        return Program(pipeline, config, *arguments)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a class's own call makes of arguments that it was not written for
        raise UserError(
            f"a {type(pipeline).__name__} could not be called as the recipe says (model.height, width and call, "
            f"sampler.steps, and the first prompt): {first_line(error)}; see its arguments in diffusers' "
            "documentation, and give them in model.call, or as columns of the prompts (docs/models.md)"
        ) from error
