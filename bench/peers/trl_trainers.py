"""Runs of TRL 0.12's AlignPropTrainer and DDPOTrainer on the embedded digits, in TRL's own environment.

trl.py starts it, and writes and reads its files. Of rlr_ray it imports what needs torch alone: the reward, the order of
the adapter's numbers. TRL's classes are subclassed, none of their code is copied.

Repaired, since as shipped neither learns well here: no pass for guidance at scale 1, where TRL stops; random truncation
draws one depth a batch (as shipped every step draws anew whether it is cut); DDPO's log-probabilities are sums (as
shipped means over a latent's numbers), its last step, whose sigma is small and whose score swamps the others', has no
say, advantages are by prompt, and an epoch has one optimizer step. The adapter is the recipe's (which one TRL trains is
written into its code). The gradient's norm cut at 1, weight decay and betas are TRL's defaults.
"""

from __future__ import annotations

import itertools
import random
import sys
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

NEVER = 10**9
VERSIONS = {name: version(name) for name in ("trl", "torch", "transformers", "diffusers", "peft", "accelerate")}


class DigitsPipeline(DefaultDDPOStableDiffusionPipeline):
    """TRL's pipeline with the recipe's adapter, repaired."""

    def __init__(self, spec: dict[str, Any]):
        super().__init__(spec["folder"])
        self.spec = spec
        encode = self.sd_pipeline._encode_prompt

        def encode_prompt(prompt: Any, device: Any, count: int, guided: bool, *rest: Any, **embeds: Any) -> Tensor:
            return encode(prompt, device, count, guided, *rest, **embeds) if guided else embeds["prompt_embeds"]

        self.sd_pipeline._encode_prompt = encode_prompt

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


def adapter(unet: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in unet.named_parameters() if value.requires_grad}


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


def trainer_of(
    spec: dict[str, Any], pipeline: DigitsPipeline, results: dict[str, Any]
) -> AlignPropTrainer | DDPOTrainer:
    reward, prompts = Digits(), itertools.cycle(spec["prompts"])
    align = spec["trainer"] == "AlignProp"
    keys = {"train_batch_size": spec["chunk_size"], "train_learning_rate": spec["learning_rate"], "seed": spec["seed"]}
    keys |= {"sample_num_steps": spec["steps"], "sample_eta": spec["eta"], "sample_guidance_scale": 1.0}
    keys |= {"train_gradient_accumulation_steps": spec["chains"] // spec["chunk_size"]}
    keys |= {"mixed_precision": "no", "save_freq": NEVER} | spec["options"]
    if not align:
        keys |= {"sample_batch_size": spec["chunk_size"]}
        keys |= {"sample_num_batches_per_epoch": spec["chains"] // spec["chunk_size"]}

    def rate(images: Tensor, texts: tuple[str, ...], metadata: Any) -> tuple[Tensor, dict[str, Any]]:
        results["reward_calls"] += len(images)
        return reward(images, texts, metadata), {}

    config = AlignPropConfig(**keys) if align else DDPOConfig(**keys)
    kind = AlignPropTrainer if align else RepairedDDPOTrainer
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
        results.append(pipeline(guidance_scale=1.0, **options).images)
    return torch.cat(results)


def embedding(pipeline: DigitsPipeline, text: str) -> Tensor:  # [1, L, D]
    tokens = pipeline.tokenizer([text], return_tensors="pt", padding="max_length").input_ids
    return pipeline.text_encoder(tokens)[0]


def run(spec: dict[str, Any], results: dict[str, Any]) -> None:
    """Train until the cost is spent; what there is to tell is put into `results` as it comes."""
    pipeline = DigitsPipeline(spec)
    trainer = trainer_of(spec, pipeline, results)
    meter, points, updates, step = Meter(pipeline.unet), list(spec["points"]), 0, 0
    while points:
        step = trainer.step(updates, step)
        updates += 1
        if meter.cost >= points[0]:
            results["points"].append({"cost": meter.cost, "theta": pipeline.theta()})
            points = [cost for cost in points if cost > meter.cost]
    results["pictures"] = pictures(spec, pipeline)


def main() -> None:
    """Answer every line "SPEC OUT", two files, with the line "done": starting anew would take longer than a run."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for line in sys.stdin:
        spec, out = line.split()
        results: dict[str, Any] = {"points": [], "reward_calls": 0, "versions": VERSIONS}
        try:
            run(torch.load(spec, weights_only=True), results)
        except Exception as error:  # a crash is a result too
            where = traceback.extract_tb(error.__traceback__)[-1]
            results["error"] = f"{type(error).__name__}: {error} ({where.filename.rpartition('/')[2]}, {where.name})"
        torch.save(results, out)
        print("done", flush=True)


if __name__ == "__main__":
    main()
