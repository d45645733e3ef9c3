"""Models: diffusers pipelines, each run by its own call; what differs by class stands in models/facts.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rlr_ray.core.sampler import Conditioning, Start
from rlr_ray.core.schedule import Schedule

DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")  # parts that steps call, and that are trained


class Model(Protocol):
    """A pipeline seen as a denoiser (see rlr_ray.core.sampler.Denoiser) with what the chain needs around it."""

    schedule: Schedule
    latent_shape: tuple[int, ...]  # C, H, W; of a video C, F, H, W; as it is packed, of some
    frames: int | None  # of a video that `decode` gives; None: it gives images
    initial_theta: Tensor  # [P], where training begins
    base_theta: Tensor  # [P], of the model without what adapter.from brings; else the same

    def __call__(self, theta: Tensor, latent: Tensor, timestep: float, conditioning: Conditioning) -> Tensor: ...

    def encode(
        self,
        prompts: Sequence[str | Sequence[str]],  # or those of a chain's stages
        negatives: Sequence[str] = (),  # (): all empty
        columns: Sequence[Mapping[str, Any]] = (),  # the prompts' others, as pictures to start from
    ) -> Conditioning: ...

    def begin(self, seeds: Sequence[int], conditioning: Conditioning) -> Start:
        """First latents, noises and conditioning of chains that the plain pipeline draws with one generator a seed."""

    def truncated(self, texts: Sequence[str]) -> list[str]: ...  # those that a tokenizer cuts

    def decode(
        self, latents: Tensor, frames: Sequence[int] | None = None, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Images [B, 3, h, w], or videos [B, n, 3, h, w] of these frames (None: of all), in [0, 1]; differentiable.

        Latents may be of the chains of a conditioning n times over; without it, of any.
        """

    def as_pictures(self, latents: Tensor) -> Tensor: ...  # [B, C, (F,) H, W], whose places are those of the picture

    def features(self, latents: Tensor, conditioning: Conditioning) -> Tensor:
        """What the base model sees in its middle of last latents [B, C, H, W]: [B, C', H', W'], differentiable."""

    @property
    def described(self) -> dict[str, Any]: ...  # what plain diffusers needs to draw the same

    def weights(self) -> int: ...  # bytes that stay loaded

    def save_adapter(self, theta: Tensor, folder: Path, *, also: Sequence[str] = ()) -> Path: ...

    def load_adapter(self, folder: Path) -> Tensor: ...  # theta [P] that was saved in the folder


def module_bytes(module: object) -> int:
    """Bytes of the parameters and buffers of a module, or of what stands for one; 0 for what has none."""
    if not hasattr(module, "parameters") or not hasattr(module, "buffers"):
        return 0
    tensors = (*module.parameters(), *module.buffers())
    return sum(map(_bytes, tensors))


def _bytes(tensor: Any) -> int:
    """Of a tensor that is made of others, as one that is cut among processes or quantised, theirs that are here."""
    if hasattr(tensor, "__tensor_flatten__"):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return sum(_bytes(one) for one in inner if isinstance(one, Tensor))
    return int(tensor.numel() * tensor.element_size())
