"""What holds of a class of diffusers pipelines and its call does not say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlr_ray.errors import UserError


@dataclass(frozen=True)
class Fact:
    alone: bool = False  # it takes one prompt a call
    apart: bool = False  # rows of a call are more than its chains', so numbers of each chain's own take a call each
    # Which latent frames a frame is decoded from, where latents are [B, C, F, H, W]: its own, or its own and all before
    # it, of which each but the first makes `vae_scale_factor_temporal` frames; None: all
    decoded_from: Literal["own", "before"] | None = None
    frames_a_second: int = 8  # of the videos that it was trained on
    most_frames: str = ""  # the part and its config's entry that say how many frames a video has at most
    tokens_without_guidance: int | None = None  # of a text, if the transformer is told no guidance
    untrained: str = ""  # a pattern of names of layers that cannot have an adapter
    whole: tuple[str, ...] = ()  # its arguments that part what model.decode_slice parts here

    def decoded(self, pipeline: Any, frames: Sequence[int]) -> tuple[list[int], list[int]]:
        """Which latent frames to decode to see these of a video, and where those are among what they make.

        A causal VAE makes r (F - 1) + 1 frames of F latent ones; frame i depends on those up to i / r, rounded up.
        """
        if self.decoded_from == "own":
            return list(frames), list(range(len(frames)))
        needed = math.ceil(max(frames) / pipeline.vae_scale_factor_temporal) + 1
        return list(range(needed)), list(frames)

    def frames(self, pipeline: Any, latent_frames: int) -> int:
        """Frames of a video whose latents have so many."""
        if self.decoded_from == "own":
            return latent_frames
        return int(pipeline.vae_scale_factor_temporal) * (latent_frames - 1) + 1

    def arguments(self, pipeline: Any, default_frames: int | None) -> dict[str, Any]:
        """What the call is told unless the recipe says otherwise."""
        told: dict[str, Any] = dict.fromkeys(self.whole, 2**31)
        if self.most_frames and default_frames is not None:
            told["num_frames"] = min(default_frames, self.most(pipeline))
        if self.tokens_without_guidance and not pipeline.transformer.config.guidance_embeds:
            told["max_sequence_length"] = self.tokens_without_guidance
        return told

    def most(self, pipeline: Any) -> int:
        """Frames of a video at most."""
        part, _, entry = self.most_frames.partition(".")
        return int(getattr(pipeline, part).config[entry])


_ALONE, _WAN = Fact(alone=True), Fact(decoded_from="before", frames_a_second=16)
_FACTS = {
    "AnimateDiffPipeline": Fact(
        decoded_from="own",
        most_frames="unet.motion_max_seq_length",
        untrained=r"motion_modules\.\d+\.proj_(in|out)\.",  # diffusers calls them as PEFT's layers cannot be
        whole=("decode_chunk_size",),
    ),
    "CogVideoXImageToVideoPipeline": _ALONE,
    "FluxPipeline": Fact(tokens_without_guidance=256),  # FLUX.1 schnell
    "QwenImageEditPipeline": _ALONE,
    "QwenImageEditPlusPipeline": _ALONE,
    "WanImageToVideoPipeline": Fact(alone=True, frames_a_second=16),
    "WanPipeline": _WAN,
    "WanVACEPipeline": Fact(alone=True, frames_a_second=16),
    "WanVideoToVideoPipeline": Fact(frames_a_second=16),
}
REFUSED = {  # by class
    "HiDreamImagePipeline": "its experts run under torch.no_grad, so a part of the gradient would be missing",
    "HunyuanImagePipeline": "its guidance has a momentum, so a step's output is no function of its input",
    "HunyuanImageRefinerPipeline": "its guidance has a momentum, so a step's output is no function of its input",
    "CosmosTextToWorldPipeline": "it computes EDM's steps itself",
    "CosmosVideoToWorldPipeline": "it computes EDM's steps itself",
    "Cosmos2TextToImagePipeline": "it computes EDM's steps itself",
    "Cosmos2VideoToWorldPipeline": "it computes EDM's steps itself",
    "StableCascadeCombinedPipeline": "it is several pipelines, one after the other",
    "StableCascadeDecoderPipeline": "it is one stage of several",
    "StableCascadePriorPipeline": "it is one stage of several",
    "HeliosPyramidPipeline": "it has several stages of noise",
    **dict.fromkeys(("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"), "SCM, its scheduler, steps otherwise"),
    **dict.fromkeys(
        (f"IF{kind}Pipeline" for kind in ("", "Img2Img", "Inpainting", "SuperResolution")),
        "its model draws pixels and predicts a variance too",
    ),
}


def fact_of(kind: str) -> Fact:
    """Of the class of that name. Raises UserError if it cannot be served."""
    if kind in REFUSED:
        raise UserError(f"a {kind} cannot be trained: {REFUSED[kind]}; see docs/models.md for classes that can")
    return _FACTS.get(kind, Fact(apart="PAG" in kind))
