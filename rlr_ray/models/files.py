"""The files of a pipeline: its folder or repository, variants of its weights, and checkpoints in one file."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, GGUFQuantizationConfig

from rlr_ray.errors import UserError
from rlr_ray.utils.environment import path_of

_SUFFIXES = (".safetensors", ".bin")  # of weights


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


def source_of(config: Any) -> Path | str:
    """The folder of a pipeline, or its name on the hub. Raises UserError for a path that can be neither."""
    if not config.path:
        raise UserError("model.path is not set; give the folder of a diffusers pipeline or its name on the hub")
    source = place_of("model.path", config.path)
    if isinstance(source, Path) and not (source / "model_index.json").is_file():
        raise UserError(
            f"model.path {config.path!r} is not a diffusers pipeline: it has no model_index.json; "
            "allowed: a folder written by `pipeline.save_pretrained(folder)`, or a name on the hub"
        )
    if isinstance(source, Path) and config.revision is not None:
        raise UserError(
            f"model.revision is {config.revision!r}, but model.path is a folder, which has none; leave model.revision "
            "out, or give model.path a name on the hub"
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


def pipeline_index(config: Any) -> dict[str, Any]:
    """A pipeline's model_index.json: its class and its parts. Raises UserError if there is none."""
    source = source_of(config)
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(source, revision=config.revision)
    except (OSError, ValueError, TypeError) as error:
        raise could_not("model.path", config.path, "a diffusers pipeline", error) from error
    return index


def class_of_part(library: str, kind: str) -> Any:
    """Of diffusers, transformers, or a module of a pipeline's own."""
    module: Any = {"diffusers": diffusers, "transformers": transformers}.get(library)
    return getattr(module or importlib.import_module(f"diffusers.pipelines.{library}"), kind)


def whole_file(config: Any) -> Path | None:
    """The one file that holds all weights of a pipeline. Raises UserError if there is none, or it cannot be one."""
    if not isinstance(config.single_file, str):
        return None
    file = _file("model.single_file", config.single_file)
    if file.suffix == ".gguf" or config.variant is not None:
        why = "a GGUF file, which holds one part" if file.suffix == ".gguf" else "set beside model.variant"
        raise UserError(
            f"model.single_file {config.single_file!r} is {why}; allowed: a checkpoint of the whole pipeline without "
            "model.variant, or {PART: FILE}, e.g. {transformer: FILE}"
        )
    return file


def parts_in_files(config: Any, index: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's parts that have a file of their own (`model.single_file: {PART: FILE}`), loaded.

    Raises UserError for a part that the pipeline has not, or whose class reads no such file.
    """
    files = config.single_file if isinstance(config.single_file, Mapping) else {}
    return {part: _part_in_file(config, part, _kind(index, part), file) for part, file in files.items()}


def _kind(index: Mapping[str, Any], part: str) -> Any:
    """The class of a part that can be read from a file of its own."""
    parts = {name: entry for name, entry in index.items() if isinstance(entry, list | tuple) and None not in entry}
    kinds = {name: class_of_part(*entry) for name, entry in parts.items() if entry[0] in ("diffusers", "transformers")}
    readers = {name: kind for name, kind in kinds.items() if hasattr(kind, "from_single_file")}
    if part not in readers:
        raise UserError(
            f"model.single_file has {part!r}, which this pipeline does not read from one file; allowed: "
            f"{', '.join(sorted(readers))}, or a checkpoint of the whole pipeline"
        )
    return readers[part]


def _part_in_file(config: Any, part: str, kind: Any, name: str) -> Any:
    key = f"model.single_file.{part}"
    file, dtype = _file(key, name), getattr(torch, config.dtype)
    gguf = {"quantization_config": GGUFQuantizationConfig(compute_dtype=dtype)} if file.suffix == ".gguf" else {}
    configs = {"config": str(source_of(config)), "subfolder": part, "config_revision": config.revision}
    try:
        module = kind.from_single_file(str(file), dtype=dtype, **configs, **gguf)
        missing = [weight for weight, value in module.named_parameters() if value.is_meta]
        if missing:
            raise ValueError(f"it lacks {len(missing)} tensors, e.g. {missing[0]}")
    except Exception as error:  # diffusers' own kinds among them
        raise could_not(
            key, str(file), f"a {kind.__name__} built as model.path says, with all weights", error
        ) from error
    return module


def _file(key: str, name: str) -> Path:
    file = path_of(name)
    if not file.is_file():
        raise UserError(
            f"{key} {name!r}: there is no such file (seen from {Path.cwd()}); of one on the hub, `hf download "
            "OWNER/NAME FILE --local-dir FOLDER` leaves it in a folder"
        )
    return file


def variants_words(config: Any) -> str:
    """Whether weights of a folder are of other variants than the recipe says."""
    source = source_of(config)
    names = [file.name for file in source.glob("*/*")] if isinstance(source, Path) else []
    there = sorted({name.split(".")[1] for name in names if name.endswith(_SUFFIXES) and name.count(".") == 2})
    if not names or config.variant in there or (config.variant is None and not there):
        return ""
    return f"; model.variant is {config.variant or 'not set'}, the folder's variants: {', '.join(there) or 'none'}"
