"""Loading the pipeline of a diffusers class."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, MotionAdapter

from rlr_ray.errors import UserError
from rlr_ray.models import Model
from rlr_ray.models.files import (
    could_not,
    parts_in_files,
    pipeline_index,
    place_of,
    source_of,
    variants_words,
    whole_file,
)
from rlr_ray.models.lora_files import merge_lora
from rlr_ray.models.names import BASE, CLASSES, MOTION, with_path
from rlr_ray.models.program import program_of
from rlr_ray.models.quantized import quantized
from rlr_ray.models.sharding import Shards

_ANY_REQUEST: Mapping[str, Any] = MappingProxyType({"prompt": "", "negative": "", "columns": {}})


def load_model(
    config: Any,
    adapter: Any,
    sampler: Any,
    device: torch.device,
    request: Mapping[str, Any] = _ANY_REQUEST,
    stage_of_step: Sequence[int] = (),
    shards: Shards | None = None,
) -> Model:
    """The pipeline that `config` says, with its adapter; `request` is one of those that it will be encoding.

    `stage_of_step` [T] is for chains whose steps see prompts of their own. With `shards` its denoisers' weights are cut
    among processes. Raises UserError if there is none, or it does not take what it is asked for.
    """
    pipeline = load_merged(with_path(config))
    if shards is not None:
        shards.cut_all(pipeline)
    model = program_of(pipeline, config, adapter, sampler, device, request, stage_of_step)
    if shards is not None:
        shards.check(model)
    return model


def class_of(config: Any) -> str:
    """The name of the diffusers class as which a pipeline is run. Raises UserError if its files cannot be had."""
    if config.name in CLASSES:
        return CLASSES[config.name]
    return MOTION if config.motion_adapter is not None else str(pipeline_index(with_path(config))["_class_name"])


def family_of(config: Any, saved: str) -> Any:
    """The class of diffusers that a saved pipeline is loaded as. Raises UserError if the recipe names another."""
    motion = config.motion_adapter is not None
    if motion and saved != BASE:
        raise UserError(
            f"model.motion_adapter is set, but model.path {config.path!r} holds a {saved}; allowed with a {BASE}; "
            "leave the key out"
        )
    kind, named = MOTION if motion else saved, CLASSES.get(config.name)
    if named == MOTION and kind == BASE:
        raise UserError(
            f"model.path {config.path!r} holds a {BASE}, which has no motion modules; set model.motion_adapter to "
            "the folder or hub name of a MotionAdapter, e.g. guoyww/animatediff-motion-adapter-v1-5-2 for Stable "
            "Diffusion 1.5, or leave model.name out for pictures"
        )
    if named not in (None, kind):
        raise UserError(
            f"model.path {config.path!r} holds a {kind}; allowed for model.name {config.name!r}: {named}; leave "
            "model.name out, and the pipeline's own class is taken"
        )
    if not hasattr(diffusers, kind):
        raise UserError(f"model.path {config.path!r} holds a {kind}, which diffusers {diffusers.__version__} has not")
    return getattr(diffusers, kind)


def load_pipeline(config: Any, *, whole: bool = False) -> Any:
    """The pipeline at `config.path`; or Stable Diffusion's there with the modules at `config.motion_adapter`.

    `whole`: with what looks at finished pictures.

    Raises UserError if the folder or hub name does not hold one that the config allows.
    """
    index = pipeline_index(config)
    family, dtype = family_of(config, index["_class_name"]), getattr(torch, config.dtype)
    taken = inspect.signature(family).parameters
    options: dict[str, Any] = {name: None for name in taken if index.get(name) == [None, None]}  # as SD3's T5 may be
    options |= {} if whole else without_checks(taken) | quantized(config, index)
    if config.motion_adapter is not None:
        options["motion_adapter"] = _motion_adapter(config)
    pipeline = _read(family, config, options | parts_in_files(config, index), dtype)
    if "motion_adapter" in taken:
        pipeline.register_modules(motion_adapter=None)  # the unet holds its weights
    if config.motion_adapter is not None:  # whose noise levels are not Stable Diffusion's: betas that are linear
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, beta_schedule="linear")
    if hasattr(pipeline, "upcast_vae") and pipeline.vae.config.force_upcast and pipeline.vae.dtype == torch.float16:
        pipeline.vae.to(torch.float32)  # which float16 overflows
    return pipeline


def load_merged(config: Any, *, whole: bool = False) -> Any:
    """The pipeline, with the LoRA of `config.merge` in its weights."""
    pipeline = load_pipeline(config, whole=whole)
    for path, strength in config.merge.items():
        merge_lora(pipeline, "model.merge", path, strength)
    return pipeline


def _read(family: Any, config: Any, options: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The pipeline from its folder or repository, or its weights from one file."""
    source, file = source_of(config), whole_file(config)
    with without_progress_bars():
        if file is not None:
            return _from_file(family, config, file, {"config": str(source), "dtype": dtype, **options})
        try:
            return family.from_pretrained(
                source, dtype=dtype, variant=config.variant, revision=config.revision, **options
            )
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            words = f"a {family.__name__}{variants_words(config)}"
            raise could_not("model.path", config.path, words, error) from error


def _from_file(family: Any, config: Any, file: Path, options: Mapping[str, Any]) -> Any:
    if not hasattr(family, "from_single_file"):
        raise UserError(
            f"model.single_file is one file, from which diffusers reads no {family.__name__}; allowed: a file for each "
            "part, {PART: FILE}"
        )
    try:
        return family.from_single_file(str(file), revision=config.revision, **options)
    except Exception as error:  # diffusers' own kinds among them
        words = f"a {family.__name__} built as model.path says, with all weights (of a part alone: {{PART: FILE}})"
        raise could_not("model.single_file", str(file), words, error) from error


def without_checks(taken: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a pipeline's class, of those that it takes, that leave out what looks at finished pictures.

    With motion modules also what reads pictures for IP-Adapter.
    """
    options = {"safety_checker": None, "requires_safety_checker": False, "add_watermarker": False}
    if "motion_adapter" in taken:
        options |= {"feature_extractor": None, "image_encoder": None}
    return {name: value for name, value in options.items() if name in taken}


def _motion_adapter(config: Any) -> MotionAdapter:
    path = config.motion_adapter
    try:
        source = place_of("model.motion_adapter", path)
        kind = MotionAdapter.load_config(source).get("_class_name")
        if kind == MotionAdapter.__name__:
            return MotionAdapter.from_pretrained(source, dtype=getattr(torch, config.dtype))
    except (OSError, ValueError, TypeError) as error:
        raise could_not("model.motion_adapter", path, "a MotionAdapter", error) from error
    raise UserError(
        f"model.motion_adapter {path!r} holds a {kind}; allowed: a MotionAdapter, as "
        "`MotionAdapter.save_pretrained(folder)` leaves it"
    )


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Silence while files are read; each library's own setting is as before afterwards."""
    shown = [part for part in (diffusers.utils.logging, transformers.utils.logging) if part.is_progress_bar_enabled()]
    for part in shown:
        part.disable_progress_bar()
    try:
        yield
    finally:
        for part in shown:
            part.enable_progress_bar()
