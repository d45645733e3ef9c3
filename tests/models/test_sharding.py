"""Weights cut among two processes (gloo, on the CPU): the bits of the uncut ones, whatever each process has to do."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlr_ray.config.model import AdapterConfig, ModelConfig, SamplerConfig
from rlr_ray.core.half_order import half_order
from rlr_ray.core.sampler import Sampler
from rlr_ray.errors import UserError
from rlr_ray.models.loading import load_model
from rlr_ray.models.sharding import Shards
from rlr_ray.train.engine import Engine
from rlr_ray.train.loop import train
from rlr_ray.train.process import Process
from rlr_ray.train.run_folder import RunFolder
from tests.models.common import CPU, model_of, some_theta
from tests.models.test_recompute import LORA, chains, gradient
from tests.models.tiny import save_stable_diffusion_3
from tests.runs import outcome, small_run, train_here

SAMPLER = {"steps": 3, "guidance_scale": 3.0, "eta": 0.7}


def in_two(folder: Path, work: Callable[..., Any], *arguments: Any) -> None:
    """Call `work(rank, *arguments)` in two processes at once, of one group. They are forks, so nothing is imported."""

    def run(rank: int) -> None:
        try:
            store = dist.FileStore(str(folder / "store"), 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
            work(rank, *arguments)
            dist.barrier()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=run, args=(rank,)) for rank in range(2)]  # type: ignore[attr-defined]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()  # one that hangs
    assert [process.exitcode for process in processes] == [0, 0]


def estimates(model: Any, *, all_of_them: bool) -> list[Tensor]:
    """Gradients of two steps: with what is computed again and what is not, of all chains and of each; half order's."""
    theta, sampler = some_theta(model), Sampler(model, model.schedule)
    found = [gradient(model, theta, checkpoint_steps=True)]
    if all_of_them:
        found += [gradient(model, theta), gradient(model, theta, per_chain=True), chains(model, theta).latents]
        found.append(half_order(sampler, theta, chains(model, theta), range(0, 2), torch.ones(2)))
    return found


def cut_estimates(rank: int, folder: Path, name: str, path: str | None, again: bool) -> None:
    shards, config = Shards(CPU), ModelConfig(name=name, path=path, gradient_checkpointing=again)
    model: Any = load_model(config, AdapterConfig(**LORA), SamplerConfig(**SAMPLER), CPU, shards=shards)
    found = estimates(model, all_of_them=rank == 0)  # the other has less to do, and waits
    shards.wait()
    whole = [group for group in shards.groups if not hasattr(next(group.parameters()), "to_local")]
    assert whole == []  # nothing stays gathered
    torch.save((found, model.weights()), folder / f"{rank}.pt")


@pytest.mark.filterwarnings("ignore:Keyword arguments")
@pytest.mark.parametrize(
    ("name", "again"),
    [
        pytest.param("digits", False, marks=pytest.mark.slow, id="unet"),
        pytest.param("stable_diffusion_3", True, id="transformer, by blocks again"),
    ],
)
def test_cut_weights_give_the_bits_of_whole_ones(tmp_path: Path, name: str, again: bool) -> None:
    path = None
    if name == "stable_diffusion_3":
        save_stable_diffusion_3(tmp_path / "pipeline")
        path = str(tmp_path / "pipeline")
    model = model_of(name, path, LORA, SAMPLER, gradient_checkpointing=again)
    expected, whole = estimates(model, all_of_them=True), model.weights()
    beside = sum(x.nbytes for part in (model.pipeline.vae,) for x in part.parameters())  # which is not cut
    in_two(tmp_path, cut_estimates, tmp_path, name, path, again)
    for rank in range(2):
        found, held = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=False)) and len(found) == (5, 1)[rank]
        assert held - beside < 0.8 * (whole - beside)


def half_a_run(rank: int, folder: Path, keys: dict[str, Any]) -> None:
    """Two of three updates, in which the leading process has two chunks of three, the rollouts and the evaluations."""
    config, shards = small_run(folder, **keys), Shards(CPU)

    def reduce(value: Tensor) -> Tensor:
        shards.wait()
        total = value.clone()
        dist.all_reduce(total)
        return total

    def report(row: dict[str, Any]) -> None:
        shards.wait()
        if row["step"] == 1:
            raise KeyboardInterrupt

    if rank == 0:
        RunFolder(config).begin(resume=False)
    dist.barrier()
    try:
        train(Engine(config, shards=shards), None, report, Process(rank, 2, reduce))
    except KeyboardInterrupt:
        return
    raise AssertionError("the run was not interrupted")


@pytest.mark.slow
def test_a_run_with_cut_weights_goes_on_in_one_process_without_and_ends_the_same(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "train": {"iterations": 3, "chains": 6, "max_change": 0.03},
        "evaluation": {"every": 1},
        "estimator": {"checkpoint_steps": True},
    }
    whole = train_here(small_run(tmp_path / "whole", **keys))
    in_two(tmp_path, half_a_run, tmp_path / "cut", keys)
    cut = train_here(small_run(tmp_path / "cut", **keys), resume=True)
    assert outcome(cut.path) == outcome(whole.path)


def test_an_adapter_that_runs_chain_by_chain_is_refused(tmp_path: Path) -> None:
    model = model_of("digits", None, LORA | {"target_modules": ["conv_out"]}, SAMPLER)
    with pytest.raises(UserError, match=r"cluster.worker.shard is true.*LoRA on linear layers; change adapter.target"):
        Shards.check(None, model)  # type: ignore[arg-type]
