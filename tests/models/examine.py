"""What is true of a class of pipelines, measured on a tiny one: a line of the table in docs/models.md."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlr_ray.config.model import AdapterConfig, ModelConfig, SamplerConfig
from rlr_ray.core.first_order import first_order
from rlr_ray.core.sampler import Sampler, Start, Trajectory
from rlr_ray.models.program import Program, program_of
from rlr_ray.models.schedulers import solver_of
from tests.models.zoo import CASES

CPU, SEEDS = torch.device("cpu"), (11, 12, 13)
LORA = {"type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["to_q", "to_v"]}


class Subject:
    """A tiny pipeline as a Program, with requests of three chains; `exact` is a plain one of the same weights."""

    def __init__(self, name: str, folder: Path, *, eta: float = 0.0, dtype: torch.dtype = torch.float32):
        (pipeline, call, arguments), (self.exact, *_) = CASES[name](), CASES[name]()
        for one in (pipeline, self.exact):
            if name.startswith("HunyuanVideo15"):  # else it pads by the batch
                one.vae.enable_slicing()
            if dtype != torch.float32:
                one.to(dtype)
        self.call, self.arguments = dict(call), arguments
        self.rows = [_columns(arguments, i, folder, dtype) for i in range(len(SEEDS))]
        told = self.call.pop("num_inference_steps")
        steps = min(int(told * self.call.get("strength", 1.0)), told)
        once = type(pipeline.scheduler).__name__ == "LCMScheduler"
        taken = inspect.signature(type(pipeline).__call__).parameters
        none = "true_cfg_scale" in taken and "true_cfg_scale" not in self.call
        scale = {"guidance_scale": 1.0} if none else {}
        self.model: Program = program_of(
            pipeline,
            ModelConfig(call=self.call),
            AdapterConfig(**LORA),
            SamplerConfig(steps=steps, eta=1.0 if once else eta, **scale),
            CPU,
            self._request(0),
        )
        self.sampler = Sampler(self.model, self.model.schedule)
        self.start = self.begin(range(len(SEEDS)))

    def _request(self, i: int) -> dict[str, Any]:
        row = self.rows[i]
        return {"prompt": row.get("prompt", ""), "negative": row.get("negative_prompt", ""), "columns": row}

    def begin(self, chains: Sequence[int]) -> Start:
        prompts, negatives, columns = zip(*(self._request(i).values() for i in chains), strict=True)
        return self.model.begin([SEEDS[i] for i in chains], self.model.encode(prompts, negatives, columns))

    def theta(self, scale: float = 0.1) -> Tensor:  # [P]
        noise = torch.randn(len(self.model.initial_theta), generator=torch.Generator().manual_seed(3))
        return self.model.initial_theta + scale * noise

    @torch.no_grad()
    def pictures(self, theta: Tensor) -> Tensor:
        last = self.sampler.sample(theta, *self.start).latents[-1]
        return self.model.decode(last, None, self.start[2])

    def plain(self) -> Tensor:
        """The pictures of the plain pipeline, one call for each chain, with the same scheduler."""
        self.exact.scheduler = solver_of(self.exact.scheduler, "trailing")
        told, drawn = self.model._call.arguments["num_inference_steps"], []
        for i, seed in enumerate(SEEDS):
            torch.manual_seed(seed)  # some draw from torch's own generator
            generator = torch.Generator().manual_seed(seed)
            own = {name: value[i : i + 1] for name, value in self.arguments(i + 1).items()}
            if (
                own.get("negative_prompt") == [""] and "true_cfg_scale" not in self.call
            ):  # none, which may not be the same
                del own["negative_prompt"]
            own = {k: v[0] if self.model._batches.alone and isinstance(v, list) else v for k, v in own.items()}
            result = self.exact(**self.call, **own, num_inference_steps=told, generator=generator, output_type="pt")
            found = next(getattr(result, key) for key in ("images", "frames", "image") if hasattr(result, key))
            drawn.append((torch.stack(list(found)) if isinstance(found, list) else found).float())
        return torch.cat(drawn)


def _columns(arguments: Callable[[int], dict[str, Any]], i: int, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Chain i's arguments as columns of a prompt."""
    row: dict[str, Any] = {}
    for name, value in arguments(i + 1).items():
        if isinstance(value, Tensor):
            own = value[i : i + 1].clone()
            row[name] = str(folder / f"{name}{i}.safetensors")
            save_file({"x": own.to(dtype) if own.is_floating_point() else own}, row[name])
        elif isinstance(value[i], str):
            row[name] = value[i]
        else:
            row[name] = str(folder / f"{name}{i}.png")
            value[i].save(row[name])
    return row


def picture_error(subject: Subject) -> float:
    """The largest difference from the plain pipeline's pictures, without noise, the adapter as it is at first."""
    ours, plain = subject.pictures(subject.model.initial_theta), subject.plain()
    assert (plain[0] - plain[1]).abs().max() > 0.01  # a check that anything passes would show here
    return float((ours - plain).abs().max())


def gradient_error(subject: Subject) -> float:
    """Of <W, pictures> through the last two steps and the decoder: its length against a finite difference along it.

    At another theta if it is off at the first: norms of small numbers have kinks that differences pass over.
    """
    error = _gradient_error(subject, subject.theta())
    return error if error < 0.01 else min(error, _gradient_error(subject, subject.theta(0.05)))


def _gradient_error(subject: Subject, theta: Tensor) -> float:
    count = len(subject.sampler)
    x, noise, conditioning = subject.start
    begun = subject.sampler.sample(theta, x, noise, conditioning, stop=max(count - 2, 0))
    weights: list[Tensor] = []

    def objective(latent: Tensor) -> Tensor:
        pictures = subject.model.decode(latent, None, conditioning)
        if not weights:
            weights.append(torch.randn(pictures.shape, generator=torch.Generator().manual_seed(5)).double())
        return (pictures.double() * weights[0]).flatten(1).sum(1)

    gradient, *_ = first_order(subject.sampler, theta, begun, objective)
    along = gradient / gradient.norm()

    @torch.no_grad()
    def value(at: Tensor) -> Tensor:
        latent = begun.latents[-1]
        for k in range(begun.stop, count):
            latent = subject.sampler.step(at, k, latent, noise[k], conditioning)
        return objective(latent).mean()

    errors = []
    for step in (0.1, 0.03, 0.01, 0.003):
        slope = float(value(theta + step * along) - value(theta - step * along)) / (2 * step)
        errors.append(abs(slope / float(gradient.norm()) - 1))
    return min(errors)


def replayed(subject: Subject) -> bool:
    """Each step, run again by itself after others, and in new batches, says the same to the last bit."""
    theta, model = subject.theta(), subject.model
    with torch.no_grad():
        whole = subject.sampler.sample(theta, *subject.start).latents
        model._batches.kept.clear()
        steps = reversed(range(len(subject.sampler)))
        again = {k: subject.sampler.step(theta, k, whole[k], *_of(subject.start, k)) for k in steps}
    return all(torch.equal(again[k], whole[k + 1]) for k in again)


def _of(start: Start, k: int) -> tuple[Tensor, Any]:
    return start[1][k], start[2]


@torch.no_grad()
def rows_error(subject: Subject) -> float:
    """A theta for each chain in one batch against one by one, relative to how far thetas move the output."""
    model, factors = subject.model, torch.tensor([0.5, 1.0, 2.0])[:, None]
    moved = subject.theta() - model.initial_theta
    thetas, latent = model.initial_theta + factors * moved, subject.start[0]
    time, conditioning = model.schedule.timesteps[0], subject.start[2]
    together = model(thetas, latent, time, conditioning)
    apart = torch.cat(
        [
            model(thetas[i], latent[i : i + 1], time, {name: value[i : i + 1] for name, value in conditioning.items()})
            for i in range(len(thetas))
        ]
    )
    base = model(model.initial_theta, latent, time, conditioning)
    assert (apart - base).norm() > 1e-4 * base.norm()
    return float((together - apart).norm() / (apart - base).norm())


def saved_and_loaded(subject: Subject, folder: Path) -> bool:
    theta = subject.theta()
    subject.model.save_adapter(theta, folder)
    return torch.equal(subject.model.load_adapter(folder), theta)


def raised_by_updates(subject: Subject, updates: int = 3) -> float:
    """How far so many updates by first order of two steps raise the brightness of their own chains."""
    model, sampler = subject.model, subject.sampler
    theta = model.initial_theta.clone()
    optimizer = torch.optim.Adam([theta], lr=0.02, maximize=True)
    conditioning = subject.start[2]

    def brightness(latent: Tensor) -> Tensor:
        return model.decode(latent, None, conditioning).flatten(1).mean(1)

    rewards = []
    for update in range(updates + 1):
        begun = sampler.sample(theta, *subject.start, stop=max(len(sampler) - 2, 0))
        theta.grad, reward, *_ = first_order(sampler, theta, Trajectory(begun.latents, *subject.start[1:]), brightness)
        rewards.append(float(reward.mean()))
        if update < updates:
            optimizer.step()
    return rewards[-1] - rewards[0]


@dataclass(frozen=True)
class Line:
    """A class's figures."""

    picture: float
    gradient: float
    replayed: bool
    rows: float
    bfloat16: bool | None  # None: not tried
    saved: bool
    raised: float

    @property
    def wrong(self) -> list[str]:
        """Which figures are not as they must be."""
        told = {
            "picture": self.picture < 2e-5,
            "gradient": self.gradient < 0.05,
            "replayed": self.replayed,
            "rows": self.rows < 1e-3,
            "bfloat16": self.bfloat16 is not False,
            "saved": self.saved,
            "raised": self.raised > 0,
        }
        return [f"{name} {getattr(self, name)}" for name, right in told.items() if not right]


def line_of(name: str, folder: Path, *, bfloat16: bool = True) -> Line:
    subject = Subject(name, folder, eta=0.5)
    return Line(
        picture_error(Subject(name, folder)),
        gradient_error(subject),
        replayed(subject),
        rows_error(subject),
        replayed(Subject(name, folder, eta=0.5, dtype=torch.bfloat16)) if bfloat16 else None,
        saved_and_loaded(subject, folder),
        raised_by_updates(subject),
    )
