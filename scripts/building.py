"""What the builders of the embedded models share: the loop, the tokenizer, the text encoder, the VAE, the noise levels.

Letters: N images, B batch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from scripts.small_pipelines import clip_config

WRONG_CAPTIONS = 0.35  # share of training captions replaced by a random one


def load_small_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's pictures [N, 8, 8] in [0, 1], labels [N], in a fixed random order."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.images, dtype=torch.float32)[order] / 16, torch.tensor(digits.target)[order]


def split(images: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Disjoint parts: 40 % to train the reward, 40 % to train the judge, 20 % held out to test both."""
    first, second = int(0.4 * len(images)), int(0.8 * len(images))
    parts = {"reward": slice(0, first), "judge": slice(first, second), "test": slice(second, None)}
    return {name: (images[part], labels[part]) for name, part in parts.items()}


def batches(count: int, size: int, updates: int, seed: int) -> Iterator[Tensor]:
    """Random indices [B] for each update."""
    source = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        yield torch.randint(count, (size,), generator=source)


def fit(
    parameters: list[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    indices: Iterator[Tensor],
    updates: int,
    lr: float,
) -> None:
    """Minimise `loss_of(indices [B])` with AdamW under a one-cycle learning rate."""
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=1e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=updates, pct_start=0.1)
    for update, index in enumerate(indices):
        loss = loss_of(index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cycle.step()
        if update % max(updates // 10, 1) == 0:
            print(f"  update {update}/{updates}  loss {loss.item():.4f}", flush=True)


def save_half(module: nn.Module, path: Path) -> None:
    save_file({name: value.half() for name, value in module.state_dict().items()}, path)


def replaced(labels: Tensor, kinds: int) -> Tensor:
    """Labels [B], each replaced by a random one of `kinds` with probability WRONG_CAPTIONS."""
    wrong = torch.rand(len(labels)) < WRONG_CAPTIONS
    return torch.where(wrong, torch.randint(kinds, (len(labels),)), labels)


def build_tokenizer(words: Sequence[str], length: int) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer over the letters, the given words merged whole."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # from the end, so that a merge never meets another word's start
            pair = f"{pieces[-2]} {pieces[-1]}"
            merged = pieces[-2] + pieces[-1]
            if pair not in merges:
                merges.append(pair)
            if merged not in tokens:
                tokens.append(merged)
            pieces[-2:] = [merged]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as name:
        vocabulary, pairs = Path(name) / "vocab.json", Path(name) / "merges.txt"
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        pairs.write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        return CLIPTokenizer(str(vocabulary), str(pairs), model_max_length=length)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(clip_config(tokenizer, 32, inner=64, layers=1))


def build_vae() -> AutoencoderKL:
    """An untrained VAE from [3, 16, 16] to a latent [4, 4, 4]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        mid_block_add_attention=False,
    )


def vae_loss(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Squared error of the decoded images [B, 3, 16, 16] in [0, 1], and a little of the divergence from N(0, I)."""
    target = images * 2 - 1
    posterior = vae.encode(target).latent_dist
    return F.mse_loss(vae.decode(posterior.sample()).sample, target) + 2e-4 * posterior.kl().mean() / 64


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Images [B, 3, 16, 16] in [0, 1] as unscaled latents [B, 4, 4, 4]."""
    parts = (images * 2 - 1).split(512)
    return torch.cat([vae.encode(part).latent_dist.mean for part in parts])


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise levels."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def noised(latents: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Random time steps [B], noise and sqrt(a) latent + sqrt(1 - a) noise, both shaped as the latents [B, ...]."""
    time_step, noise = torch.randint(1000, (len(latents),)), torch.randn_like(latents)
    a = alphas[time_step].view(-1, *[1] * (latents.ndim - 1))
    return time_step, noise, a.sqrt() * latents + (1 - a).sqrt() * noise
