"""On a GPU: the same numbers as on the CPU up to rounding, and memory as the plan says (bench/speed/gpu.sh)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlr_ray.config.run import RunConfig
from rlr_ray.core.first_order import first_order
from rlr_ray.core.half_order import half_order
from rlr_ray.core.sampler import Trajectory
from rlr_ray.core.zeroth_order import Directions
from rlr_ray.models.sharding import Shards
from rlr_ray.train.engine import Engine, RolloutRequest
from rlr_ray.train.loop import train
from rlr_ray.train.process import Process
from rlr_ray.train.run_folder import RunFolder
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update
from tests.runs import short_run

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Engine]:
    folder = tmp_path_factory.mktemp("runs")
    return Engine(short_run(folder, device="cpu")), Engine(short_run(folder, device="cuda"))


def _theta(engine: Engine) -> Tensor:
    return (engine.model.initial_theta.cpu() + 0.05).to(engine.device)


def _trajectory(engine: Engine, stop: int | None = None) -> Trajectory:
    chains = engine.train_chains(0, range(8))
    start = (chains.x_start, chains.noise, chains.conditioning)
    return engine.sampler.sample(_theta(engine), *start, stop=stop)


def test_chains_and_terms_agree_with_the_cpu(engines: tuple[Engine, Engine]) -> None:
    found: list[list[Tensor]] = []
    for engine in engines:
        theta = _theta(engine)
        whole, head = _trajectory(engine), _trajectory(engine, stop=3)
        objective = engine.train_chains(0, range(8)).objective
        first, rewards, _ = first_order(engine.sampler, theta, head, objective)
        ones = torch.ones(8, device=engine.device)
        half = half_order(engine.sampler, theta, whole, range(1, 3), ones)
        found.append([whole.latents[-1].cpu(), rewards.cpu(), first.cpu(), half.cpu()])
    for cpu, cuda in zip(*found, strict=True):
        assert (cpu - cuda).norm() < 1e-3 * cpu.norm()


def test_rollouts_agree_with_the_cpu(engines: tuple[Engine, Engine]) -> None:
    rewards = []
    for engine in engines:
        theta = _theta(engine).cpu()
        result = RolloutRequest(0, engine.plans(0)[0], theta, Directions(len(theta), 0.01)).run(engine, range(8))
        rewards.append(torch.tensor(result.rewards_plus + result.rewards_minus))
    torch.testing.assert_close(*rewards, atol=1e-2, rtol=1e-3)


def test_a_base_that_is_cut_has_the_gradient_of_a_whole_one(engines: tuple[Engine, Engine], tmp_path: Path) -> None:
    """Cut among one process: gathered, freed and gathered again on the device, as among several."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        shards = Shards(torch.device("cuda"))
        cut, found = Engine(short_run(tmp_path, device="cuda"), shards=shards), list[Tensor]()
        for engine in (engines[1], cut):
            found.append(
                half_order(
                    engine.sampler, _theta(engine), _trajectory(engine), range(1, 3), torch.ones(8, device="cuda")
                )
            )
        shards.wait()
    finally:
        dist.destroy_process_group()
    assert shards.groups and torch.equal(*found)


def test_an_encoder_is_on_the_device_only_while_it_encodes(engines: tuple[Engine, Engine], tmp_path: Path) -> None:
    engine = Engine(short_run(tmp_path, device="cuda", model={"offload": True}))
    expected, found = (one.model.encode(["a handwritten three"], [""]) for one in (engines[1], engine))
    assert all(torch.equal(found[name], value) and found[name].is_cuda for name, value in expected.items())
    pipeline = engine.model.pipeline  # type: ignore[attr-defined]
    assert {x.device.type for x in pipeline.text_encoder.parameters()} == {"cpu"}
    assert engine.model.weights() < engines[1].model.weights()


def test_an_update_repeats(tmp_path: Path) -> None:
    thetas = []
    for _ in range(2):
        config = short_run(tmp_path, device="cuda")
        engine = Engine(config)
        state = TrainState(engine.model.initial_theta, config.train, config.estimator)
        update(engine, state, None, Process())
        thetas.append(state.theta.detach().cpu())
    torch.testing.assert_close(*thetas, atol=1e-6, rtol=0)


def test_a_whole_run(tmp_path: Path) -> None:
    config: RunConfig = short_run(tmp_path, device="cuda")
    folder, engine = RunFolder(config), Engine(config)
    folder.begin(resume=False)
    train(engine, None, lambda row: None)
    assert folder.load_summary()["steps"] == 4


def test_checkpointed_first_order_holds_one_steps_activations(tmp_path: Path) -> None:
    engine = Engine(short_run(tmp_path, device="cuda", sampler={"steps": 20}))
    theta = _theta(engine)
    objective = engine.train_chains(0, range(8)).objective

    def peak(steps: int, checkpoint_steps: bool) -> int:
        head = _trajectory(engine, stop=20 - steps)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        first_order(engine.sampler, theta, head, objective, checkpoint_steps=checkpoint_steps)
        return torch.cuda.max_memory_allocated() - held

    peak(1, False)  # warm: kernels and workspaces
    assert peak(16, False) > 3 * peak(4, False)
    assert peak(16, True) < 1.5 * peak(4, True)
