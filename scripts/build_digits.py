"""Rebuild the embedded digits model from scikit-learn's handwritten digits: `python scripts/build_digits.py`.

Trains, in order: two classifiers on disjoint halves of the data (the reward and the judge), a VAE, then a UNet together
with its text encoder. Some captions are wrong on purpose: the model learns to write well and to listen badly, which
leaves headroom for a reward to fill. Letters: N images, B batch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rlr_ray.assets import DIGITS
from rlr_ray.rewards.digit_classifier import WORDS, DigitClassifier, load_classifier

CAPTIONS = [f"a handwritten {word}" for word in WORDS]
WRONG_CAPTIONS = 0.35  # share of training captions replaced by a random one
JUDGED = 1000  # plain samples that the judge reads


def load_data() -> tuple[Tensor, Tensor]:
    """Images [N, 3, 16, 16] in [0, 1], labels [N], in a fixed random order."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    small = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16  # [N, 1, 8, 8]
    images = F.interpolate(small, size=16, mode="bicubic", align_corners=False).clamp(0, 1)
    return images.expand(-1, 3, -1, -1).contiguous(), torch.tensor(digits.target)[order]


def split_data() -> dict[str, tuple[Tensor, Tensor]]:
    """Disjoint parts: 40 % to train the reward, 40 % to train the judge, 20 % held out to test both."""
    images, labels = load_data()
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


def augment(images: Tensor) -> Tensor:
    """Shift by up to a pixel, blur some, add noise: what a sampler's pictures look like."""
    shifts = torch.randint(-1, 2, (2,)).tolist()
    images = images.roll(shifts, dims=(2, 3))
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    mix = torch.rand(len(images), 1, 1, 1)
    noise = 0.15 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images[:, :1])
    return (mix * images + (1 - mix) * blurred + noise).clamp(0, 1)


def train_classifier(images: Tensor, labels: Tensor, width: int, seed: int) -> DigitClassifier:
    torch.manual_seed(seed)
    classifier = DigitClassifier(width)

    def loss_of(index: Tensor) -> Tensor:
        return F.cross_entropy(classifier(augment(images[index])), labels[index], label_smoothing=0.05)

    fit(list(classifier.parameters()), loss_of, batches(len(images), 64, 1500, seed), 1500, 3e-3)
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    return float((classifier(images).argmax(1) == labels).float().mean())


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer over the letters, whole words of the captions merged."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = letters + [letter + "</w>" for letter in letters]
    merges: list[str] = []
    for word in ("handwritten", *WORDS):
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
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 48),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def train_vae(images: Tensor) -> AutoencoderKL:
    """A VAE from [3, 16, 16] to a latent [4, 4, 4] of unit variance."""
    torch.manual_seed(2)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
        mid_block_add_attention=False,
    )

    def loss_of(index: Tensor) -> Tensor:
        target = augment_shift(images[index]) * 2 - 1
        posterior = vae.encode(target).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        return F.mse_loss(decoded, target) + 2e-4 * posterior.kl().mean() / 64

    fit(list(vae.parameters()), loss_of, batches(len(images), 64, 1500, 2), 1500, 3e-3)
    with torch.no_grad():
        latents = vae.encode(images * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval()


def augment_shift(images: Tensor) -> Tensor:
    return images.roll(torch.randint(-1, 2, (2,)).tolist(), dims=(2, 3))


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


def train_unet(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, vae: AutoencoderKL, updates: int
) -> None:
    """Noise prediction on the latents, the text encoder trained along, some captions wrong."""
    images, labels = load_data()
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=16, return_tensors="pt").input_ids  # [10, 16]
    alphas = build_scheduler().alphas_cumprod
    with torch.no_grad():
        latents = vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor  # [N, 4, 4, 4]

    def loss_of(index: Tensor) -> Tensor:
        wrong = torch.rand(len(index)) < WRONG_CAPTIONS
        captions = torch.where(wrong, torch.randint(10, (len(index),)), labels[index])
        text = text_encoder(ids).last_hidden_state[captions]
        time_step, noise = torch.randint(1000, (len(index),)), torch.randn_like(latents[index])
        a = alphas[time_step].view(-1, 1, 1, 1)
        noisy = a.sqrt() * latents[index] + (1 - a).sqrt() * noise
        return F.mse_loss(unet(noisy, time_step, text).sample, noise)

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    fit(parameters, loss_of, batches(len(images), 128, updates, 3), updates, 2e-3)


def build_pipeline(updates: int) -> StableDiffusionPipeline:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(Path(folder))
    vae = train_vae(load_data()[0])
    torch.manual_seed(3)
    text_encoder, unet = build_text_encoder(tokenizer), build_unet()
    train_unet(unet, text_encoder, tokenizer, vae, updates)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@torch.no_grad()
def plain_samples(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 16, 16], captions in turn, and their labels [n]; 10 DDIM steps, eta 1, no guidance."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.arange(count) % 10
    arrays = pipeline(
        [CAPTIONS[label] for label in labels],
        num_inference_steps=10,
        eta=1.0,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    return arrays, labels


def measure(folder: Path) -> str:
    """What the shipped files do, in one line each."""
    images, labels = plain_samples(folder, JUDGED)
    reward, judge = (load_classifier(folder / f"{name}.safetensors") for name in ("reward", "judge"))
    test = split_data()["test"]
    scores = reward(images).log_softmax(1)[torch.arange(JUDGED), labels]
    return "\n".join(
        [
            f"reward classifier on held-out digits: {accuracy(reward, *test):.3f}",
            f"judge classifier on held-out digits:  {accuracy(judge, *test):.3f}",
            f"plain samples ({JUDGED}): judge {accuracy(judge, images, labels):.3f}, "
            f"reward {float(scores.mean()):.3f} (standard deviation {float(scores.std()):.3f})",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DIGITS, help="folder to write (default: the package's)")
    parser.add_argument("--updates", type=int, default=4000, help="of the UNet")
    parser.add_argument("--measure", action="store_true", help="build nothing, measure what is there")
    options = parser.parse_args()
    started = time.monotonic()
    if not options.measure:
        options.out.mkdir(parents=True, exist_ok=True)
        parts = split_data()
        for name, width, seed in (("reward", 16, 0), ("judge", 20, 1)):
            print(f"{name} classifier")
            weights = train_classifier(*parts[name], width, seed).state_dict()
            save_file({key: value.half() for key, value in weights.items()}, options.out / f"{name}.safetensors")
        print("pipeline")
        build_pipeline(options.updates).to(dtype=torch.float16).save_pretrained(options.out / "pipeline")
    print(measure(options.out))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
