"""Runs of TRL 0.12's AlignPropTrainer and DDPOTrainer on the embedded digits, in TRL's own environment.

runs.py starts it, and writes and reads its files. Of rlr_ray it imports what needs torch alone: the reward, the
meter of memory, the order of the adapter's numbers.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
import traceback
import warnings
from importlib.metadata import version
from typing import Any

import peft
import torch
from torch import Tensor, nn
from trl import (
    AlignPropConfig,
    AlignPropTrainer,
    DDPOConfig,
    DDPOTrainer,
    DefaultDDPOStableDiffusionPipeline,
)

from rlr_ray.models.adapters import ParameterVector
from rlr_ray.rewards.digits import Digits
from rlr_ray.utils.memory import peak_bytes

NEVER = 10**9
VERSIONS = {name: version(name) for name in ("trl", "torch", "transformers", "diffusers", "peft", "accelerate")}


class DigitsPipeline(DefaultDDPOStableDiffusionPipeline):
    """TRL's pipeline with the bench's adapter: which one it trains is written into TRL's code."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__(spec["folder"])
        self.spec = spec

    def get_trainable_layers(self) -> nn.Module:
        self.unet.add_adapter(peft.LoraConfig(**self.spec["adapter"]))
        numbers = adapter(self.unet)
        shapes, expected = {name: tuple(value.shape) for name, value in numbers.items()}, self.spec["shapes"]
        if shapes != expected:
            raise ValueError(f"the adapter has {shapes}; expected {expected}; PEFT's names have changed")
        self.vector = ParameterVector({name: numbers[name] for name in expected})  # in rlr_ray's order
        for name, value in self.vector.unflatten(self.spec["theta"]).items():
            numbers[name].data.copy_(value)
        return self.unet

    def theta(self) -> Tensor:  # [P]
        return self.vector.flatten(adapter(self.unet))


def adapter(unet: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in unet.named_parameters() if value.requires_grad}


class RepairedPipeline(DigitsPipeline):
    """Without guidance where the scale is 1; one random depth a batch; log-probabilities are sums."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__(spec)
        encode = self.sd_pipeline._encode_prompt

        def encode_prompt(prompt: Any, device: Any, count: int, guided: bool, *rest: Any, **embeds: Any) -> Tensor:
            return encode(prompt, device, count, guided, *rest, **embeds) if guided else embeds["prompt_embeds"]

        self.sd_pipeline._encode_prompt = encode_prompt

    def rgb_with_grad(self, *args: Any, **options: Any) -> Any:
        if options["truncated_backprop_rand"]:
            depth = random.randint(*options["truncated_rand_backprop_minmax"])
            options |= {"truncated_backprop_rand": False, "truncated_backprop_timestep": depth}
        return super().rgb_with_grad(*args, **options)

    def __call__(self, *args: Any, **options: Any) -> Any:
        output = super().__call__(*args, **options)
        output.log_probs = [summed(value, output.latents[0]) for value in output.log_probs]
        return output

    def scheduler_step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> Any:
        output = super().scheduler_step(model_output, timestep, sample, **options)
        output.log_probs = summed(output.log_probs, sample)
        return output


def summed(mean: Tensor, latents: Tensor) -> Tensor:  # [B], [B, C, H, W]
    return mean * latents[0].numel()


class RepairedDDPOTrainer(DDPOTrainer):
    """The last step, whose small sigma makes its score swamp all others', has no say."""

    def calculate_loss(
        self,
        latents: Tensor,
        timesteps: Tensor,  # [B]
        next_latents: Tensor,
        log_probs: Tensor,
        advantages: Tensor,  # [B]
        embeds: Tensor,
    ) -> Any:
        heard = advantages * (timesteps != self.sd_pipeline.scheduler.timesteps[-1])
        return super().calculate_loss(latents, timesteps, next_latents, log_probs, heard, embeds)


class Meter:
    """Rows that pass a network forwards, those computed again included, and backwards."""

    def __init__(self, network: nn.Module):
        self.forwards = self.backwards = 0
        network.register_forward_pre_hook(self._before)  # recomputing may stop before the network's end
        network.register_forward_hook(self._after)

    def _before(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.forwards += len(arguments[0])

    def _after(self, network: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if output[0].requires_grad:
            output[0].register_hook(self._backwards)

    def _backwards(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)

    @property
    def cost(self) -> int:
        return self.forwards + 2 * self.backwards


def trainer_of(spec: dict[str, Any], pipeline: DigitsPipeline) -> AlignPropTrainer | DDPOTrainer:
    reward, prompts = Digits(), itertools.cycle(spec["prompts"])
    align = spec["trainer"] == "AlignProp"
    keys = {"train_batch_size": spec["chunk_size"], "train_learning_rate": spec["learning_rate"], "seed": spec["seed"]}
    keys |= {"sample_num_steps": spec["steps"], "sample_eta": spec["eta"], "sample_guidance_scale": spec["guidance"]}
    keys |= {"train_gradient_accumulation_steps": spec["chains"] // spec["chunk_size"] // spec["optimizer_steps"]}
    keys |= {"mixed_precision": "no", "save_freq": NEVER} | spec["options"]
    if not align:
        keys |= {"sample_batch_size": spec["chunk_size"]}
        keys |= {"sample_num_batches_per_epoch": spec["chains"] // spec["chunk_size"]}

    def rate(images: Tensor, texts: tuple[str, ...], metadata: Any) -> tuple[Tensor, dict[str, Any]]:
        return reward(images, texts, metadata), {}

    config = AlignPropConfig(**keys) if align else DDPOConfig(**keys)
    kind = AlignPropTrainer if align else RepairedDDPOTrainer if spec["repaired"] else DDPOTrainer
    trainer = kind(config, rate, lambda: (next(prompts), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return trainer


@torch.no_grad()
def pictures(spec: dict[str, Any], pipeline: DigitsPipeline) -> Tensor:  # [n, 3, H, W]
    """Chains of the checked seeds and prompts one by one, each from the global generator, as the trainers draw."""
    results = []
    for seed, prompt in spec["checked"]:
        embeds = [embedding(pipeline, text) for text in (prompt, "")]
        torch.manual_seed(seed)
        options = {"num_inference_steps": spec["steps"], "eta": spec["eta"], "output_type": "pt"}
        options |= {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
        results.append(pipeline(guidance_scale=spec["guidance"], **options).images)
    return torch.cat(results)


def embedding(pipeline: DigitsPipeline, text: str) -> Tensor:  # [1, L, D]
    tokens = pipeline.tokenizer([text], return_tensors="pt", padding="max_length").input_ids
    return pipeline.text_encoder(tokens)[0]


def run(spec: dict[str, Any], results: dict[str, Any]) -> None:
    """Train until the cost is spent; what there is to tell is put into `results` as it comes."""
    pipeline = (RepairedPipeline if spec["repaired"] else DigitsPipeline)(spec)
    trainer = trainer_of(spec, pipeline)
    meter, points, seconds, updates, step = Meter(pipeline.unet), list(spec["points"]), 0.0, 0, 0
    while points:
        begun = time.process_time()
        step = trainer.step(updates, step)
        seconds, updates = seconds + time.process_time() - begun, updates + 1
        results["updates"] = updates
        if meter.cost >= points[0]:
            point = {"cost": meter.cost, "updates": updates, "seconds": seconds, "theta": pipeline.theta()}
            results["points"].append(point)
            points = [cost for cost in points if cost > meter.cost]
    results |= {"forwards": meter.forwards, "backwards": meter.backwards, "pictures": pictures(spec, pipeline)}
    if spec["traced"]:
        results["peak_bytes"] = peak_bytes(lambda: trainer.step(updates, step), torch.device("cpu"))


def main() -> None:
    """Answer every line "SPEC OUT", two files, with the line "done": starting anew would take longer than a run."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for line in sys.stdin:
        spec, out = line.split()
        results: dict[str, Any] = {"points": [], "updates": 0, "versions": VERSIONS}
        try:
            run(torch.load(spec, weights_only=True), results)
        except Exception as error:  # a crash is a result too
            where = traceback.extract_tb(error.__traceback__)[-1]
            results["error"] = f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}, {where.name})"
        torch.save(results, out)
        print("done", flush=True)


if __name__ == "__main__":
    main()
