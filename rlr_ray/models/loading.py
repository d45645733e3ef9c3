"""Finding and loading a pipeline of a diffusers class, and what is said when it is not one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from rlr_ray.errors import UserError
from rlr_ray.models import Model, families

FAMILIES = {  # model.name by the class of a pipeline
    "StableDiffusionPipeline": "stable_diffusion",
    "StableDiffusionXLPipeline": "stable_diffusion_xl",
    "StableDiffusion3Pipeline": "stable_diffusion_3",
    "FluxPipeline": "flux",
    "AnimateDiffPipeline": "animatediff",
    "WanPipeline": "wan",
}


def place_of(key: str, path: str) -> Path | str:
    """A folder, or else a name on the hub. Raises UserError for a path that can be neither."""
    folder = Path(path).expanduser()
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
    """What is said of files that are no such thing, or that are not to be had."""
    unseen = (
        " (there is no such folder, so it was looked for on the hub; where the hub is not reached, give a folder, "
        f"as `hf download {path} --local-dir FOLDER` writes it)"
    )
    where = "" if isinstance(place_of(key, path), Path) else unseen
    return UserError(f"{key} {path!r} could not be loaded as {kind}{where}: {error}")


def pipeline_index(config: Any, family: Any, words: str) -> dict[str, Any]:
    """What a pipeline's model_index.json says: its class and its parts. Raises UserError if there is none."""
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
    other = FAMILIES.get(found)
    remedy = f"set model.name: {other}" if other else f"pipelines that work are {', '.join(FAMILIES)}"
    raise UserError(
        f"model.path {config.path!r} holds a {found}; allowed for model.name {config.name!r}: {family.__name__}; "
        f"{remedy}"
    )


def load_pipeline(config: Any, family: Any, words: str, *, also: Sequence[str] = (), **options: Any) -> Any:
    """Load a pipeline of a diffusers class, `also` from the parts of another's.

    Raises UserError if the folder or hub name does not hold one.
    """
    index = pipeline_index(config, family, words)
    refuse_other_class(config, index["_class_name"], family, also)
    diffusers.utils.logging.disable_progress_bar()  # of reading files; those of downloads stay
    transformers.utils.logging.disable_progress_bar()
    taken = inspect.signature(family).parameters
    left_out = {name: None for name in taken if index.get(name) == [None, None]}  # as SD3's T5 may be
    try:
        source, dtype = source_of(config, words), getattr(torch, config.dtype)
        return family.from_pretrained(source, dtype=dtype, **left_out | options)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise could_not("model.path", config.path, f"a {words} pipeline", error) from error


def available_models() -> list[str]:
    """Names of the models in this folder; imports every family."""
    return [name for name in _files() if hasattr(importlib.import_module(f"{families.__name__}.{name}"), "load")]


def _files() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(families.__path__)]


def load_model(config: Any, adapter: Any, sampler: Any, device: torch.device) -> Model:
    """The model that `config.name` says, with its adapter. Raises UserError if there is none of that name."""
    family: Any = importlib.import_module(f"{families.__name__}.{config.name}") if config.name in _files() else None
    if not hasattr(family, "load"):
        raise UserError(f"model.name is {config.name!r}; allowed: {', '.join(available_models())}")
    model: Model = family.load(config, adapter, sampler, device)
    return model


def frames_a_second(name: str) -> int:
    """Of the videos that the model of this name was trained on: its file's FRAMES_A_SECOND."""
    return int(getattr(importlib.import_module(f"{families.__name__}.{name}"), "FRAMES_A_SECOND", 8))
