"""Rebuild the embedded digits model from scikit-learn's handwritten digits: `python -m scripts.build_digits`.

Trains, in order: two classifiers on disjoint halves of the data (the reward and the judge), a VAE, then a UNet together
with its text encoder. Some captions are wrong on purpose: the model learns to write well and to listen badly, which
leaves headroom for a reward to fill. Letters: N images, B batch.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from rlr_ray.assets import DIGITS
from rlr_ray.rewards.digits import WORDS, DigitClassifier, enlarged, load_classifier
from scripts import building
from scripts.building import batches, fit

CAPTIONS = [f"a handwritten {word}" for word in WORDS]
JUDGED = 1000  # plain samples that the judge reads


def load_data() -> tuple[Tensor, Tensor]:
    """Images [N, 3, 16, 16] in [0, 1], labels [N], in a fixed random order."""
    small, labels = building.load_small_digits()
    return enlarged(small), labels


def split_data() -> dict[str, tuple[Tensor, Tensor]]:
    return building.split(*load_data())


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


def save_real(folder: Path) -> None:
    """The pictures that both classifiers are tested on, 8 x 8 of 0 to 16: `evaluation.reference: digits`."""
    images, labels = building.split(*building.load_small_digits())["test"]
    real = {"images": (16 * images).round(), "labels": labels}
    save_file({name: values.to(torch.uint8).contiguous() for name, values in real.items()}, folder / "real.safetensors")


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
    vae = building.build_vae()

    def loss_of(index: Tensor) -> Tensor:
        return building.vae_loss(vae, augment_shift(images[index]))

    fit(list(vae.parameters()), loss_of, batches(len(images), 64, 1500, 2), 1500, 3e-3)
    vae.register_to_config(scaling_factor=float(1 / building.encoded(vae, images).std()))
    return vae.eval()


def augment_shift(images: Tensor) -> Tensor:
    return images.roll(torch.randint(-1, 2, (2,)).tolist(), dims=(2, 3))


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    vae: AutoencoderKL,
    alphas: Tensor,  # [1000] cumulative
    updates: int,
) -> None:
    """Noise prediction on the latents, the text encoder trained along, some captions wrong."""
    images, labels = load_data()
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=16, return_tensors="pt").input_ids  # [10, 16]
    latents = building.encoded(vae, images) * vae.config.scaling_factor  # [N, 4, 4, 4]

    def loss_of(index: Tensor) -> Tensor:
        text = text_encoder(ids).last_hidden_state[building.replaced(labels[index], len(WORDS))]
        time_step, noise, noisy = building.noised(latents[index], alphas)
        return F.mse_loss(unet(noisy, time_step, text).sample, noise)

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    fit(parameters, loss_of, batches(len(images), 128, updates, 3), updates, 2e-3)


def build_pipeline(updates: int, vae: AutoencoderKL, scheduler: DDIMScheduler) -> StableDiffusionPipeline:
    tokenizer = building.build_tokenizer(("handwritten", *WORDS), length=16)
    torch.manual_seed(3)
    text_encoder, unet = building.build_text_encoder(tokenizer), build_unet()
    train_unet(unet, text_encoder, tokenizer, vae, scheduler.alphas_cumprod, updates)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
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
    reward, judge = (load_classifier(DigitClassifier, folder / f"{name}.safetensors") for name in ("reward", "judge"))
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
        save_real(options.out)
        for name, width, seed in (("reward", 16, 0), ("judge", 20, 1)):
            print(f"{name} classifier")
            building.save_half(train_classifier(*parts[name], width, seed), options.out / f"{name}.safetensors")
        print("pipeline")
        pipeline = build_pipeline(options.updates, train_vae(load_data()[0]), building.build_scheduler())
        pipeline.to(dtype=torch.float16).save_pretrained(options.out / "pipeline")
    print(measure(options.out))
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
