"""What a pipeline's call is told: arguments that all chains share, and each chain's own from its prompt's columns."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlr_ray.core.seeds import seed_of
from rlr_ray.errors import UserError
from rlr_ray.models.facts import fact_of
from rlr_ray.prompts.prompt import PICTURES, TEXTS, is_tensor
from rlr_ray.rewards.images import read_picture

logger = logging.getLogger(__name__)
# The chain's own, which nobody else may say.
_OURS = (
    "prompt", "negative_prompt", "num_inference_steps", "timesteps", "sigmas", "eta", "generator", "latents",
    "output_type", "return_dict", "callback", "callback_steps", "callback_on_step_end",
    "callback_on_step_end_tensor_inputs", "num_images_per_prompt", "num_videos_per_prompt",
)  # fmt: skip


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
    _check_embedded_guidance(pipeline, sampler, told_apart=scale != "guidance_scale")
    frames = signature["num_frames"].default if "num_frames" in signature else None
    fact = fact_of(kind)
    arguments = fact.arguments(pipeline, frames)
    for name, (section, key, words) in said.items():
        value, stated = getattr(section, key), key in section.model_fields_set and getattr(section, key) is not None
        if stated and (name in config.call or name not in signature):
            why = f"model.call says {name} too" if name in config.call else f"a {kind} takes no {name}"
            raise UserError(f"{words} is set, but {why}; leave it out")
        if value is not None and name in signature:
            arguments[name] = value
    arguments |= config.call
    if fact.most_frames and arguments["num_frames"] > (most := fact.most(pipeline)):
        raise UserError(
            f"model.num_frames is {arguments['num_frames']}; allowed: up to {most} for these motion modules"
        )
    return {**arguments, "output_type": "pt"}


def _check_embedded_guidance(pipeline: Any, sampler: Any, *, told_apart: bool) -> None:
    """Raise UserError if a guidance is to be told to a model that takes none; warn of two guidances at once."""
    scale, config = sampler.embedded_guidance_scale, getattr(getattr(pipeline, "transformer", None), "config", {})
    embeds = config.get("guidance_embeds")  # None: its configuration does not say
    if scale is not None and (embeds is False or not told_apart):
        raise UserError(
            f"sampler.embedded_guidance_scale is {scale:g}, but a {type(pipeline).__name__} of this model takes none; "
            "leave the key out"
        )
    if embeds and told_apart and sampler.guidance_scale > 1:
        logger.warning(
            f"sampler.guidance_scale {sampler.guidance_scale:g} adds classifier-free guidance, at twice the cost, to a "
            "model with guidance of its own; set it to 1 unless prompts have negative ones"
        )


class Requests:
    """What chains are asked for, by a number that follows from what it is, so that no other model's is taken for it."""

    def __init__(self, pipeline: Any):
        self.pipeline, self.kind = pipeline, type(pipeline).__name__
        self.signature = inspect.signature(type(pipeline).__call__).parameters
        self.asked: dict[int, dict[str, Any]] = {}

    def add(self, prompt: str, negative: str = "", columns: Mapping[str, Any] | None = None) -> int:
        """The number of a prompt with those of its columns that the call takes. Raises UserError if one is no file."""
        taken = {
            name: value
            for name, value in (columns or {}).items()
            if name in self.signature and value is not None and (name in (*PICTURES, *TEXTS) or is_tensor(value))
        }
        request: dict[str, Any] = {"prompt": prompt} if "prompt" in self.signature else {}
        if "negative_prompt" in self.signature:
            none = "" if "true_cfg_scale" in self.signature else self.signature["negative_prompt"].default
            request["negative_prompt"] = negative or none
        request = taken if any(name.startswith("prompt_embeds") for name in taken) else request | taken
        number = seed_of(repr(sorted(request.items())))
        if number not in self.asked:
            for name, value in taken.items():
                _read(name, value)
            self.asked[number] = request
        return number

    def arguments(self, numbers: Sequence[int], *, alone: bool) -> dict[str, Any]:
        """The call's arguments for chains of these requests."""
        rows = [{name: _read(name, value) for name, value in self.asked[number].items()} for number in numbers]
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
            long = {text for text, row in zip(texts, rows, strict=True) if len(row) > longest}
            cut = long if cut is None else cut & long
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
        return read_picture(Path(value).expanduser(), "L" if "mask" in name else "RGB")
    except ValueError as error:
        raise UserError(
            f"the prompt column {name} is {value!r}, which could not be opened as a picture (looked in {Path.cwd()}): "
            f"{error}; give a path relative to the prompt file"
        ) from error
