"""A run of the digits whose last step is the base model's: what it says, and its pictures in plain diffusers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from rlr_ray.assets import DIGITS
from rlr_ray.cli import main
from rlr_ray.cli.train import describe_results
from rlr_ray.config.run import RunConfig
from rlr_ray.core.sampler import Sampler
from rlr_ray.models.sizes import describe_sizes
from rlr_ray.train.engine import Engine
from rlr_ray.train.run_folder import RunFolder
from tests.runs import short_run, train_here

DOCS = Path(__file__).parents[2] / "docs"
SNIPPET = re.compile(r"```python\n(import json, torch\n.*?)```", re.S)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = short_run(
        tmp_path_factory.mktemp("runs"),
        sampler={"steps": 10},
        estimator={"first_order": {"steps": "all"}, "sub_chain": {"length": 0}, "rest": "none"},
        train={"iterations": 2, "chains": 4, "chains_per_prompt": 2, "learning_rate": 0.3},
        evaluation={"chains": 4},
    )
    train_here(config, shown=True)
    return config


def test_the_summary_says_which_steps_are_off_and_what_each_diverges(finished: RunConfig) -> None:
    summary = RunFolder(finished).load_summary()
    assert summary["steps_off"] == [9] and summary["plan"].startswith("10 steps, the last without the adapter: ")
    assert summary["kl_by_step"][9] == 0 and min(summary["kl_by_step"][:9]) > 0
    assert summary["kl"] == pytest.approx(sum(summary["kl_by_step"]), rel=1e-5)
    assert summary["denoiser_backwards"] == 2 * 4 * 10  # the last step's passes the gradient on
    assert "the adapter is off at step 9; in plain" in describe_results(RunFolder(finished))
    assert f"(adapter.off_below): {summary['plan']}\n" in describe_sizes(finished)  # before there is a run


def test_what_is_drawn_and_what_trains_are_the_same_chains(finished: RunConfig) -> None:
    """Held-out pictures, training's rewards and rollouts, written out with the base model's last step."""
    engine = Engine(finished)
    theta, base = engine.model.load_adapter(finished.folder), engine.model.initial_theta
    start = engine.start(*engine.held_out(range(2)))
    plain, latent = Sampler(engine.model, engine.model.schedule), start[0]
    with torch.no_grad():
        for k in range(10):
            latent = plain.step(base if k == 9 else theta, k, latent, start[1][k], start[2])
        images = engine.model.decode(latent)
    trajectory, drawn = engine.sample(theta, range(2))
    torch.testing.assert_close(trajectory.latents[-1], latent)
    torch.testing.assert_close(drawn, images)
    torch.testing.assert_close(engine.sampler.sample(theta, *start).latents[-1], latent)
    assert (plain.sample(theta, *start).latents[-1] - latent).abs().max() > 1e-3


def test_the_documents_snippet_draws_the_pictures_of_sample(finished: RunConfig, tmp_path: Path) -> None:
    (snippet,) = SNIPPET.findall((DOCS / "evaluate.md").read_text("utf-8"))
    callback = re.search(r"off = json.*?return \{\}\n", (DOCS.parent / "README.md").read_text("utf-8"), re.S)
    assert callback is not None and all(line in snippet for line in callback[0].splitlines())
    assert main(["sample", str(finished.folder), "--out", str(tmp_path / "sample")]) == 0
    first = json.loads((tmp_path / "sample" / "chains.json").read_text())[0]
    expected = numpy.asarray(Image.open(tmp_path / "sample" / first["file"]), float)
    for place, found in (("rlr_ray/assets/digits", DIGITS), ("runs/digits", finished.folder)):
        assert place in snippet
        snippet = snippet.replace(place, str(found))
    drawn = []
    for text in (snippet, re.sub(r"callback_on_step_end=\w+", "callback_on_step_end=None", snippet)):
        names: dict[str, Any] = {}
        exec(text.replace("again.png", str(tmp_path / "again.png")), names)
        drawn.append(numpy.asarray(Image.open(tmp_path / "again.png"), float))
        assert names["chain"]["seed"] == first["seed"]
    assert abs(drawn[0] - expected).max() <= 1 < abs(drawn[1] - expected).max()  # of 255
