"""`rlr-ray evaluate` and `rlr-ray sample`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from rlr_ray.config.recipe import load_config, run_config
from rlr_ray.errors import UserError
from rlr_ray.evaluation.bootstrap import unit
from rlr_ray.evaluation.measure import (
    RunComparison,
    chain_table,
    likeness_table,
    measure,
    save_chains,
    save_pictures,
    score_table,
    summary,
)
from rlr_ray.evaluation.runs import BASE, finished_run, finished_runs, overrides_of, recipe_of
from rlr_ray.evaluation.vbench import VBenchVideos, read_results, vbench_table
from rlr_ray.lab.report import write_json
from rlr_ray.loggers.pictures import save_grid, save_picture, to_show
from rlr_ray.train.picture_engine import PictureEngine, chain_rows
from rlr_ray.utils.console import progress_bar, wide_console
from rlr_ray.utils.environment import prepare_process
from rlr_ray.utils.files import disk_errors
from rlr_ray.utils.memory import memory_errors


@memory_errors()
def evaluate_command(options: argparse.Namespace) -> None:
    console = wide_console()
    if not 0 < options.level < 1:
        raise UserError(f"--level is {options.level:g}; allowed: between 0 and 1, e.g. 0.95")
    runs = finished_runs(options.runs, options.set)
    if options.vbench is not None and (known := read_results(options.vbench, [BASE, *(run.name for run in runs)])):
        console.print(vbench_table(known))
        console.print("read from the results of VBench there; nothing was sampled", markup=False)
        return
    config = recipe_of(options, runs)
    prepare_process(config.threads)
    keep = VBenchVideos(options.vbench, config) if options.vbench is not None else None
    with _progress(console, config.evaluation.chains * (1 + len(runs))) as report:

        def look(name: str, indices: range, images: Tensor) -> None:
            if keep is not None:
                keep(name, indices, images)
            report(name, len(indices))

        comparison = measure(config, runs, look)
    results = [comparison.of_run(number, options.level) for number in range(len(runs))]
    folder = options.out or runs[0].folder / "evaluate"
    with disk_errors():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "chains.json", chain_rows(comparison.seeds, comparison.prompts))
        save_chains(folder, comparison)
        save_pictures(folder, comparison)
        write_json(folder / "evaluate.json", summary(comparison, results, options.level))
    console.print(score_table(comparison, results, options.level))
    console.print(chain_table(comparison))
    console.print(likeness_table(comparison))
    console.print(_words(comparison), markup=False, soft_wrap=True)
    said = f"evaluate.json, evaluate.parquet, chains.json and grids are in {folder}"
    console.print(said if keep is None else f"{said}\n{keep.next_step}", markup=False, soft_wrap=True)


def _words(comparison: RunComparison) -> str:
    """On which the numbers rest."""
    prompts = len(set(comparison.groups))
    lines = [
        f"{len(comparison.seeds)} chains of {prompts} prompts, --seed {comparison.config.evaluation.seed}",
        "intervals are bootstrapped over prompts, so they speak of prompts like these"
        if unit(comparison.groups) == "prompts"
        else "intervals are bootstrapped over chains, so they speak of these prompts alone",
    ]
    lines += [
        f"warning: {model.invalid} scores of {name} were not finite and were replaced"
        for name, model in comparison.models.items()
        if model.invalid
    ]
    return "\n".join([*lines, *comparison.notes])


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[str, int], None]]:
    """Yields what is to be called with every chunk's model and size."""
    with progress_bar(console) as bar:
        task = bar.add_task(BASE, total=total, text="chains")
        yield lambda name, count: bar.update(task, advance=count, description=name)


@memory_errors()
def sample_command(options: argparse.Namespace) -> None:
    console = wide_console()
    if (options.run is None) == (options.config is None):
        raise UserError(
            "sample draws from a run or from a recipe's base model; give RUN or --config RECIPE, one of them"
        )
    if options.count < 1:
        raise UserError(f"--count is {options.count}; allowed: 1 or more")
    overrides = [*options.set, *overrides_of(options)]
    run = finished_run(options.run, options.set) if options.run else None
    config = run_config(run.folder, overrides) if run else load_config(options.config, overrides)
    prepare_process(config.threads)
    engine = PictureEngine(config)
    theta = engine.model.load_adapter(run.folder) if run else engine.model.initial_theta
    folder = options.out or (run.folder if run else Path()) / "sample"
    count = options.count * len(engine.held_out_prompts)
    with disk_errors(), _progress(console, count) as report:
        folder.mkdir(parents=True, exist_ok=True)
        _draw(engine, theta, folder, count, report)
    console.print(f"{count} pictures, a grid of them and chains.json are in {folder}", markup=False, soft_wrap=True)


def _draw(engine: PictureEngine, theta: Tensor, folder: Path, count: int, report: Callable[[str, int], None]) -> None:
    """A file a picture, a grid of the first evaluation.pictures, and what each was drawn from."""
    size, shown = engine.config.sampled_at_once, engine.config.evaluation.pictures
    rows, grid = [], []
    for first in range(0, count, size):
        indices = range(first, min(first + size, count))
        images = engine.sample(theta, indices)[1].cpu()
        for index, row, image in zip(indices, chain_rows(*engine.held_out(indices)), images, strict=True):
            repeat, prompt = divmod(index, len(engine.held_out_prompts))
            row["file"] = save_picture(folder / f"{prompt:04d}_{_slug(row['prompt'])}_{repeat}", image).name
            rows.append(row)
        grid += list(to_show(images[: max(shown - first, 0)]))
        report("pictures", len(indices))
    save_grid(folder / "grid", torch.stack(grid))
    write_json(folder / "chains.json", rows)


def _slug(prompt: str) -> str:
    """A prompt's letters and digits, as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] or "prompt"
