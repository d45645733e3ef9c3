"""Any diffusers pipeline of one denoising loop, by its own call, as a function of its adapters' numbers.

B chains, T steps, P numbers. A latent is [B, ...] as the pipeline's scheduler has it, which some pack; where a step
moves several (a video's and its sound's) they are one [B, N].
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rlr_ray.core.sampler import Conditioning, Start
from rlr_ray.core.schedule import Schedule
from rlr_ray.core.seeds import chains_noise
from rlr_ray.errors import UserError, first_line
from rlr_ray.models import DENOISERS, module_bytes
from rlr_ray.models.arguments import Requests, call_arguments, fact_of, without_checks
from rlr_ray.models.call import Batch, PipelineCall
from rlr_ray.models.loading import load_pipeline, pipeline_index
from rlr_ray.models.pipelines import recomputed
from rlr_ray.models.solvers import solver_of, steps_of
from rlr_ray.models.trained import Trained

_BATCHES = 16  # whose frozen parts' results are kept


class Program:
    """A pipeline whose chains start, step and decode as its own call does.

    A chain's conditioning names what it is asked for: `request`, a line of `requests`, and `seed`, of what the call
    itself draws. What its model says at a step is that step's output after guidance of whatever kind, at theta [P], or
    at each chain's own [B, P].
    """

    def __init__(self, pipeline: Any, config: Any, adapter: Any, sampler: Any, device: torch.device, request: Any):
        fact = fact_of(pipeline)
        self.pipeline, self.device = pipeline.to(device), device
        self.alone, self.apart = fact.alone, fact.apart  # a call takes one chain; if chains have numbers of their own
        for key in ("compile", "motion_adapter"):
            if getattr(config, key):
                raise UserError(f"model.{key} is set, which model.name: pipeline does not take; leave it out")
        parts = [name for name in DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module)]
        if not parts:
            raise UserError(f"a {type(pipeline).__name__} has no denoiser; allowed parts: {', '.join(DENOISERS)}")
        self.tuned = Trained(pipeline, parts, adapter)
        self.trained = ", ".join(parts)
        self.initial_theta = self.tuned.now
        if config.gradient_checkpointing:  # of what has a gradient: not under torch.no_grad()
            for name in parts:
                getattr(pipeline, name).enable_gradient_checkpointing(recomputed)
        solver = solver_of(pipeline.scheduler, sampler.timestep_spacing)
        self.requests = Requests(pipeline)
        self._call = PipelineCall(pipeline, solver, self.tuned, config.decode_slice)
        self._call.arguments = call_arguments(pipeline, config, sampler)
        self._batches: OrderedDict[tuple[Any, ...], Batch] = OrderedDict()
        self._example = self.requests.add(**request)
        self.schedule = self._probe(sampler)
        self._step_of_time = {time: k for k, time in enumerate(self.schedule.timesteps)}
        self.frames = self._frames()

    # How the call is probed

    @torch.no_grad()
    def _probe(self, sampler: Any) -> Schedule:
        """The schedule of as many steps as the sampler says; a call on a picture may take fewer than it is told."""
        told = sampler.steps
        for _ in range(8):
            times = self._probed(told)
            if len(times) == sampler.steps:
                return steps_of(self._call.solver, times, sampler.eta)
            told = max(told + 1, told * sampler.steps // len(times)) if len(times) < sampler.steps else told - 1
        raise UserError(
            f"a {type(self.pipeline).__name__} takes {len(times)} steps where it is told {told}; no number gives "
            f"sampler.steps {sampler.steps}; set another, or another strength in model.call"
        )

    def _probed(self, told: int) -> list[float]:
        """The times that a call steps through. Denoisers are called once here, to learn what they return."""
        self._call.arguments["num_inference_steps"] = told
        self._call.count, self._call.draws, self._call.plain = 1, True, False
        self._batches.clear()
        run = self._call.passed_over(self._batch([self._example], [0]))
        self.alone |= run.drew  # from torch's own generator: then a chain's draws would be those of its batch
        times = [time for time, *_ in run.seen]
        count = next((i for i, time in enumerate(times) if time != times[0]), len(times))
        self.shapes = [tuple(latent.shape[1:]) for _, latent, _ in run.seen[:count]]
        start = run.seen[0][1]
        same = [i for i, one in enumerate(run.prepared) if one is start]
        self._call.slot = same[0] if same and count == 1 else None
        plain = torch.randn(start.shape[1:], generator=torch.Generator().manual_seed(0)).to(start)
        self._plain = count == 1 and torch.equal(start[0], plain)  # no picture, no packing
        self._call.draws, self._call.plain = run.drew, self._plain and len(run.prepared) == 1
        self._call.count, self._call.steps = count, len(times) // count
        return times[::count]

    def _frames(self) -> int | None:
        if "num_frames" not in self.requests.signature and "video" not in self.requests.signature:
            return None
        with torch.no_grad():
            decoded = self.decode(torch.zeros(1, *self.latent_shape, device=self.device))
        return decoded.shape[1] if decoded.dim() == 5 else None

    # The protocol of models

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.shapes[0] if len(self.shapes) == 1 else (sum(map(math.prod, self.shapes)),)

    def encode(
        self, prompts: Sequence[str], negatives: Sequence[str] = (), columns: Sequence[Mapping[str, Any]] = ()
    ) -> dict[str, Tensor]:
        """Each chain's request; `columns` are its prompt's others, of which those count that the call takes."""
        rows = zip(prompts, negatives or [""] * len(prompts), columns or [{}] * len(prompts), strict=True)
        lines = [self.requests.add(*row) for row in rows]
        return {
            "request": torch.tensor(lines, device=self.device),
            "seed": torch.zeros(len(lines), dtype=torch.long, device=self.device),
            "prompt": torch.stack([self._embedding(line) for line in lines]),
        }

    @functools.lru_cache  # noqa: B019  # a model lives as long as its process
    def _embedding(self, line: int) -> Tensor:  # [1, D]
        """What encodes a prompt, averaged over its tokens: for surrogates, which read prompts so."""
        batch = self._batch([line], [0])
        with torch.no_grad():
            self._call.output(batch, 0, None, None)
        leaves = tree_leaves([value for key, value in batch.tape.items() if key[0] == "encode_prompt"])
        embeddings = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
        if not embeddings:
            return torch.zeros(1, 1, device=self.device)
        return embeddings[0].float().flatten(0, -2).mean(0, keepdim=True).to(self.device)

    @torch.no_grad()
    def begin(self, seeds: Sequence[int], conditioning: Conditioning) -> Start:
        """How the plain pipeline begins with one generator a seed: first latents, noises, and what it is asked for."""
        shape = self.latent_shape
        seeded = {**conditioning, "seed": torch.tensor(list(seeds), device=self.device)}
        if self._plain:
            first, noise = chains_noise(seeds, len(self.schedule), shape)
        else:
            first, *noises = self._each(self._begun, seeded).unbind(1)
            noise = torch.stack(noises)
            if first.shape[1:] != shape:
                raise UserError(
                    f"a chain's latent is {tuple(first.shape[1:])}, others' are {shape}; pictures of prompts must be "
                    "of one size: set model.height and model.width, or scale them"
                )
        return first.to(self.device), noise.to(self.device), seeded

    def __call__(self, theta: Tensor, latent: Tensor, timestep: float, conditioning: Conditioning) -> Tensor:
        """What the model says at the step of that time, [B, ...] as the latent.

        Where the call changes latents between its steps, as inpainting does, that is said in it: the step's mean is as
        from the changed latent.
        """
        predict = functools.partial(self._predict, k=self._step_of_time[timestep])
        apart = (self.apart or self.tuned.apart) and theta.dim() == 2
        return self._each(predict, conditioning, theta, latent, alone=apart)

    def decode(
        self, latents: Tensor, frames: Sequence[int] | None = None, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Pictures [B, 3, h, w], or videos [B, n, 3, h, w] of these frames (None: of all), in [0, 1]; differentiable.

        Latents of the same chains n times over are decoded under the conditioning as often.
        """
        if conditioning is None:
            conditioning = {"request": torch.tensor([self._example]), "seed": torch.zeros(1, dtype=torch.long)}
        times = len(latents) // len(conditioning["request"])
        asked = {name: conditioning[name].repeat(times) for name in ("request", "seed")}
        decoded = self._each(self._decoded, asked, latents)
        return decoded if frames is None else decoded[:, list(frames)]

    def features(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        raise UserError(
            f"estimator.surrogate.features is 'denoiser', which is not told of a {type(self.pipeline).__name__}; set "
            "features: latent"
        )

    def truncated(self, texts: Sequence[str]) -> list[str]:
        return self.requests.truncated(texts, self._call.arguments)

    def weights(self) -> int:
        """Bytes of the pipeline's parameters and buffers."""
        return sum(module_bytes(part) for part in self.pipeline.components.values())

    def save_adapter(self, theta: Tensor, folder: Path, *, also: Sequence[str] = ()) -> Path:
        """See Trained.save."""
        return self.tuned.save(theta, folder, also)

    def load_adapter(self, folder: Path) -> Tensor:  # [P]
        """See Trained.load."""
        return self.tuned.load(folder)

    # Of one call's chains

    def _each(self, function: Any, conditioning: Conditioning, *rows: Tensor, alone: bool = False) -> Tensor:
        """The function of a batch and of its rows, call by call where a call takes one chain alone."""
        lines, seeds = conditioning["request"].tolist(), conditioning["seed"].tolist()
        if not (self.alone or alone):
            result: Tensor = function(self._batch(lines, seeds), *rows)
            return result
        parts = []
        for i, (line, seed) in enumerate(zip(lines, seeds, strict=True)):
            own = [row if row.dim() == 1 else row[i : i + 1] for row in rows]
            parts.append(function(self._batch([line], [seed]), *own))
        return torch.cat(parts)

    def _batch(self, lines: Sequence[int], seeds: Sequence[int]) -> Batch:
        key = (*lines, *seeds)
        if key not in self._batches:
            while len(self._batches) >= _BATCHES:
                self._batches.popitem(last=False)
            self._batches[key] = Batch(self.requests.arguments(lines, alone=self.alone), seeds)
        self._batches.move_to_end(key)
        return self._batches[key]

    def _begun(self, batch: Batch) -> Tensor:  # [B, 1 + T, ...]
        """The call's own first latents, and noises of the generators after them."""
        run = self._call.output(batch, 0, None, None)
        first = self._joined([latent for _, latent, _ in run.seen])
        noise = [
            torch.stack([torch.randn(first.shape[1:], generator=source) for _ in self.schedule.timesteps])
            for source in batch.generators
        ]
        return torch.cat([first[:, None], torch.stack(noise).to(first)], 1)

    def _predict(self, batch: Batch, theta: Tensor, latent: Tensor, *, k: int) -> Tensor:
        ours = self._parted(latent)
        theta = theta[0] if len(theta) == 1 and theta.dim() == 2 else theta
        run = self._call.output(batch, k, ours, theta)
        outputs = []
        for mine, (_, theirs, output) in zip(ours, run.seen, strict=True):
            if theirs is mine:
                outputs.append(output)
                continue
            if k == 0 and self._call.slot is None and not torch.equal(theirs, mine):
                raise UserError(f"a {type(self.pipeline).__name__} takes no other first latent than its own")
            moved = self.schedule.latent_coefficient[k] / self.schedule.output_coefficient[k]
            outputs.append(output + moved * (theirs - mine))
        return self._joined(outputs)

    def _decoded(self, batch: Batch, latents: Tensor) -> Tensor:
        result = self._call.decoded(batch, self._parted(latents))
        pictures = next(getattr(result, name) for name in ("images", "frames", "image") if hasattr(result, name))
        return (torch.stack(list(pictures)) if isinstance(pictures, list) else pictures).float()

    def _parted(self, latent: Tensor) -> list[Tensor]:
        if len(self.shapes) == 1:
            return [latent]
        parts = latent.split([math.prod(shape) for shape in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], 1)


def load(config: Any, adapter: Any, sampler: Any, device: torch.device, request: Mapping[str, Any]) -> Program:
    """The pipeline at `config.path` (a folder or a hub name), of whatever class, with its adapters.

    Raises UserError if it has not the shape, or does not take what it is asked for.
    """
    kind = pipeline_index(config, DiffusionPipeline, "diffusers")["_class_name"]
    family = getattr(diffusers, kind, None)
    if family is None:
        raise UserError(f"model.path {config.path!r} holds a {kind}, which diffusers {diffusers.__version__} has not")
    pipeline = load_pipeline(config, family, "diffusers", **without_checks(family))
    return program_of(pipeline, config, adapter, sampler, device, request)


def program_of(
    pipeline: Any, config: Any, adapter: Any, sampler: Any, device: torch.device, request: Mapping[str, Any]
) -> Program:
    """Raises UserError for whatever the pipeline's own call says of its arguments."""
    kind = type(pipeline).__name__
    try:
        return Program(pipeline, config, adapter, sampler, device, request)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a class's own call makes of arguments that it was not written for
        raise UserError(
            f"a {kind} could not be called with model.call {dict(config.call)} and the first prompt: "
            f"{first_line(error)}; see its arguments in diffusers' documentation, and give them in model.call, or as "
            "columns of the prompts (docs/models.md)"
        ) from error
