"""Where a run's numbers and pictures go: a logger is one file and its line in LOGGERS, a user's own `module:Class`."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError, first_line
from rlr_ray.utils.environment import concealed, expanded, own_module

log = logging.getLogger(__name__)

LOGGERS = {
    "parquet": "rlr_ray.loggers.parquet:Parquet",
    "tensorboard": "rlr_ray.loggers.tensorboard:TensorBoard",
    "wandb": "rlr_ray.loggers.wandb:WandB",
    "mlflow": "rlr_ray.loggers.mlflow:MLflow",
    "swanlab": "rlr_ray.loggers.swanlab:SwanLab",
    "trackio": "rlr_ray.loggers.trackio:Trackio",
}
_EXTRAS = {"wandb", "mlflow", "swanlab", "trackio"}  # loggers by the package that they need and rlr-ray's extra for it


class Logger:
    """Is told of one run, by its leading process. Its options in the recipe are its constructor's arguments.

    An exception in a method is logged once and ends nothing; the next update is told all the same.
    """

    link: str | None = None  # where people see the run, from `begin` on

    def begin(self, config: RunConfig, folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Start, or go on after `rows`, those of the updates that a resumed run has done."""

    def update(self, row: Mapping[str, Any]) -> None:
        """Take an update's numbers, at row["step"]; after an evaluation held-out ones are among them."""

    def evaluation(self, step: int, images: Tensor) -> None:
        """Take held-out images [n, 3, H, W] in [0, 1], or videos [n, F, 3, H, W], after the update of that step."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """Take the run's summary; pictures before and after lie in its folder."""


def build_loggers(config: RunConfig, *, own: bool = True) -> dict[str, Logger]:
    """The recipe's loggers by name, not begun; `own`: the user's too, whose modules that imports.

    Raises UserError for one that is not there or lacks its package.
    """
    return {name: _build(name, options) for name, options in config.loggers.items() if own or ":" not in name}


def _build(name: str, options: Mapping[str, Any]) -> Logger:
    if name not in LOGGERS and ":" not in name:
        raise UserError(
            f"loggers has {name!r}; allowed: {', '.join(LOGGERS)}, or your own rlr_ray.loggers.registry.Logger as "
            "module:Class"
        )
    if name in _EXTRAS and importlib.util.find_spec(name) is None:
        raise UserError(f"loggers has {name}, whose package is not installed: pip install 'rlr-ray[{name}]'")
    module, _, attribute = LOGGERS.get(name, name).partition(":")
    try:
        logger: Logger = getattr(own_module(module), attribute)(**expanded(options, f"loggers.{name}"))
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(
            f"loggers.{name} cannot be made of {dict(options)}: {concealed(first_line(error))}; its keys are the "
            f"arguments of {LOGGERS.get(name, name)}"
        ) from error
    return logger


class Loggers:
    """All loggers of a run."""

    def __init__(self, config: RunConfig, rows: Sequence[Mapping[str, Any]]):
        self.failed: set[str] = set()  # that said so
        self.begun = build_loggers(config)
        for name in self._tell("begin", config, config.folder, rows):
            del self.begun[name]

    @property
    def links(self) -> dict[str, str]:
        """Where people see the run, by logger."""
        return {name: logger.link for name, logger in self.begun.items() if logger.link}

    def update(self, row: Mapping[str, Any]) -> None:
        self._tell("update", row)

    def evaluation(self, step: int, images: Tensor) -> None:
        self._tell("evaluation", step, images)

    def end(self, summary: Mapping[str, Any]) -> None:
        self._tell("end", summary)

    def _tell(self, method: str, *arguments: Any) -> list[str]:
        """Call a method of all; returns the names of those that failed."""
        failed = []
        for name, logger in self.begun.items():
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:  # whatever a tracker's package, its server or a disk comes up with
                failed.append(name)
                if name not in self.failed:
                    text = concealed(first_line(error))
                    log.warning(f"logger {name}: {type(error).__name__}: {text}; the run goes on")
                    log.debug(f"logger {name}: ", exc_info=error)
        self.failed.update(failed)
        return failed
