"""What a pipeline's call is told: arguments that all chains share, and each chain's own from its prompt's columns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.prompts.prompt import PICTURES, TEXTS, is_tensor

# The chain's own, which nobody else may say.
_OURS = (
    "prompt", "negative_prompt", "num_inference_steps", "timesteps", "sigmas", "eta", "generator", "latents",
    "output_type", "return_dict", "callback", "callback_steps", "callback_on_step_end",
    "callback_on_step_end_tensor_inputs", "num_images_per_prompt", "num_videos_per_prompt",
)  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """What holds of a class of pipelines and its call does not say."""

    alone: bool = False  # it takes one prompt a call
    apart: bool = False  # rows of a call are more than its chains', so numbers of each chain's own take a call each


FACTS = {
    "WanVACEPipeline": Fact(alone=True),
    "WanImageToVideoPipeline": Fact(alone=True),
    "QwenImageEditPipeline": Fact(alone=True),
    "QwenImageEditPlusPipeline": Fact(alone=True),
    "CogVideoXImageToVideoPipeline": Fact(alone=True),
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


def fact_of(pipeline: Any) -> Fact:
    """Raises UserError for a class that cannot be served."""
    name = type(pipeline).__name__
    if name in REFUSED:
        raise UserError(f"a {name} cannot be trained: {REFUSED[name]}; see docs/models.md for classes that can")
    return FACTS.get(name, Fact(apart="PAG" in name))


def call_arguments(pipeline: Any, config: Any, sampler: Any) -> dict[str, Any]:
    """Those that all chains share: `model.call` over what the recipe says elsewhere.

    Raises UserError for what the call does not take, what is the chain's own, and what is said twice.
    """
    signature, kind = inspect.signature(type(pipeline).__call__).parameters, type(pipeline).__name__
    for name in config.call:
        if name in _OURS:
            raise UserError(f"model.call has {name!r}, which the run says itself; leave it out")
        if name not in signature:
            allowed = ", ".join(sorted(set(signature) - {"self", *_OURS}))
            raise UserError(f"model.call has {name!r}, which a {kind} does not take; allowed: {allowed}")
    scale = "true_cfg_scale" if "true_cfg_scale" in signature else "guidance_scale"
    said = {
        "height": (config, "height", "model.height"),
        "width": (config, "width", "model.width"),
        "num_frames": (config, "num_frames", "model.num_frames"),
        scale: (sampler, "guidance_scale", "sampler.guidance_scale"),
    }
    if scale != "guidance_scale":
        said["guidance_scale"] = (sampler, "embedded_guidance_scale", "sampler.embedded_guidance_scale")
    elif sampler.embedded_guidance_scale is not None:
        raise UserError(f"sampler.embedded_guidance_scale is set, but a {kind} has one guidance; leave it out")
    arguments: dict[str, Any] = {}
    for name, (section, key, words) in said.items():
        value, stated = getattr(section, key), key in section.model_fields_set and getattr(section, key) is not None
        if stated and (name in config.call or name not in signature):
            why = f"model.call says {name} too" if name in config.call else f"a {kind} takes no {name}"
            raise UserError(f"{words} is set, but {why}; leave it out")
        if value is not None and name in signature:
            arguments[name] = value
    return {**arguments, **config.call, "output_type": "pt"}


def without_checks(kind: Any) -> dict[str, Any]:
    """Options of a pipeline's class that leave out what looks at finished pictures."""
    taken = inspect.signature(kind).parameters
    options = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}
    return {name: value for name, value in options.items() if name in taken}


class Requests:
    """What chains are asked for, a line each; equal ones have one line."""

    def __init__(self, pipeline: Any):
        self.pipeline, self.kind = pipeline, type(pipeline).__name__
        self.signature = inspect.signature(type(pipeline).__call__).parameters
        self.lines: list[dict[str, Any]] = []
        self._line_of: dict[str, int] = {}

    def add(self, prompt: str, negative: str = "", columns: Mapping[str, Any] | None = None) -> int:
        """The line of a prompt with those of its columns that the call takes. Raises UserError if it cannot be had."""
        own = {
            name: value
            for name, value in (columns or {}).items()
            if name in self.signature and value is not None and (name in (*PICTURES, *TEXTS) or is_tensor(value))
        }
        request: dict[str, Any] = {"prompt": prompt} if "prompt" in self.signature else {}
        if "negative_prompt" in self.signature:
            none = "" if "true_cfg_scale" in self.signature else self.signature["negative_prompt"].default
            request["negative_prompt"] = negative or none
        request = own if any(name.startswith("prompt_embeds") for name in own) else request | own
        key = repr(sorted(request.items()))
        if key not in self._line_of:
            for name, value in own.items():
                _read(name, value)
            self._line_of[key] = len(self.lines)
            self.lines.append(request)
        return self._line_of[key]

    def arguments(self, lines: Sequence[int], *, alone: bool) -> dict[str, Any]:
        """The call's arguments for chains of these lines."""
        rows = [{name: _read(name, value) for name, value in self.lines[line].items()} for line in lines]
        if alone:
            return {name: value for name, value in rows[0].items() if value is not None}
        names = list(rows[0])
        if any(list(row) != names for row in rows):
            raise UserError("some prompts have columns that others lack; give all of a run the same ones")
        columns = {name: [row[name] for row in rows] for name in names}
        return {
            name: self._column(values) for name, values in columns.items() if any(one is not None for one in values)
        }

    def _column(self, values: list[Any]) -> Any:
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        by_row = hasattr(self.pipeline, "encode_prompt")  # then each text is encoded by itself, or is none
        return values if by_row else ["" if value is None else value for value in values]

    def truncated(self, texts: Sequence[str], arguments: Mapping[str, Any]) -> list[str]:
        """The texts that are longer than every tokenizer takes; one that reads all of a text makes up for others."""
        default = self.signature.get("max_sequence_length")
        limit = arguments.get("max_sequence_length", default.default if default is not None else None)
        parts = [part for name, part in self.pipeline.components.items() if name.startswith("tokenizer") and part]
        cut: set[str] | None = None
        for part in parts if texts else ():
            longest = min(part.model_max_length, limit or part.model_max_length)
            rows = part(list(texts), verbose=False).input_ids
            own = {text for text, row in zip(texts, rows, strict=True) if len(row) > longest}
            cut = own if cut is None else cut & own
        return [text for text in texts if text in (cut or ())]


def _read(name: str, value: Any) -> Any:
    """A text, a picture, or a file's one tensor [1, ...], as an embedding that was computed before."""
    if not is_tensor(value):
        return _opened(name, value) if name in PICTURES else value
    try:
        (tensor,) = load_file(Path(value).expanduser()).values()
    except (OSError, ValueError) as error:
        raise UserError(f"the prompt column {name} is {value!r}, a file that holds no one tensor: {error}") from error
    return tensor


def _opened(name: str, value: Any) -> Any:
    """The picture at a path, or pictures of several. Raises UserError if there is none."""
    if isinstance(value, list | tuple):
        return [_opened(name, one) for one in value]
    if not isinstance(value, str):
        return value
    try:
        with PIL.Image.open(Path(value).expanduser()) as picture:
            return picture.convert("L" if "mask" in name else "RGB")
    except (OSError, ValueError) as error:
        raise UserError(
            f"the prompt column {name} is {value!r}, which could not be opened as a picture (looked in {Path.cwd()}): "
            f"{error}; give a path relative to the prompt file"
        ) from error
