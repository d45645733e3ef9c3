"""VBench (Huang et al. 2023, arXiv:2311.17982): videos as it wants them, and what it made of them.

A model's videos are `FOLDER/<model>/videos/<prompt>-<number>.mp4`, as its standard prompts ask for; what VBench leaves
of them is looked for as `FOLDER/<model>/**/*_eval_results.json`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from rlr_ray.config.run import RunConfig
from rlr_ray.errors import UserError
from rlr_ray.loggers.pictures import to_pil
from rlr_ray.models.facts import fact_of
from rlr_ray.models.loading import class_of
from rlr_ray.prompts.load import prompt_sets
from rlr_ray.utils.console import table

Results = dict[str, dict[str, float]]  # by model, by dimension: 0 to 1
_LONGEST = 240  # bytes of a file's name
_WEIGHTS = {"dynamic_degree": 0.5}  # of VBench's own averages and of the RLR paper's; every other dimension has 1


class VBenchVideos:
    """Writes held-out chains as they are sampled."""

    def __init__(self, folder: Path, config: RunConfig):
        """Raises UserError for prompts that cannot be a file's name, or if videos cannot be written."""
        self.folder, self.prompts = folder, [prompt.text for prompt in prompt_sets(config).held_out]
        self.rate = fact_of(class_of(config.model)).frames_a_second
        if find_spec("imageio") is None or find_spec("imageio_ffmpeg") is None:
            raise UserError("--vbench writes videos with imageio, which is not installed: pip install rlr-ray[video]")
        for number, prompt in enumerate(self.prompts):
            if prompt in self.prompts[:number]:
                raise UserError(
                    f"--vbench names files by their prompts, as VBench does, and two have the text {prompt!r}; leave "
                    "one out"
                )
            if "/" in prompt or len(prompt.encode()) > _LONGEST:
                raise UserError(
                    f"--vbench names files by their prompts, as VBench does, and {prompt!r} cannot be such a name; "
                    f"allowed: {_LONGEST} bytes without '/'; leave it out"
                )
        names = {self._name(index) for index in range(config.evaluation.chains)}
        others = sorted(path for path in folder.glob("*/videos/*") if path.name not in names)
        if others:
            raise UserError(
                f"{others[0]} is of another evaluation, and VBench would rate both alike; move it away, or give "
                "--vbench another folder"
            )

    def _name(self, index: int) -> str:
        number, prompt = divmod(index, len(self.prompts))
        return f"{self.prompts[prompt]}-{number}.mp4"

    def __call__(self, model: str, indices: range, videos: Tensor) -> None:  # [B, F, 3, H, W]
        if videos.dim() != 5:
            raise UserError("--vbench is for videos, but the model draws pictures; leave it out")
        from diffusers.utils import export_to_video  # here: diffusers takes seconds to import

        folder = self.folder / model / "videos"
        folder.mkdir(parents=True, exist_ok=True)
        for index, video in zip(indices, videos.cpu(), strict=True):
            path = folder / self._name(index)
            # not resized to multiples of 16, which is the default; only odd sides cannot be encoded
            export_to_video(to_pil(video), str(path), fps=self.rate, quality=9, macro_block_size=2)

    @property
    def next_step(self) -> str:
        models = " ".join(shlex.quote(path.name) for path in sorted(self.folder.iterdir()) if path.is_dir())
        return (
            f"videos of {models} are in {self.folder}; where VBench is installed, for each:\n"
            f"    vbench evaluate --videos_path {self.folder}/MODEL/videos --output_path {self.folder}/MODEL\n"
            "(with --mode custom_input if the prompts are not VBench's own), then give this command again"
        )


def read_results(folder: Path, models: Sequence[str]) -> Results:
    """Each model's score in each dimension, the newest file's if several have it; {} if a model has none.

    Raises UserError for files of another kind.
    """
    results = {model: _results_of(folder / model) for model in models}
    return results if all(results.values()) else {}


def _results_of(folder: Path) -> dict[str, float]:
    scores: dict[str, float] = {}
    for file in sorted(folder.glob("**/*_eval_results.json"), key=lambda path: path.stat().st_mtime):
        try:
            results = json.loads(file.read_text("utf-8"))
            scores |= {dimension: _score(dimension, result) for dimension, result in results.items()}
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"{file} is no result of VBench ({error}); allowed: an object with [score, [...]] for each dimension"
            ) from error
    return scores


def _score(dimension: str, result: Any) -> float:
    """The score in `[score, [one for each video, ...]]`; some versions leave imaging quality in percent."""
    score = float(result[0] if isinstance(result, list) else result)
    return score / 100 if dimension == "imaging_quality" and score > 1 else score


def weighted_average(scores: Mapping[str, float]) -> float:
    """Every dimension with weight 1 but the dynamic degree, 0.5, as in the RLR paper's table 3."""
    weights = {dimension: _WEIGHTS.get(dimension, 1.0) for dimension in scores}
    return sum(weights[dimension] * score for dimension, score in scores.items()) / sum(weights.values())


def vbench_table(results: Results) -> Table:
    """In percent, a column a model. The average is of the dimensions that all models have."""
    shared = set.intersection(*(set(scores) for scores in results.values()))
    lines = table("VBench, percent", ("dimension", *results))
    for dimension in dict.fromkeys(name for scores in results.values() for name in scores):
        cells = (scores.get(dimension) for scores in results.values())
        lines.add_row(dimension, *("" if cell is None else f"{100 * cell:.2f}" for cell in cells))
    if shared:
        columns = ({name: scores[name] for name in shared} for scores in results.values())
        lines.add_row("weighted average", *(f"{100 * weighted_average(scores):.2f}" for scores in columns))
    return lines
