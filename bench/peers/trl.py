"""TRL's trainers from here: a process in TRL's own environment (trl_trainers.py) makes one run after the other."""

from __future__ import annotations

import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import ROOT
from bench.peers.folder import older_folder
from bench.peers.lockstep import engine_of
from rlr_ray.assets import DIGITS

CHECKED = 2  # chains of each run that both environments must draw alike
AT_ONCE = 40  # chains in a batch; of random truncation those that share a depth


@dataclass(frozen=True)
class Peer:
    """One of TRL's trainers, repaired as trl_trainers.py says, and settings other than its own."""

    trainer: str
    options: dict[str, Any] = field(default_factory=dict)


TRAINERS = {
    "TRL AlignProp, all steps": Peer("AlignProp", {"truncated_backprop_rand": False, "truncated_backprop_timestep": 0}),
    "TRL AlignProp, random truncation": Peer("AlignProp", {"truncated_rand_backprop_minmax": (0, 9)}),
    "TRL DDPO": Peer("DDPO", {"train_cfg": False, "per_prompt_stat_tracking": True}),
}


class Trl:
    """The process, and the folder through which it is asked."""

    def __init__(self, python: str):
        self.folder = tempfile.TemporaryDirectory()
        self.pipeline = older_folder(DIGITS / "pipeline", Path(self.folder.name) / "pipeline")
        command, environment = [python, "-m", "bench.peers.trl_trainers"], os.environ | {"PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True)

    def ask(self, spec: dict[str, Any]) -> dict[str, Any]:
        """A run's results. Raises RuntimeError if it failed, or if the two do not train the same model."""
        asked, answered = (Path(self.folder.name) / name for name in ("spec.pt", "results.pt"))
        torch.save(spec | {"folder": str(self.pipeline)}, asked)
        assert self.process.stdin is not None and self.process.stdout is not None
        print(asked, answered, file=self.process.stdin, flush=True)
        if self.process.stdout.readline().strip() != "done":
            raise RuntimeError(f"TRL's environment ended with {self.process.wait()}; its errors are above")
        results = torch.load(answered, weights_only=True)
        if "error" in results:
            raise RuntimeError(f"{spec['trainer']}: {results['error']}")
        results["difference"] = difference(results)
        return results


def spec_of(peer: Peer, chains: int, rate: float, seed: int, points: list[int]) -> dict[str, Any]:
    engine = engine_of()
    config, model = engine.config, engine.model
    seeds, prompts = engine.held_out(range(CHECKED))
    return {
        "trainer": peer.trainer,
        "options": peer.options,
        "chunk_size": min(chains, AT_ONCE),
        "learning_rate": rate,
        "seed": seed,
        "points": points,
        "adapter": config.adapter.options,
        "theta": model.initial_theta,
        "shapes": model.tuned.vectors["unet"].shapes,  # type: ignore[attr-defined]
        "prompts": [prompt.text for prompt in engine.prompts],
        "chains": chains,
        "steps": config.sampler.steps,
        "eta": config.sampler.eta,
        "checked": list(zip(seeds, [prompt.text for prompt in prompts], strict=True)),
    }


def difference(results: dict[str, Any]) -> float:
    """The largest between pictures drawn there and here at a run's end, whose sides are [0, 1]."""
    theta: Tensor = results["points"][-1]["theta"]
    engine = engine_of()
    model, schedule = engine.model, engine.model.schedule
    latent, noise, conditioning = engine.start(*engine.held_out(range(CHECKED)))
    with torch.no_grad():
        for k, time in enumerate(schedule.timesteps):
            latent = schedule.mean(k, latent, model(theta, latent, time, conditioning)) + schedule.sigma[k] * noise[k]
        largest = float((model.decode(latent, None, conditioning) - results["pictures"]).abs().max())
    if largest > 1e-2:
        raise RuntimeError(f"pictures of both environments differ by {largest:.3g}; at most 0.01 is expected")
    return largest
