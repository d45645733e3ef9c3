"""The table of models, and loading the pipeline of a diffusers class."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import torch
import transformers

from rlr_ray.assets import DIGITS, MOVING_DIGITS
from rlr_ray.errors import UserError
from rlr_ray.models import Model
from rlr_ray.models.sharding import Shards, cut, cutting
from rlr_ray.utils.environment import path_of


class Entry(NamedTuple):
    """A model without its code, which takes seconds to import."""

    place: str  # file:Class of rlr_ray/models; the file has `load(config, adapter, sampler, device, request) -> Class`
    pipeline: str  # the class of diffusers
    frames_a_second: int = 8  # of the videos that it was trained on
    path: Path | None = None  # of a model that lies in the package; else model.path says where it is


MODELS = {  # by model.name
    "stable_diffusion": Entry("families.stable_diffusion:StableDiffusion", "StableDiffusionPipeline"),
    "stable_diffusion_xl": Entry("families.stable_diffusion_xl:StableDiffusionXL", "StableDiffusionXLPipeline"),
    "stable_diffusion_3": Entry("families.stable_diffusion_3:StableDiffusion3", "StableDiffusion3Pipeline"),
    "flux": Entry("families.flux:Flux", "FluxPipeline"),
    "animatediff": Entry("families.animatediff:AnimateDiff", "AnimateDiffPipeline"),
    "wan": Entry("families.wan:Wan", "WanPipeline", frames_a_second=16),
    # any other class of one denoising loop, by its own call
    "pipeline": Entry("program:Program", "DiffusionPipeline"),
    # small ones, which write handwritten digits (rlr_ray/assets/*/README.md)
    "digits": Entry("families.stable_diffusion:StableDiffusion", "StableDiffusionPipeline", path=DIGITS / "pipeline"),
    "moving_digits": Entry("families.animatediff:AnimateDiff", "AnimateDiffPipeline", path=MOVING_DIGITS / "pipeline"),
}


_ANY_REQUEST: Mapping[str, Any] = MappingProxyType({"prompt": "", "negative": "", "columns": {}})


def load_model(
    config: Any,
    adapter: Any,
    sampler: Any,
    device: torch.device,
    request: Mapping[str, Any] = _ANY_REQUEST,
    shards: Shards | None = None,
) -> Model:
    """The model that `config.name` says, with its adapter; `request` is one of those that it will be encoding.

    With `shards` its denoisers' weights are cut among processes. Raises UserError if there is none of that name.
    """
    file = importlib.import_module(f"rlr_ray.models.{entry_of(config).place.partition(':')[0]}")
    with cutting(shards):
        model: Model = file.load(with_path(config), adapter, sampler, device, request)
    if shards is not None:
        shards.check(model)
    return model


def entry_of(config: Any) -> Entry:
    """The line of a model's name; of auto that of the class of its pipeline, and `pipeline` for one that has no line.

    Raises UserError if there is no model of this name, or its files cannot be had.
    """
    if config.name not in (*MODELS, "auto"):
        raise UserError(f"model.name is {config.name!r}; allowed: auto, {', '.join(MODELS)}")
    if config.name != "auto":
        entry = MODELS[config.name]
    else:
        kind = pipeline_index(config, diffusers.DiffusionPipeline, "diffusers")["_class_name"]
        others = (entry for entry in MODELS.values() if entry.path is None and entry.pipeline == kind)
        entry = MODELS["pipeline"] if config.call else next(others, MODELS["pipeline"])
    if config.call and entry is not MODELS["pipeline"]:
        raise UserError(f"model.call is set, but model.name is {config.name!r}; allowed with it: pipeline, or auto")
    return entry


def with_path(config: Any) -> Any:
    """The model's config with the folder of one that lies in the package."""
    path = entry_of(config).path
    return config if path is None else config.model_copy(update={"path": str(path)})


def place_of(key: str, path: str) -> Path | str:
    """A folder, or else a name on the hub. Raises UserError for a path that can be neither."""
    folder = path_of(path)
    if folder.exists():
        return folder
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise UserError(
            f"{key} {path!r}: there is no such folder (seen from {Path.cwd()}), and a name on the hub is OWNER/NAME; "
            "correct the path"
        )
    return path


def source_of(config: Any, words: str) -> Path | str:
    """The folder of a pipeline, or its name on the hub. Raises UserError for a path that can be neither."""
    if not config.path:
        raise UserError(f"model.path is not set; give the folder of a {words} pipeline or its name on the hub")
    source = place_of("model.path", config.path)
    if isinstance(source, Path) and not (source / "model_index.json").is_file():
        raise UserError(
            f"model.path {config.path!r} is not a diffusers pipeline: it has no model_index.json; "
            "allowed: a folder written by `pipeline.save_pretrained(folder)`, or a name on the hub"
        )
    return source


def could_not(key: str, path: str, kind: str, error: Exception) -> UserError:
    """The error of files that are no such thing, or that are not to be had."""
    unseen = (
        " (there is no such folder, so it was looked for on the hub; where the hub is not reached, give a folder, "
        f"as `hf download {path} --local-dir FOLDER` writes it)"
    )
    where = "" if isinstance(place_of(key, path), Path) else unseen
    return UserError(f"{key} {path!r} could not be loaded as {kind}{where}: {error}")


def pipeline_index(config: Any, family: Any, words: str) -> dict[str, Any]:
    """A pipeline's model_index.json: its class and its parts. Raises UserError if there is none."""
    source = source_of(config, words)
    try:
        index: dict[str, Any] = family.load_config(source)
    except (OSError, ValueError, TypeError) as error:
        raise could_not("model.path", config.path, f"a {words} pipeline", error) from error
    return index


def refuse_other_class(config: Any, found: str, family: Any, also: Sequence[str] = ()) -> None:
    """Raise UserError if the pipeline found is not of the family's class, nor of one that will do `also`."""
    if found in (family.__name__, *also):
        return
    names = {entry.pipeline: name for name, entry in MODELS.items() if entry.path is None}
    remedy = f"set model.name: {names[found]}" if found in names else f"pipelines that work are {', '.join(names)}"
    raise UserError(
        f"model.path {config.path!r} holds a {found}; allowed for model.name {config.name!r}: {family.__name__}; "
        f"{remedy}, or model.name: pipeline for any"
    )


def load_pipeline(config: Any, family: Any, words: str, *, also: Sequence[str] = (), **options: Any) -> Any:
    """Load a pipeline of a diffusers class, `also` from the parts of another's.

    Raises UserError if the folder or hub name does not hold one.
    """
    index = pipeline_index(config, family, words)
    refuse_other_class(config, index["_class_name"], family, also)
    taken = inspect.signature(family).parameters
    left_out = {name: None for name in taken if index.get(name) == [None, None]}  # as SD3's T5 may be
    try:
        source, dtype = source_of(config, words), getattr(torch, config.dtype)
        with _without_progress_bars():
            pipeline = family.from_pretrained(source, dtype=dtype, **left_out | options)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise could_not("model.path", config.path, f"a {words} pipeline", error) from error
    cut(pipeline)
    return pipeline


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Silence while files are read; each library's own setting is as before afterwards."""
    shown = [part for part in (diffusers.utils.logging, transformers.utils.logging) if part.is_progress_bar_enabled()]
    for part in shown:
        part.disable_progress_bar()
    try:
        yield
    finally:
        for part in shown:
            part.enable_progress_bar()
