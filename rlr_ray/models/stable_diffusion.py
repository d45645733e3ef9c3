"""Stable Diffusion 1.x and 2.x, from a local folder or the hub."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict, load_peft_weights
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlr_ray.core.chain import Conditioning
from rlr_ray.core.parameters import ParameterVector
from rlr_ray.errors import UserError
from rlr_ray.models import module_bytes
from rlr_ray.models.adapters import add_adapter, save_peft, set_adapter, trainable
from rlr_ray.models.schedulers import ddim_scheduler, schedule_of

_LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers' name


def load(config: Any, adapter: Any, sampler: Any, device: torch.device) -> StableDiffusion:
    """The pipeline at `config.path` (a folder or a hub name) with its adapter."""
    options = {"safety_checker": None, "requires_safety_checker": False}
    pipeline = load_pipeline(config, StableDiffusionPipeline, "Stable Diffusion 1.x or 2.x", **options)
    return StableDiffusion(pipeline, config, adapter, sampler, device)


def _batched_attention(device: torch.device) -> AbstractContextManager[None]:
    """On the CPU, torch's fused attention has no batching rule and would run chain by chain; the plain one has."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _too_long(tokenizer: Any, texts: Sequence[str]) -> set[str]:
    """Those with more tokens than it takes, the marks of start and end among them."""
    rows = tokenizer(list(texts), verbose=False).input_ids if texts else []
    return {text for text, row in zip(texts, rows, strict=True) if len(row) > tokenizer.model_max_length}


def load_pipeline(config: Any, family: Any, words: str, **options: Any) -> Any:
    """Load a pipeline of a diffusers class. Raises UserError if the folder or hub name does not hold one."""
    if not config.path:
        raise UserError(f"model.path is not set; give the folder of a {words} pipeline or its name on the hub")
    path, folder = config.path, Path(config.path).expanduser()
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UserError(
            f"model.path {path!r} is not a diffusers pipeline: it has no model_index.json; "
            "allowed: a folder written by `pipeline.save_pretrained(folder)`, or a name on the hub"
        )
    diffusers.utils.logging.disable_progress_bar()  # of reading files; those of downloads stay
    transformers.utils.logging.disable_progress_bar()
    source = folder if folder.exists() else path
    try:
        found = family.load_config(source)["_class_name"]
        if found != family.__name__:
            raise UserError(
                f"model.path {path!r} holds a {found}; allowed for model.name {config.name!r}: {family.__name__}"
            )
        return family.from_pretrained(source, dtype=getattr(torch, config.dtype), **options)
    except UserError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"model.path {path!r} could not be loaded as a {words} pipeline: {error}") from error


class StableDiffusion:
    """A StableDiffusionPipeline as a function of its adapter's numbers.

    The latent chain and theta are float32 whatever the weights' dtype; `guidance_scale` above 1 adds classifier-free
    guidance (Ho and Salimans 2021), computed inside one prediction.
    """

    def __init__(
        self, pipeline: StableDiffusionPipeline, config: Any, adapter: Any, sampler: Any, device: torch.device
    ):
        self.pipeline = pipeline.to(device)
        self.device, self.dtype = device, pipeline.unet.dtype
        self.guidance_scale = sampler.guidance_scale
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False).eval()
        self.adapter_type = adapter.type
        self.module: Any = add_adapter(pipeline.unet, adapter.type, adapter.options, adapter.seed)
        self.parameters = ParameterVector(trainable(self.module))
        self.initial_theta = self.parameters.flatten(trainable(self.module)).float()
        self.schedule = schedule_of(
            ddim_scheduler(pipeline.scheduler.config, sampler.timestep_spacing), sampler.steps, sampler.eta
        )
        self.latent_shape = self._latent_shape(config.height, config.width)
        self._times = torch.arange(pipeline.scheduler.config.num_train_timesteps, device=device)
        self._encode_one = functools.lru_cache(maxsize=4096)(self._encode_uncached)

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        unet, scale = self.pipeline.unet.config, self.pipeline.vae_scale_factor
        for name, size in (("height", height), ("width", width)):
            if size is not None and size % scale:
                raise UserError(f"model.{name} is {size}; allowed: multiples of {scale} for this model")
        default = unet.sample_size
        return unet.in_channels, height // scale if height else default, width // scale if width else default

    def __call__(self, theta: Tensor, latent: Tensor, timestep: int, conditioning: Conditioning) -> Tensor:
        """Prediction [B, C, H, W] after guidance, at theta [P], or at a theta for each chain [B, P]."""
        predict = functools.partial(self._predict, time=self._times[timestep])
        if theta.dim() == 1:
            return predict(theta, latent, dict(conditioning))

        def predict_one(theta: Tensor, latent: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
            single = {name: value[None] for name, value in conditioning.items()}
            return predict(theta, latent[None], single)[0]

        with _batched_attention(self.device):
            return torch.func.vmap(predict_one)(theta, latent, dict(conditioning))

    def _predict(self, theta: Tensor, latent: Tensor, conditioning: dict[str, Tensor], *, time: Tensor) -> Tensor:
        guided = "negative" in conditioning
        latents = torch.cat([latent, latent]) if guided else latent
        (output,) = torch.func.functional_call(
            self.module,
            self.parameters.unflatten(theta),
            (latents.to(self.dtype), time),
            {**self._inputs(conditioning), "return_dict": False},
            tie_weights=False,  # where PEFT shares parameters, it shares what holds them; looking for ties takes long
        )
        output = output.to(latent.dtype)
        if not guided:
            return output
        negative, positive = output.chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    def _inputs(self, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        """What the UNet is given besides latents and time; with guidance for the negative prompts first."""
        return {"encoder_hidden_states": self._both(conditioning, "negative", "prompt")}

    def _both(self, conditioning: dict[str, Tensor], negative: str, positive: str) -> Tensor:
        parts = [conditioning[name] for name in (negative, positive) if name in conditioning]
        return torch.cat(parts).to(self.dtype)

    def encode(self, prompts: Sequence[str], negatives: Sequence[str] = ()) -> dict[str, Tensor]:
        """Text embeddings by name, each [B, L, D]; a pair's embedding is computed once. Negatives (): all empty."""
        pairs = zip(prompts, negatives or [""] * len(prompts), strict=True)
        rows = [self._encode_one(prompt, negative) for prompt, negative in pairs]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    @torch.no_grad()
    def _encode_uncached(self, prompt: str, negative: str) -> dict[str, Tensor]:
        guided = self.guidance_scale > 1
        found = self.pipeline.encode_prompt(prompt, self.device, 1, guided, negative_prompt=negative or None)
        return {name: value for name, value in zip(("prompt", "negative"), found, strict=True) if value is not None}

    def truncated(self, texts: Sequence[str]) -> list[str]:
        """The texts that are longer than one of the pipeline's tokenizers takes; their ends are cut off."""
        parts = (getattr(self.pipeline, name, None) for name in ("tokenizer", "tokenizer_2"))
        cut = set().union(*(_too_long(part, texts) for part in parts if part is not None))
        return [text for text in texts if text in cut]

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, h, w] in [0, 1] of latents [B, C, H, W]; differentiable."""
        vae = self.pipeline.vae
        images = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def weights(self) -> int:
        """Bytes of the pipeline's parameters and buffers."""
        return sum(module_bytes(part) for part in self.pipeline.components.values())

    def save_adapter(self, theta: Tensor, folder: Path) -> Path:
        """Save theta: LoRA as lora/ for diffusers' `load_lora_weights`, others as adapter/ in PEFT's format."""
        for name, value in self.parameters.unflatten(theta).items():
            self.module.get_parameter(name).data.copy_(value)
        if self.adapter_type != "LORA":
            return save_peft(self.module, folder / "adapter")
        layers = get_peft_model_state_dict(self.module)
        metadata = self.module.peft_config["default"].to_dict()  # without it, alpha would be read as r
        self.pipeline.save_lora_weights(folder / "lora", unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
        return folder / "lora" / _LORA_FILE

    def load_adapter(self, folder: Path) -> Tensor:  # [P]
        """Theta as `save_adapter` left it in the folder, bit for bit. Raises UserError if it is of another adapter."""
        lora = self.adapter_type == "LORA"
        place = folder / "lora" / _LORA_FILE if lora else folder / "adapter"
        if not place.exists():
            raise UserError(
                f"{folder} holds no adapter of type {self.adapter_type} (looked for {place}); a run leaves it when it "
                "ends: go on with it by `rlr-ray train --resume`, or give the recipe the type with which it was saved"
            )
        set_adapter(self.module, self._saved_lora(place) if lora else load_peft_weights(str(place), "cpu"), place)
        return self.parameters.flatten(trainable(self.module)).float()

    def _saved_lora(self, place: Path) -> dict[str, Tensor]:
        """The UNet's LoRA in a file of diffusers. Raises UserError if it is scaled otherwise than this model's."""
        saved, _, metadata = self.pipeline.lora_state_dict(
            place.parent, weight_name=place.name, return_lora_metadata=True
        )
        own = self.module.peft_config["default"]
        unsaid = {"lora_alpha": own.r, "use_rslora": False, "alpha_pattern": {}}  # as diffusers reads no metadata
        found = {name: (metadata or {}).get(f"unet.{name}", value) for name, value in unsaid.items()}
        expected = {name: getattr(own, name) for name in unsaid}
        if found != expected:
            raise UserError(
                f"{place} was saved with {found}, the recipe's adapter has {expected}; give the recipe the adapter "
                "with which it was saved"
            )
        return {name.removeprefix("unet."): value for name, value in saved.items()}
