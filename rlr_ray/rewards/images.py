"""Images in [0, 1] as image encoders expect them, in torch so that gradients pass, and as pictures of 8 bits."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def prepared(images: Tensor, size: int) -> Tensor:  # [B, 3, size, size]
    """Shorter side to `size` (bicubic, antialiased), centre crop, normalised, as CLIP's image processor does.

    images [B, 3, H, W] in [0, 1]. The processor also rounds pixels to 8 bits; here they stay as they are.
    """
    height, width = images.shape[-2:]
    if min(height, width) != size:
        short = min(height, width)
        new = (size * height // short, size * width // short)
        images = functional.interpolate(images, new, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return normalised(images[..., top : top + size, left : left + size])


def padded(images: Tensor, size: int) -> Tensor:  # [B, 3, size, size]
    """Longer side to `size`, black beside the shorter one, normalised, as HPSv2 does."""
    height, width = images.shape[-2:]
    if max(height, width) != size:
        new = [round(side * size / max(height, width)) for side in (height, width)]
        images = functional.interpolate(images, new, mode="bicubic", antialias=True).clamp(0, 1)
    high, wide = (size - side for side in images.shape[-2:])
    images = functional.pad(images, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
    return normalised(images)


def normalised(images: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, dtype=images.dtype, device=images.device) for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean[:, None, None]) / std[:, None, None]


def kind_of(images: Tensor) -> str:
    """The name of what a reward sees: images [B, 3, H, W] or videos [B, F, 3, H, W]."""
    return "image" if images.dim() == 4 else "video"


def pictures(images: Tensor) -> list[Image.Image]:
    """images [B, 3, H, W] in [0, 1]."""
    pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def read_picture(file: Path, mode: str = "RGB") -> Image.Image:
    """A file's picture, upright as its EXIF says, as diffusers' `load_image` has it. Raises ValueError if none."""
    try:
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert(mode)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, of files that are broken or huge
        raise ValueError(str(error)) from error
