"""Numbers that are not finite, named by the part of a pipeline that they came from."""

from __future__ import annotations

from torch import Tensor

from rlr_ray.core.sampler import Conditioning
from rlr_ray.errors import UserError


def check_finite(images: Tensor, latents: Tensor, conditioning: Conditioning, dtype: str) -> None:
    """Raise UserError if a picture is not finite; it says which part's output was the first that is not.

    Images are [B, ...] of last latents [B, ...] of chains with that conditioning; `dtype` is the weights'.
    """
    count = int((~finite_rows(images)).sum())
    if not count:
        return
    encoded = [value for value in conditioning.values() if value.is_floating_point()]
    if not all(bool(value.isfinite().all()) for value in encoded):
        place = "the text encoder: embeddings of prompts are not finite"
    elif not bool(latents.isfinite().all()):
        place = "the denoiser: the last latents are not finite, and the embeddings of prompts are"
    else:
        place = "the VAE: the last latents are finite"
    remedy = (
        "set model.dtype: bfloat16 or float32, since float16 ends at 65504"
        if dtype == "float16"
        else "if the base model draws finite pictures, lower train.learning_rate; else its weights are broken"
    )
    raise UserError(
        f"{count} of {len(images)} pictures are not finite (NaN or infinity), and that came from {place}; {remedy}; to "
        "go on without such pictures set rewards.LABEL.invalid to a number for every reward"
    )


def finite_rows(images: Tensor) -> Tensor:  # [B, ...] -> [B]
    """Which pictures are."""
    return images.detach().flatten(1).isfinite().all(1)
