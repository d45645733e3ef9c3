"""`rlr-ray init`."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from typing import Any

import yaml

from rlr_ray.cli.arguments import ASKED
from rlr_ray.config.base import read_yaml
from rlr_ray.config.checks import check_first_order
from rlr_ray.config.model import ModelConfig
from rlr_ray.config.recipe import parse_config, resolve
from rlr_ray.errors import UserError
from rlr_ray.models.loading import class_of
from rlr_ray.models.names import EMBEDDED
from rlr_ray.prompts.load import describe_prompts

logger = logging.getLogger(__name__)
_TEMPLATE = """\
# {model} for {reward}, as `rlr-ray init` wrote it. `rlr-ray train --config FILE` runs it, with --dry-run it shows the
# plan and its cost, and `rlr-ray plan --config FILE` chooses a plan for your memory. Every key: docs/recipe.md.
name: {name}  # of the run, and of its folder in output_dir
model: {model_keys}
# What is trained: a LoRA in the attention; a larger r learns more and forgets more
adapter: {adapter}
# How pictures are drawn, in training and after it; fewer steps cost less
sampler: {sampler}
reward: {reward_keys}
prompts: {prompts}
train:
  iterations: 100  # updates; `rlr-ray train --resume {name} --set train.iterations=200` goes on
  # chunk_size: 2  # chains computed at once: lower it if memory runs out
evaluation:
  chains: 48  # held-out seeds, the same before and after: more of them measure a gain more closely
  # judges: {{hpsv2: {{}}}}  # second opinions that are never trained on: docs/rewards.md, "Guards"
# cluster: none  # one process; by default Ray, on this machine or on the cluster that RAY_ADDRESS names
"""
_UNET = "{type: LORA, r: 4, lora_alpha: 4, target_modules: [to_q, to_k, to_v, to_out.0]}"
_DIT = "{type: LORA, r: 8, lora_alpha: 16, target_modules: [attn.to_q, attn.to_k, attn.to_v, attn.to_out.0]}"
_SMALL = "{type: LORA, r: 1, lora_alpha: 4, target_modules: [attn2.to_out.0]}"
_BY_KIND = {  # adapter and sampler of a model's pipeline, as in configs/
    "FluxPipeline": (_DIT, "{steps: 20, eta: 0.5, guidance_scale: 1.0}"),
    "StableDiffusion3Pipeline": (_DIT, "{steps: 10, eta: 0.7, guidance_scale: 4.5}"),
    "WanPipeline": (_UNET, "{steps: 25, eta: 0.4, guidance_scale: 5.0}"),
}
_OTHERS = (_UNET, "{steps: 30, eta: 1.0, guidance_scale: 5.0}")


def init_command(options: argparse.Namespace) -> None:
    """Write a commented recipe to standard output, once it has been checked. Raises UserError for what cannot be."""
    model, reward, prompts = (getattr(options, name) or _answer(name) for name in ASKED)
    text = recipe_of(model, reward, prompts)
    config = resolve(parse_config(read_yaml(text)))
    check_first_order(config)
    logger.info(describe_prompts(config))
    sys.stdout.write(text)


def _answer(name: str) -> str:
    if not sys.stdin.isatty():
        raise UserError(f"init was not told --{name}; give it, or run it in a terminal, where it asks: {ASKED[name]}")
    print(f"{ASKED[name]}: ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline().strip()
    if not answer:
        raise UserError(f"found no answer; allowed: {ASKED[name]}")
    return answer


def recipe_of(model: str, reward: str, prompts: str) -> str:
    """The recipe's text. Raises UserError for a model or a reward that cannot be."""
    shipped = model in EMBEDDED
    keys = {"name": model} if shipped else {"path": model}
    adapter, sampler = (_SMALL, "{steps: 10, guidance_scale: 1.0}") if shipped else _kind_of(model)
    spelled = read_yaml(reward) if reward.startswith("{") else {"name": reward}
    label = re.sub(r"\W+", "_", f"{model.rstrip('/').rpartition('/')[2]}_{spelled.get('name', 'reward')}").strip("_")
    return _TEMPLATE.format(
        name=label,
        model=model,
        reward=spelled.get("name"),
        model_keys=_flow(keys),
        adapter=adapter,
        sampler=sampler,
        reward_keys=_flow(spelled),
        prompts=prompts if prompts.startswith("[") else json.dumps(prompts, ensure_ascii=False),
    )


def _kind_of(model: str) -> tuple[str, str]:
    """Adapter and sampler that suit a model, as far as its files can be had."""
    try:
        kind = class_of(ModelConfig(path=model))
    except UserError as error:
        if model.count("/") != 1 or model.startswith(("/", ".", "~", "$")):
            raise
        logger.warning(f"{error}; the recipe is written as for Stable Diffusion: see configs/ for others")
        return _OTHERS
    return _BY_KIND.get(kind, _OTHERS)


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1000).strip()
