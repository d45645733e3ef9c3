"""A diffusers pipeline as a function of its adapter's numbers.

B chains, C channels, H x W latent pixels, P trained numbers.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from rlr_ray.core.sampler import Conditioning, Start
from rlr_ray.core.schedule import Schedule
from rlr_ray.core.seeds import chains_noise
from rlr_ray.errors import UserError
from rlr_ray.models import module_bytes
from rlr_ray.models.features import middle_of, outputs_of, pooled
from rlr_ray.models.trained import Trained
from rlr_ray.utils.memory import GIB

EMBEDDINGS_BYTES = 2 * GIB  # of prompts' embeddings that are kept in main memory; T5's are megabytes each


class PipelineModel(ABC):
    """A pipeline's adapter may be any of PEFT's; a family adds the abstract parts below.

    The latent chain and theta are float32 whatever the weights' dtype; `guidance_scale` above 1 adds classifier-free
    guidance (Ho and Salimans 2021), computed inside one prediction.
    """

    trained: str  # the pipeline's part that the adapter sits in
    embeddings: tuple[str, ...] = ("prompt", "negative")  # names of what `_encoded` gives, in its order
    patch = 1  # latent pixels a side that the part takes as one; a picture's sides are multiples of it
    frames: int | None = None  # of a video

    def __init__(self, pipeline: Any, config: Any, adapter: Any, sampler: Any, device: torch.device):
        self.pipeline = pipeline.to(device)
        self.device, self.dtype = device, getattr(pipeline, self.trained).dtype
        self.guidance_scale = sampler.guidance_scale
        self.frames, self.decode_slice = self._frames(config), config.decode_slice
        self.latent_shape = self._latent_shape(config.height, config.width)
        self.schedule = self._schedule(sampler)
        self.tuned = Trained(pipeline, [self.trained], adapter)
        self.initial_theta, self.per_chain = self.tuned.now, self.tuned.per_chain
        self.module: Any = self.tuned.modules[self.trained]
        self.parameters = self.tuned.vectors[self.trained]
        if config.gradient_checkpointing:  # of what has a gradient: not under torch.no_grad()
            getattr(pipeline, self.trained).enable_gradient_checkpointing(recomputed)
        if config.compile:  # dynamic shapes are slower; there are few here, each compiled when it first comes
            self.module.compile(dynamic=False)

    @property
    def channels(self) -> int:  # C
        return int(getattr(self.pipeline, self.trained).config.in_channels)

    @property
    @abstractmethod
    def default_sides(self) -> tuple[int, int]: ...  # of the latent: H, W

    @property
    def scale(self) -> int:
        """Pixels a side of a latent pixel."""
        return int(self.pipeline.vae_scale_factor)

    @abstractmethod
    def _schedule(self, sampler: Any) -> Schedule: ...

    @abstractmethod
    def _inputs(self, latents: Tensor, time: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        """Arguments of the trained part; with guidance those of the negative prompts first, then the prompts'."""

    @abstractmethod
    def _encoded(self, prompt: str, negative: str) -> Sequence[Tensor | None]: ...  # each [1, ...]; None: without

    @torch.no_grad()
    def _encode_uncached(self, prompt: str, negative: str) -> dict[str, Tensor]:
        parts = zip(self.embeddings, self._encoded(prompt, negative), strict=True)
        return {name: value for name, value in parts if value is not None}

    def _output(self, output: Tensor) -> Tensor:
        """The trained part's output as [B, C, H, W]."""
        return output

    def _tokenizers(self) -> list[tuple[Any, int]]:
        """The tokenizers that must not cut a text, and how many tokens each takes."""
        parts = (getattr(self.pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
        return [(part, part.model_max_length) for part in parts if part is not None]

    def _frames(self, config: Any) -> int | None:
        """Frames of a video. Raises UserError for keys of videos if the family draws pictures."""
        for key in ("num_frames", "motion_adapter"):
            if getattr(config, key) is not None:
                raise UserError(f"model.{key} is set, but {config.name!r} draws pictures; leave the key out")
        return None

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        multiple = self.scale * self.patch
        for name, size in (("height", height), ("width", width)):
            if size is not None and size % multiple:
                raise UserError(f"model.{name} is {size}; allowed: multiples of {multiple} for this model")
        sides = zip((height, width), self.default_sides, strict=True)
        return self.channels, *(size // self.scale if size else default for size, default in sides)

    def __call__(self, theta: Tensor, latent: Tensor, timestep: float, conditioning: Conditioning) -> Tensor:
        """Prediction as the latent [B, C, H, W] after guidance, at theta [P], or at each chain's own [B, P]."""
        time = torch.full((), timestep, device=self.device)  # filled there: nothing is copied, nothing waits
        predict = functools.partial(self._predict, time=time)
        if theta.dim() == 1 or self.per_chain:
            return predict(theta, latent, dict(conditioning))
        if self.tuned.apart:
            rows = [{name: value[i : i + 1] for name, value in conditioning.items()} for i in range(len(latent))]
            parts = zip(theta, latent.split(1), rows, strict=True)
            return torch.cat([predict(*part) for part in parts])

        def predict_one(theta: Tensor, latent: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
            single = {name: value[None] for name, value in conditioning.items()}
            return predict(theta, latent[None], single)[0]

        # On the CPU, torch's fused attention has no batching rule and would run chain by chain; the plain one has.
        with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
            return vmap(predict_one)(theta, latent, dict(conditioning))

    def _predict(self, theta: Tensor, latent: Tensor, conditioning: dict[str, Tensor], *, time: Tensor) -> Tensor:
        guided = "negative" in conditioning
        latents = torch.cat([latent, latent]) if guided else latent
        theta = torch.cat([theta, theta]) if guided and theta.dim() == 2 else theta
        (output,) = functional_call(
            self.module,
            self.parameters.unflatten(theta),
            (),
            {**self._inputs(latents.to(self.dtype), time, conditioning), "return_dict": False},
            tie_weights=False,  # where PEFT shares parameters, it shares what holds them; looking for ties takes long
        )
        output = self._output(output).to(latent.dtype)
        if not guided:
            return output
        negative, positive = output.chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def features(self, latents: Tensor, conditioning: Conditioning) -> Tensor:  # [B, C, H, W] -> [B, C', H', W']
        """What the base model's middle block sees of last latents at the last step's noise level; differentiable.

        Costs one forward without guidance. Pooled, see `rlr_ray.models.features`; nothing stays behind in the model.
        """
        positive = {name: value for name, value in conditioning.items() if not name.startswith("negative")}
        with outputs_of(middle_of(getattr(self.pipeline, self.trained))) as seen:
            self(self.initial_theta, latents, self.schedule.timesteps[-1], positive)
        return pooled(seen[0], self.latent_shape, len(latents))

    def _both(self, conditioning: dict[str, Tensor], negative: str, positive: str) -> Tensor:
        parts = [conditioning[name] for name in (negative, positive) if name in conditioning]
        return torch.cat(parts).to(self.dtype)

    def encode(
        self, prompts: Sequence[str], negatives: Sequence[str] = (), columns: Sequence[Mapping[str, Any]] = ()
    ) -> dict[str, Tensor]:
        """Text embeddings by name, each [B, L, D]; a pair's embedding is computed once. Other columns are not drawn."""
        pairs = zip(prompts, negatives or [""] * len(prompts), strict=True)
        rows = [self._encode_one(prompt, negative) for prompt, negative in pairs]
        return {name: torch.cat([row[name] for row in rows]).to(self.device) for name in rows[0]}

    def begin(self, seeds: Sequence[int], conditioning: Conditioning) -> Start:
        starts, noises = chains_noise(seeds, len(self.schedule), self.latent_shape)
        return starts.to(self.device), noises.to(self.device), conditioning

    @functools.cached_property
    def _encode_one(self) -> Callable[[str, str], dict[str, Tensor]]:
        """Embeddings of a pair in main memory; as many as fit in EMBEDDINGS_BYTES are kept, all of one size."""

        def encode(prompt: str, negative: str) -> dict[str, Tensor]:
            return {name: value.cpu() for name, value in self._encode_uncached(prompt, negative).items()}

        size = sum(value.nbytes for value in encode("", "").values())
        return functools.lru_cache(maxsize=max(EMBEDDINGS_BYTES // size, 1))(encode)

    def truncated(self, texts: Sequence[str]) -> list[str]:
        """The texts that are longer than one of the pipeline's tokenizers takes; their ends are cut off."""
        cut: set[str] = set()
        for tokenizer, limit in self._tokenizers() if texts else ():  # the marks of start and end count
            rows = tokenizer(list(texts), verbose=False).input_ids
            cut |= {text for text, row in zip(texts, rows, strict=True) if len(row) > limit}
        return [text for text in texts if text in cut]

    def decode(
        self, latents: Tensor, frames: Sequence[int] | None = None, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Images [B, 3, h, w] in [0, 1] of latents [B, C, H, W]; differentiable."""
        return self._in_slices(self._pictures, latents)

    def _in_slices(self, decode: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
        """Decode so many latents at once as `decode_slice` says, and again for the gradient if that is not all."""
        size = self.decode_slice
        if size is None or size >= len(latents):
            return decode(latents)
        parts = (
            checkpoint(decode, part, use_reentrant=False, preserve_rng_state=False) for part in latents.split(size)
        )
        return torch.cat(list(parts))

    def _pictures(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        images = vae.decode(scaled.to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def weights(self) -> int:
        """Bytes of the pipeline's parameters and buffers."""
        return sum(module_bytes(part) for part in self.pipeline.components.values())

    def save_adapter(self, theta: Tensor, folder: Path, *, also: Sequence[str] = ()) -> Path:
        """See Trained.save."""
        return self.tuned.save(theta, folder, also)

    def load_adapter(self, folder: Path) -> Tensor:  # [P]
        """See Trained.load."""
        return self.tuned.load(folder)


def recomputed(block: nn.Module, *arguments: Any) -> Any:
    """Run a block, and again for its gradient, both times with the parameters that it has now.

    Inside a `functional_call` these are not the module's own. Torch's checkpointing alone would take its own ones the
    second time, when that call is over, and the gradient would silently be of other values.
    """
    swapped = ((name, value) for name, value in block.named_parameters() if not isinstance(value, nn.Parameter))
    now: dict[str, Tensor] = dict(swapped)  # the others, which may be cut among processes, are the block's own
    call = functools.partial(functional_call, block, now, tie_weights=False)
    return checkpoint(call, arguments, use_reentrant=False, preserve_rng_state=False)
