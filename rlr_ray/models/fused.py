"""A run's model as a pipeline of its own, with what was trained in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlr_ray.models.facts import fact_of
from rlr_ray.models.loading import load_merged, without_progress_bars
from rlr_ray.models.names import with_path
from rlr_ray.models.trained import Trained


def save_fused(model: Any, adapter: Any, saved: Path, folder: Path) -> str:
    """Save the pipeline of a recipe's `model`, with the adapter that a run left in `saved`; the name of its class.

    It draws what plain diffusers does with the adapter loaded, at every step. Raises UserError if the adapter is not
    that of the recipe, or cannot be merged.
    """
    pipeline = load_merged(with_path(model), whole=True)
    tuned = Trained(pipeline, adapter, fact_of(type(pipeline).__name__).untrained)
    tuned.load(saved)
    tuned.merge()
    with without_progress_bars():
        pipeline.save_pretrained(folder)
    return type(pipeline).__name__
