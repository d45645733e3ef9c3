"""The size of a model, from the config files of its pipeline: its modules are built on torch's meta device.

Nothing of their weights is read or held, so this needs no more than a pipeline's files without its weights.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError, first_line
from rlr_ray.models import module_bytes
from rlr_ray.models.adapters import trainable
from rlr_ray.models.files import class_of_part, source_of
from rlr_ray.models.loading import family_of, without_checks
from rlr_ray.models.names import with_path
from rlr_ray.models.program import Program, program_of
from rlr_ray.models.weightless import weightless
from rlr_ray.prompts.load import prompt_sets
from rlr_ray.rewards.mixture import view_of
from rlr_ray.utils.memory import GIB

_META = torch.device("meta")


class Unknown(Exception):
    """Why sizes cannot be told."""


@dataclass(frozen=True)
class Sizes:
    model: Program  # without weights: its latent's shape and its schedule are true
    parts: dict[str, tuple[int, int]]  # by name: parameters, the adapter's left out, and bytes with buffers

    @property
    def trained(self) -> int:  # P
        return len(self.model.tuned)


def sizes_of(config: RunConfig) -> Sizes:
    """The pipeline's own call is run, with modules that tell shapes alone.

    Raises Unknown if the config files are not to be had, UserError if model and adapter do not go together.
    """
    keys, request = with_path(config.model), prompt_sets(config).train[0].request
    folder = _config_files(source_of(keys), keys.revision)
    if keys.motion_adapter is not None:
        raise Unknown("they are not told of a pipeline with a motion adapter from elsewhere")
    try:
        index = diffusers.DiffusionPipeline.load_config(folder)
        family = family_of(keys, index["_class_name"])
        pipeline = weightless(_pipeline(folder, index, family, getattr(torch, keys.dtype)))
    except UserError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, LookupError, ImportError, RuntimeError) as error:
        raise Unknown(_NEEDED.format(path=keys.path, error=first_line(error))) from error
    model = program_of(pipeline, keys, config.adapter, config.sampler, torch.device("cpu"), request)
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return Sizes(model, {name: _frozen(part) for name, part in modules.items()})


def _frozen(part: nn.Module) -> tuple[int, int]:
    """Its parameters, those of the adapter left out, and their bytes with the buffers'."""
    count = sum(parameter.numel() for parameter in part.parameters() if not parameter.requires_grad)
    return count, module_bytes(part) - sum(value.nbytes for value in trainable(part).values())


_NEEDED = (
    "the config files of the pipeline {path!r} could not be read ({error}); give model.path a folder with all but its "
    "weights, as `hf download NAME --exclude '*.safetensors' '*.bin' --local-dir FOLDER` writes it"
)


def _config_files(source: Path | str, revision: str | None) -> Path:
    """The folder, or that of a hub's small files. Raises Unknown if the hub is not reached."""
    if isinstance(source, Path):
        return source
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=[
                    "model_index.json",
                    "*/*config.json",
                    "tokenizer*/*",
                    "*processor*/*",
                    "feature_extractor/*",
                ],
                etag_timeout=5,
            )
        )
    except (OSError, ValueError) as error:  # its errors of network, names and access are of these
        raise Unknown(_NEEDED.format(path=source, error=first_line(error))) from error


def _pipeline(folder: Path, index: dict[str, Any], family: Any, dtype: torch.dtype) -> Any:
    taken = inspect.signature(family.__init__).parameters
    parts: dict[str, Any] = {}
    for name in taken:
        kind = index.get(name)
        if not isinstance(kind, list | tuple):
            parts |= {} if kind is None else {name: kind}  # a plain option of the pipeline
        elif name == "motion_adapter" or None in kind:  # the unet holds it
            parts[name] = None
        else:
            library, part = kind
            parts[name] = _part(folder / name, class_of_part(library, part), dtype)
    return family(**parts | without_checks(taken))


def _part(folder: Path, part_class: Any, dtype: torch.dtype) -> Any:
    """A scheduler, a module without weights, or what reads texts and pictures."""
    if issubclass(part_class, diffusers.SchedulerMixin):
        return part_class.from_pretrained(folder)
    if issubclass(part_class, diffusers.ModelMixin):
        config = part_class.load_config(folder)
        with _META:
            return nn.Module.to(part_class.from_config(config), dtype)  # its own `to` warns of parts kept in float32
    if issubclass(part_class, transformers.PreTrainedModel):
        config = part_class.config_class.from_pretrained(folder)
        with _META:
            part = part_class(config).to(dtype)
        for name, module in part.named_modules():  # which transformers never halves, as T5's wo
            if dtype == torch.float16 and name.split(".")[-1] in (part_class._keep_in_fp32_modules or ()):
                module.float()
        return part
    return part_class.from_pretrained(folder)


def describe_sizes(config: RunConfig) -> str:
    """Memory of the model, the adapter and a chain, as far as the pipeline's config files tell.

    Raises UserError if model and adapter do not go together, or if half order may end at a step without noise.
    """
    unmeasured = (
        "not known without a measurement: activations of denoiser, VAE and reward, and the reward's own weights; "
        "`rlr-ray plan` and `rlr-ray lab` measure memory, memory_budget_gib holds a run to a limit"
    )
    try:
        sizes = sizes_of(config)
    except Unknown as unknown:
        return f"sizes: unknown; {unknown}\n{unmeasured}"
    model, dtype = sizes.model, config.model.dtype
    shape = config.shape_on(model.schedule)
    for label, reward in {**config.rewards, **config.evaluation.judges}.items():
        view_of(label, reward, model.frames)
    latent, steps, chunk = 4 * prod(model.latent_shape), len(model.schedule), config.train.chunk_size
    rows = {**sizes.parts, "together": tuple(map(sum, zip(*sizes.parts.values(), strict=True)))}
    width = max(map(len, rows))
    before = f"{dtype}, before model.quantization" if config.model.quantization else dtype
    trained = f"{sizes.trained:,} numbers in {model.trained}"
    return "\n".join(
        [
            f"sizes, from the pipeline's config files, weights in {before}, in every process that draws pictures:",
            *(f"  {name:{width}}  {count:>16,} parameters  {_size(size)}" for name, (count, size) in rows.items()),
            f"trained: {trained} (P), float32: {_size(4 * sizes.trained)}; AdamW's state {_size(8 * sizes.trained)}",
            f"latent: {' x '.join(map(str, model.latent_shape))}, float32; a chain of {steps} steps, with its noises, "
            f"{_size((2 * steps + 1) * latent)}; {chunk} at once (train.chunk_size): "
            f"{_size(chunk * (2 * steps + 1) * latent)}",
            *([f"plan on this model's schedule (adapter.off_below): {shape}"] if shape.off else []),
            unmeasured,
        ]
    )


def _size(count: float) -> str:  # of bytes
    unit, name = next((u, n) for u, n in ((GIB, "GiB"), (2**20, "MiB"), (1024, "KiB")) if count >= u / 10 or u == 1024)
    return f"{count / unit:.2f} {name}"
