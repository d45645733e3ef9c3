"""What a run keeps of its chains: the very ones, each once, also when it was interrupted, and no more than it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.dataset
import pyarrow.parquet
import pytest
import torch

from rlr_ray.config.run import RunConfig
from rlr_ray.core.chunk import begin
from rlr_ray.train import chain_log
from rlr_ray.train.chain_log import ChainLog, shards
from rlr_ray.train.engine import Engine
from rlr_ray.train.process import ALONE, Process
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update
from tests.runs import logged, small_run, train_here

TWO = {"a": {"name": "digits", "weight": 2.0}, "b": {"name": "digits_judge", "differentiable": False}}


def kept(config: RunConfig) -> list[dict[str, Any]]:
    """Rows of all shards, as any reader of Parquet has them."""
    rows: list[dict[str, Any]] = pyarrow.dataset.dataset(config.folder / "chains").to_table().to_pylist()
    return sorted(rows, key=lambda row: (row["update"], row["chain"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = small_run(tmp_path_factory.mktemp("whole"), save_chains=1.0, train={"checkpoint_every": 2})
    train_here(config)
    return config


def test_a_run_keeps_its_chains(whole: RunConfig) -> None:
    """Prompts, seeds, rewards and the last latents: of the first update those at the base model."""
    rows, engine = kept(whole), Engine(whole)
    assert [(row["update"], row["chain"]) for row in rows] == [(step, b) for step in range(4) for b in range(4)]
    plan = engine.plans(0)[0]
    work = {c: (plan, engine.train_chains(0, range(2 * c, 2 * c + 2))) for c in range(2)}
    assert plan.first_order
    for c, begun in begin(engine.sampler, engine.model.initial_theta, work):
        stop, chains, theta = begun.trajectory.stop, work[c][1], engine.model.initial_theta
        latent = begun.trajectory.latents[-1]
        for k in range(stop, len(engine.sampler)):
            latent = engine.sampler.step(theta, k, latent, chains.noise[k], chains.conditioning)
        for b, row in enumerate(rows[2 * c : 2 * c + 2]):
            index = 2 * c + b
            assert row["seed"] == engine.train_seeds(0, range(index, index + 1))[0]
            assert row["prompt"] == engine.train_prompts(0, range(index, index + 1))[0].text
            torch.testing.assert_close(torch.tensor(row["latent"]), latent[b].half().flatten().float())
        rewards = torch.tensor([row["reward"] for row in rows[2 * c : 2 * c + 2]])
        torch.testing.assert_close(rewards, chains.objective(latent).detach(), rtol=1e-4, atol=1e-4)
    files = shards(whole.folder / "chains")
    assert [file.name for file in files] == ["updates_000000_000001_0.parquet", "updates_000002_000003_0.parquet"]
    shape = "x".join(map(str, engine.model.latent_shape))
    assert pyarrow.parquet.read_schema(files[0]).metadata[b"latent_shape"] == shape.encode()


def test_an_interrupted_run_keeps_each_chain_once(tmp_path: Path, whole: RunConfig) -> None:
    """It is interrupted behind a checkpoint; a shard beyond it, of updates that the run draws again, is no more."""
    config = small_run(tmp_path, save_chains=1.0, train={"checkpoint_every": 2})
    with pytest.raises(KeyboardInterrupt):
        train_here(config, stop_after=3)
    beyond = (
        config.folder / "chains" / "updates_000002_000002_0.parquet"
    )  # as a signal leaves, whose checkpoint is lost
    beyond.write_bytes(shards(config.folder / "chains")[0].read_bytes())
    train_here(config, resume=True)
    assert kept(config) == kept(whole)


def test_each_of_several_rewards_has_a_column_as_it_was_given(tmp_path: Path) -> None:
    config = RunConfig.model_validate(small_run(tmp_path, save_chains=1.0).model_dump() | {"rewards": TWO})
    engine = Engine(config)
    total = engine.rewards.weighted_sum(torch.tensor([[1.0, 3.0], [0.0, 4.0]]))
    log = ChainLog(engine, ALONE, 1.0, 0)
    config.folder.mkdir(parents=True)
    update(
        engine, TrainState(engine.model.initial_theta, config.train, config.estimator), None, ALONE, None, total, log
    )
    log.save()
    (mean, deviation), (other, spread) = total.standards
    for row in kept(config):
        parts = 2 * (row["reward_a"] - mean) / deviation + (row["reward_b"] - other) / spread
        assert row["reward"] == pytest.approx(parts, rel=1e-4, abs=1e-4)


def test_processes_keep_their_own_chunks_and_share_the_room(tmp_path: Path, whole: RunConfig) -> None:
    """Two shards fit for each: 4 updates of one chunk, a shard an update."""
    size = shards(whole.folder / "chains")[0].stat().st_size
    config = small_run(tmp_path, save_chains=1.0)
    config.folder.mkdir(parents=True)
    engine = Engine(config)
    for rank in range(2):
        state = TrainState(engine.model.initial_theta, config.train, config.estimator)
        process = Process(rank, 2, lambda value: 2 * value)
        log = ChainLog(engine, process, 2 * 1.9 * size / chain_log.GIB, 0)
        for _ in range(4):
            update(engine, state, None, process, log=log)
            log.save()
    rows = kept(config)
    assert {row["chain"] for row in rows} == {0, 1, 2, 3}
    steps = {rank: sorted({row["update"] for row in rows if row["chain"] // 2 == rank}) for rank in range(2)}
    assert steps[0] == steps[1] and steps[0][-1] == 3 and 1 <= len(steps[0]) < 4


def test_a_disk_that_fails_costs_chains_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chain_log, "replace_file", full)
    with logged() as said:
        folder = train_here(small_run(tmp_path, save_chains=1.0))
    assert folder.load_summary()["steps"] == 4 and not shards(folder.path / "chains")
    assert sum("chains of updates 0 to 0 are not kept" in text for text in said) == 1
