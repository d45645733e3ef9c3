"""The names of classes of diffusers, of the embedded pipelines and of their files. Imports none of them."""

from __future__ import annotations

from typing import Any

from rlr_ray.assets import DIGITS, MOVING_DIGITS
from rlr_ray.errors import UserError

BASE, MOTION = "StableDiffusionPipeline", "AnimateDiffPipeline"
CLASSES = {  # names for some classes of diffusers, other than which they refuse
    "stable_diffusion": BASE,
    "stable_diffusion_xl": "StableDiffusionXLPipeline",
    "stable_diffusion_3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "animatediff": MOTION,
    "wan": "WanPipeline",
}
EMBEDDED = {"digits": DIGITS / "pipeline", "moving_digits": MOVING_DIGITS / "pipeline"}  # of handwritten digits
LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
NAMES = ("auto", *CLASSES, *EMBEDDED)  # allowed for model.name; auto: by the pipeline at model.path


def with_path(config: Any) -> Any:
    """The model's config with the folder of one that lies in the package. Raises UserError for an unknown name."""
    if config.name not in NAMES:
        raise UserError(f"model.name is {config.name!r}; allowed: {', '.join(NAMES)}")
    path = EMBEDDED.get(config.name)
    return config if path is None else config.model_copy(update={"path": str(path)})
