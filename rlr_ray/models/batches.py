"""Chains of a pipeline's call, a batch a call: what it steps through, where they begin, what its model says of them.

B chains, T steps, P numbers. A latent is [B, ...] as the pipeline's scheduler has it, which some pack; where a step
moves several (a video's and its sound's) they are one [B, N].
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rlr_ray.core.schedule import Schedule
from rlr_ray.errors import UserError
from rlr_ray.models.arguments import Requests
from rlr_ray.models.call import Batch, PipelineCall
from rlr_ray.models.schedulers import steps_of

_KEPT = 16  # batches whose frozen parts' results are kept


class Batches:
    """A batch is named by the numbers of its chains' requests, and by their seeds where more than noise comes of them.

    `alone`: a call takes one chain. `example` is a request's number, of which shapes and times are learned.
    """

    def __init__(self, call: PipelineCall, requests: Requests, sampler: Any, example: int, *, alone: bool):
        self.call, self.requests, self.alone, self.example = call, requests, alone, example
        self.kind = type(call.pipeline).__name__
        self.kept: OrderedDict[tuple[int, ...], Batch] = OrderedDict()
        self.schedule = self._probe(sampler)

    @torch.no_grad()
    def _probe(self, sampler: Any) -> Schedule:
        """The schedule of as many steps as the sampler says; a call on a picture may take fewer than it is told."""
        told = sampler.steps
        for _ in range(8):
            times = self._probed(told)
            if len(times) == sampler.steps:
                return steps_of(self.call.solver, times, sampler.etas)
            told = max(told + 1, told * sampler.steps // len(times)) if len(times) < sampler.steps else told - 1
        raise UserError(
            f"a {self.kind} takes {len(times)} steps where it is told {told}; no number gives "
            f"sampler.steps {sampler.steps}; set another, or another strength in model.call"
        )

    def _probed(self, told: int) -> list[float]:
        """The times that a call steps through. Denoisers are called once here, to learn what they return."""
        call = self.call
        call.arguments["num_inference_steps"] = told
        call.count, call.draws, call.plain = 1, True, None
        self.kept.clear()
        batch = self.of([self.example], [0])
        run = call.passed_over(batch)
        self.alone |= run.drew  # from torch's own generator: then a chain's draws would be those of its batch
        times = [time for time, *_ in run.seen]
        count = next((i for i, time in enumerate(times) if time != times[0]), len(times))
        self.shapes = [tuple(latent.shape[1:]) for _, latent, _ in run.seen[:count]]
        self.latent_shape = self.shapes[0] if count == 1 else (sum(map(math.prod, self.shapes)),)
        first, source = run.first, torch.Generator().manual_seed(0)
        assert first is not None, "the call has no step"
        same = [i for i, one in enumerate(run.prepared) if one is first]
        call.slot = same[0] if same and count == 1 else None
        plain = torch.randn(first.shape[1:], generator=source).to(first)
        self.plain = count == 1 and torch.equal(first[0], plain)  # no picture, no packing
        once = torch.equal(source.get_state(), batch.generators[0].get_state())
        only = self.plain and once and not run.drew and len(run.prepared) == 1
        call.draws, call.plain = run.drew, run.prepared[0] if only else None
        call.count, call.steps = count, len(times) // count
        return times[::count]

    def of(self, requests: Sequence[int], seeds: Sequence[int]) -> Batch:
        key = (*requests, *seeds) if self.call.plain is None else (*requests,)
        if key not in self.kept:
            while len(self.kept) >= _KEPT:
                self.kept.popitem(last=False)
            self.kept[key] = Batch(self.requests.arguments(requests, alone=self.alone), seeds)
        self.kept.move_to_end(key)
        return self.kept[key]

    def each(self, function: Any, requests: Tensor, seeds: Tensor, *rows: Tensor, alone: bool = False) -> Tensor:
        """The function of a batch and of its rows, call by call where a call takes one chain alone."""
        numbers, drawn = requests.tolist(), seeds.tolist()
        if not (self.alone or alone):
            result: Tensor = function(self.of(numbers, drawn), *rows)
            return result
        parts = []
        for i, (number, seed) in enumerate(zip(numbers, drawn, strict=True)):
            chain = [row if row.dim() == 1 else row[i : i + 1] for row in rows]
            parts.append(function(self.of([number], [seed]), *chain))
        return torch.cat(parts)

    def embedding(self, request: int) -> Tensor:  # [1, D]
        """What encodes a prompt, averaged over its tokens."""
        batch = self.of([request], [0])
        with torch.no_grad():
            self.call.output(batch, 0, None, None)
        leaves = tree_leaves([value for key, value in batch.tape.items() if key[0] == "encode_prompt"])
        embeddings = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
        if not embeddings:
            return torch.zeros(1, 1)
        return embeddings[0].float().flatten(0, -2).mean(0, keepdim=True)

    def begun(self, batch: Batch) -> Tensor:  # [B, 1 + T, ...]
        """The call's own first latents, and noises of the generators after them."""
        run = self.call.output(batch, 0, None, None)
        first = self.joined([latent for _, latent, _ in run.seen])
        if first.shape[1:] != self.latent_shape:
            raise UserError(
                f"a chain's latent is {tuple(first.shape[1:])}, others' are {self.latent_shape}; pictures of prompts "
                "must be of one size: set model.height and model.width, or scale them"
            )
        noise = [
            torch.stack([torch.randn(first.shape[1:], generator=source) for _ in self.schedule.timesteps])
            for source in batch.generators
        ]
        return torch.cat([first[:, None], torch.stack(noise).to(first)], 1)

    def output(self, batch: Batch, theta: Tensor, latent: Tensor, *, k: int) -> Tensor:
        """What the model says at step k, as the latent; what the call changes of it before the step is said in it."""
        ours = self.parted(latent)
        theta = theta[0] if len(theta) == 1 and theta.dim() == 2 else theta
        run = self.call.output(batch, k, ours, theta)
        outputs = []
        for mine, (_, theirs, output) in zip(ours, run.seen, strict=True):
            if theirs is mine:
                outputs.append(output)
                continue
            if k == 0 and self.call.slot is None and not torch.equal(theirs, mine):
                raise UserError(f"a {self.kind} takes no other first latent than its own")
            moved = self.schedule.latent_coefficient[k] / self.schedule.output_coefficient[k]
            outputs.append(output + moved * (theirs - mine))
        return self.joined(outputs)

    def decoded(self, batch: Batch, latents: Tensor) -> Tensor:
        result = self.call.decoded(batch, self.parted(latents))
        pictures = next(getattr(result, name) for name in ("images", "frames", "image") if hasattr(result, name))
        return (torch.stack(list(pictures)) if isinstance(pictures, list) else pictures).float()

    def parted(self, latent: Tensor) -> list[Tensor]:
        """A step's several latents."""
        if len(self.shapes) == 1:
            return [latent]
        parts = latent.split([math.prod(shape) for shape in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat([part.flatten(1) for part in parts], 1)
