"""Whole runs in this process: against autograd through plain diffusers, against themselves when interrupted."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy
import pyarrow.parquet
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlr_ray.assets import DIGITS
from rlr_ray.cli.train import describe_results
from rlr_ray.config.presets import PRESETS
from rlr_ray.config.run import RunConfig
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.zeroth_order import Directions, RolloutResult
from rlr_ray.errors import UserError
from rlr_ray.rewards.mixture import Tally
from rlr_ray.train.checkpoints import Checkpoints
from rlr_ray.train.engine import Engine, RolloutRequest
from rlr_ray.train.loop import train
from rlr_ray.train.process import Process
from rlr_ray.train.results import _medians
from rlr_ray.train.run_folder import RunFolder
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update
from tests.runs import TIMED, short_run, small_run, train_here


def rows_of(config: RunConfig) -> list[dict[str, Any]]:
    rows = pyarrow.parquet.read_table(config.folder / "metrics.parquet").to_pylist()
    return [{name: value for name, value in row.items() if name not in TIMED} for row in rows]


def test_full_backprop_update_is_adamw_on_autograd_through_plain_diffusers(tmp_path: Path) -> None:
    config = short_run(
        tmp_path, estimator={"preset": "full_bp", "first_order": {"steps": "all"}, "sub_chain": {"length": 0}}
    )
    engine = Engine(config)
    engine.model.initial_theta = engine.model.initial_theta + 0.05  # away from LoRA's zeros
    state = TrainState(engine.model.initial_theta, config.train, config.estimator)
    update(engine, state, None, Process())
    model: Any = engine.model
    parameters = [model.pipeline.unet.get_parameter(name) for name in model.tuned.vectors["unet"].shapes]
    values = model.tuned.of("unet", engine.model.initial_theta).values()
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data.copy_(value)
    optimizer = torch.optim.AdamW(parameters, config.train.learning_rate, betas=(0.9, 0.99), weight_decay=0)
    chains = engine.train_chains(0, range(config.train.chains))
    scheduler = DDIMScheduler.from_config(model.pipeline.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(config.sampler.steps)
    latent, texts = chains.x_start, [prompt.text for prompt in engine.train_prompts(0, range(config.train.chains))]
    embeddings = model.pipeline.encode_prompt(texts, "cpu", 1, False)[0]
    for k, time in enumerate(scheduler.timesteps):
        output = model.pipeline.unet(latent, time, embeddings).sample
        latent = scheduler.step(output, time, latent, eta=1.0, variance_noise=chains.noise[k]).prev_sample
    (-chains.objective(latent).mean()).backward()
    optimizer.step()
    expected = torch.cat([parameter.detach().flatten() for parameter in parameters])
    torch.testing.assert_close(state.theta.detach(), expected, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = small_run(tmp_path_factory.mktemp("whole"))
    train_here(config)
    return config


def test_a_finished_run_resumes_to_more_updates(
    tmp_path: Path, whole: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], Checkpoints.load

    def watched(checkpoints: Checkpoints, device: torch.device) -> dict[str, Any] | None:
        state = load(checkpoints, device)
        loaded.append(None if state is None else weakref.ref(state["theta"]))
        return state

    train_here(small_run(tmp_path, train={"iterations": 2}))
    monkeypatch.setattr(Checkpoints, "load", watched)
    resumed = train_here(small_run(tmp_path), lambda row: loaded.append(loaded[0]()), resume=True).load_summary()
    assert resumed["theta_sha256"] == RunFolder(whole).load_summary()["theta_sha256"]
    assert loaded[1:] == [None, None]


def test_the_chunk_of_rollouts_does_not_change_the_term_beyond_rounding(tmp_path: Path) -> None:
    engine = Engine(short_run(tmp_path))
    theta = engine.model.initial_theta
    request = RolloutRequest(0, engine.plans(0)[0], theta, Directions(len(theta), 0.01))
    small, large = (
        engine.zeroth_order(request, engine.local_rollouts(request, chunks).results).gradient
        for chunks in ([range(first, first + 2) for first in (6, 0, 4, 2)], [range(8)])  # in any order
    )
    assert (small - large).norm() < 1e-2 * large.norm()  # float32 rounding, over a difference of rewards of .01
    assert large.norm() > 0


def test_an_update_counts_its_rollouts_replaced_scores_and_the_time_in_their_rewards(tmp_path: Path) -> None:
    engine, tally = Engine(small_run(tmp_path)), Tally()
    theta = engine.model.initial_theta
    request = RolloutRequest(0, engine.plans(0)[0], theta, Directions(len(theta), 0.01))
    assert request.run(engine, range(2)).reward_s > 0
    engine.zeroth_order(request, [RolloutResult(range(2), [1.0, 2.0], [0.0, 1.0], 3, 0.5)], tally)
    assert (tally.invalid, tally.seconds) == (3, 0.5)


def test_every_process_goes_on_from_the_leading_ones_checkpoint(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    train_here(config)  # leaves checkpoints of updates 3 and 4, of which the leading process is taken to see the first
    other, rows = Process(rank=1, size=2, reduce=lambda value: value + 3), list[dict[str, Any]]()
    train(Engine(config), None, rows.append, other)
    assert [row["step"] for row in rows] == [3]


def test_a_process_that_does_not_see_the_leading_ones_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoints.load_at, "__defaults__", (0.0,))  # s, that it waits
    other = Process(rank=1, size=2, reduce=lambda value: value + 20)
    with pytest.raises(UserError, match=r"at update 20, but .*update_000020.pt cannot be read.*all of them share"):
        train(Engine(short_run(tmp_path)), None, lambda row: None, other)


def test_a_resumed_run_finishes_though_some_update_had_no_noise_share(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"half_order_noise_share": None}, {"half_order_noise_share": 0.5}, {}]
    assert _medians(rows, "noise_share") == {"half_order": 0.5}


POLICY = ("ddpo", "surrogate", "branches", "awm", "elbo-pg")  # without first order, at least at first


# measure: tests/lab/test_planner.py; black-box is for rewards without a gradient.
@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"measure", "black-box"}))
def test_every_preset_trains(tmp_path: Path, preset: str) -> None:
    keys = {"estimator": {"preset": preset, "zeroth_order": {"count": 4, "chunk_size": 2}}}
    config = RunConfig.model_validate(
        small_run(tmp_path, train={"iterations": 1}, sampler={"steps": 8}).model_dump() | keys
    )
    summary, rows = train_here(config).load_summary(), rows_of(config)
    owned = {"first_order": preset not in (*POLICY, "es")}
    owned["half_order"] = preset in (*POLICY, "rlr", "rlr-paper", "rlr-released", "custom")
    owned["zeroth_order"] = preset in ("rlr", "rlr-paper", "custom", "es")
    assert {name for name in owned if f"{name}_norm" in rows[0]} == {name for name, own in owned.items() if own}
    assert summary["steps"] == 1 and numpy.isfinite(summary["gain"])


def test_a_run_whose_variance_is_high_says_so(tmp_path: Path, finished: RunConfig) -> None:
    keys = {"preset": "rlr-paper", "zeroth_order": {"count": 8, "chunk_size": 4}}
    config = RunConfig.model_validate(short_run(tmp_path, train={"iterations": 2}).model_dump() | {"estimator": keys})
    train_here(config)
    said = describe_results(RunFolder(config))
    assert said.startswith(f"report:   {config.folder / 'report.html'}\n")
    assert "warning: variance is high" in said and "from zeroth order" in said
    assert "from zeroth order" not in describe_results(RunFolder(finished))  # guided and weighed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = short_run(tmp_path_factory.mktemp("runs"), evaluation={"every": 2}, train={"learning_rate": 0.1})
    train_here(config, shown=True)
    return config


def test_summary_says_what_was_measured(finished: RunConfig) -> None:
    summary = RunFolder(finished).load_summary()
    assert summary["gain"] == pytest.approx(summary["reward_after"] - summary["reward_before"], abs=1e-5)
    assert summary["gain_se"] > 0
    assert 0 <= summary["scores"]["digits_judge"]["before"] <= 1
    assert summary["steps"] == 4
    # 8 chains of 5 steps, 2 of them again for half order; 8 pairs of chains of 5 steps, one until they are perturbed
    shared = [PlanShape(5, 1, 2).draw(finished.seed, step).zeroth_order[0] for step in range(4)]
    assert summary["denoiser_forwards"] == 4 * (8 * (5 + 2) + 2 * 8 * 5) - 8 * sum(shared)
    assert sorted(set(shared)) == [0, 2]
    assert summary["denoiser_backwards"] == 4 * 8 * (1 + 2)
    assert {"python", "torch", "diffusers", "peft", "rlr-ray"} <= summary["versions"].keys()


def test_saved_lora_draws_the_after_pictures_in_plain_diffusers(finished: RunConfig) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(DIGITS / "pipeline", dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    folder = RunFolder(finished)
    chains = json.loads((folder.samples / "chains.json").read_text())

    def pictures() -> numpy.ndarray:  # [4, 16, 16, 3]
        return pipeline(
            [chain["prompt"] for chain in chains],
            num_inference_steps=finished.sampler.steps,
            eta=1.0,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(chain["seed"]) for chain in chains],
            output_type="np",
        ).images

    grids = {name: numpy.asarray(Image.open(folder.samples / f"{name}.png")) / 255 for name in ("before", "after")}
    size = grids["after"].shape[1] // len(chains)  # one row of four enlarged pictures

    def tiles(grid: numpy.ndarray) -> numpy.ndarray:
        middles = slice(size // 32, None, size // 16)  # of the squares that a pixel was enlarged to
        return numpy.stack([grid[:, i * size : (i + 1) * size][middles, middles] for i in range(4)])

    tolerance = 0.5 / 255 + 1e-4
    assert abs(pictures() - tiles(grids["before"])).max() < tolerance
    pipeline.load_lora_weights(folder.path / "lora")
    assert abs(pictures() - tiles(grids["after"])).max() < tolerance
    assert abs(tiles(grids["after"]) - tiles(grids["before"])).max() > 0.02


def test_metrics_are_the_same_in_parquet_and_tensorboard(finished: RunConfig) -> None:
    rows = pyarrow.parquet.read_table(finished.folder / "metrics.parquet").to_pylist()
    events = EventAccumulator(str(finished.folder / "tensorboard"))
    events.Reload()
    for name in ("reward_mean", "first_order_norm", "half_order_weight", "cosine_first_order_zeroth_order"):
        logged = [event.value for event in events.Scalars(name)]
        assert logged == pytest.approx([row[name] for row in rows], rel=1e-6)
    assert [row["held_out_reward"] is not None for row in rows] == [False, True, False, False]


def test_files_of_a_finished_run(finished: RunConfig) -> None:
    files = [
        "config.yaml",
        "metrics.parquet",
        "summary.json",
        "report.html",
        "reward_curve.png",
        "lora/pytorch_lora_weights.safetensors",
    ]
    files += ["samples/before.png", "samples/after.png", "samples/before_after.png"]
    files += ["checkpoints/update_000003.pt", "checkpoints/update_000004.pt"]  # keep_checkpoints is 2
    assert [file for file in files if not (finished.folder / file).is_file()] == []
    assert len(list((finished.folder / "checkpoints").iterdir())) == 2


def test_a_run_that_goes_on_has_a_report_of_its_last_evaluation(tmp_path: Path) -> None:
    config = small_run(tmp_path, evaluation={"every": 2})
    with pytest.raises(KeyboardInterrupt):
        train_here(config, stop_after=3, shown=True)
    assert "Still running: update 2 of 4" in (config.folder / "report.html").read_text("utf-8")
    assert not RunFolder(config).holds_results
    train_here(config, resume=True, shown=True)
    assert "after 4 updates, on this process" in (config.folder / "report.html").read_text("utf-8")


def test_a_folder_refuses_what_would_lose_a_run_or_go_on_with_another(tmp_path: Path, finished: RunConfig) -> None:
    other = finished.model_copy(update={"seed": 7})
    for config, resume, words in (
        (finished, False, r"already holds a run \(checkpoint at update 4\); allowed: --resume"),
        (other, True, "seed: was 0, now 7"),
        (short_run(tmp_path), True, "no run to resume"),
    ):
        with pytest.raises(UserError, match=words):
            RunFolder(config).check(resume=resume, overwrite=False)


def test_a_run_is_not_resumed_to_fewer_updates_than_it_has_done(whole: RunConfig) -> None:
    fewer = whole.model_copy(update={"train": whole.train.model_copy(update={"iterations": 1})})
    with pytest.raises(UserError, match="has done 4 updates, and train"):
        RunFolder(fewer).check(resume=True, overwrite=False)
