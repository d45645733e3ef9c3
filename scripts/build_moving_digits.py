"""Rebuild the embedded model of moving digits: `python -m scripts.build_moving_digits`.

Trains, in order: two classifiers on disjoint halves of the digits (the reward and the judge), a VAE of single frames,
then a UNet with motion modules together with its text encoder. Some captions name a wrong digit, some a wrong
direction: the model learns to draw well and to listen badly, which leaves headroom for a reward to fill.
Letters: N digits, B batch, F = 8 frames.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AnimateDiffPipeline, AutoencoderKL, UNetMotionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from rlr_ray.assets import MOVING_DIGITS
from rlr_ray.loggers.pictures import to_pil
from rlr_ray.rewards.digits import WORDS, load_classifier
from rlr_ray.rewards.moving_digits import DIRECTIONS, FRAMES, STILL, VideoClassifier
from scripts import building
from scripts.moving import MIDDLE, ROOM, STARTS, draw, pick, places, random_frames, random_videos

CAPTIONS = [f"a {word} moving {direction}" for word in WORDS for direction in DIRECTIONS]  # digit * 4 + direction
JUDGED = 400  # plain samples that the judge reads
CLASSIFIERS = (("reward", 10, 0), ("judge", 12, 1))  # name, width, seed


def augmented(digits: Tensor) -> tuple[Tensor, Tensor]:
    """Videos [B, F, 3, 16, 16] and their motions [B]: half as `random_videos`, half between the pixels and at other
    speeds; a fifth as good as still; most of them blurred and all with noise, as a sampler's videos are."""
    count = len(digits)
    exact = torch.rand(count) < 0.5
    speeds = torch.where(exact, 1.0, 0.7 + 0.43 * torch.rand(count))
    lanes = 3 + 2 * torch.rand(count)
    starts = torch.rand(count) * (ROOM - (FRAMES - 1) * speeds)
    lanes, starts = torch.where(exact, lanes.round(), lanes), torch.where(exact, starts.round(), starts)
    directions, still = torch.randint(len(DIRECTIONS), (count,)), torch.rand(count) < 0.2
    speeds = torch.where(still, 0.2 * torch.rand(count), speeds)
    starts = torch.where(still, 0.8 * ROOM * torch.rand(count), starts)
    videos = draw(digits, places(directions, lanes, starts, speeds))
    blurred = F.avg_pool2d(F.pad(videos.flatten(0, 1), (1, 1, 1, 1), mode="replicate"), 3, stride=1).view_as(videos)
    mix = (0.4 + 0.8 * torch.rand(count, 1, 1, 1, 1)).clamp(max=1)
    noise = 0.1 * torch.rand(count, 1, 1, 1, 1) * torch.randn_like(videos[:, :, :1])
    motions = torch.where(still, STILL, directions)
    return (mix * videos + (1 - mix) * blurred + noise).clamp(0, 1), motions


def train_classifier(digits: Tensor, labels: Tensor, width: int, seed: int, updates: int) -> VideoClassifier:
    torch.manual_seed(seed)
    classifier = VideoClassifier(width)

    def loss_of(index: Tensor) -> Tensor:
        videos, motions = augmented(digits[index])
        digit, motion = classifier(videos)
        return F.cross_entropy(digit, labels[index], label_smoothing=0.05) + F.cross_entropy(
            motion, motions, label_smoothing=0.05
        )

    building.fit(
        list(classifier.parameters()), loss_of, building.batches(len(digits), 64, updates, seed), updates, 3e-3
    )
    return classifier.eval()


def held_out() -> tuple[Tensor, Tensor, Tensor]:
    """Videos of digits that no classifier saw [n, F, 3, 16, 16], their digits [n] and directions [n]."""
    digits, labels = building.split(*building.load_small_digits())["test"]
    torch.manual_seed(7)
    videos, directions = random_videos(digits)
    return videos, labels, directions


@torch.no_grad()
def accuracy(classifier: VideoClassifier, videos: Tensor, labels: Tensor, directions: Tensor) -> float:
    """The share of videos of which both the digit and the direction are read rightly."""
    digit, direction = classifier(videos)
    return float(((digit.argmax(1) == labels) & (direction.argmax(1) == directions)).float().mean())


def train_vae(digits: Tensor, updates: int) -> AutoencoderKL:
    """A VAE from a frame [3, 16, 16] to a latent [4, 4, 4] of unit variance."""
    torch.manual_seed(2)
    vae = building.build_vae()

    def loss_of(index: Tensor) -> Tensor:
        return building.vae_loss(vae, random_frames(digits[index]))

    building.fit(list(vae.parameters()), loss_of, building.batches(len(digits), 64, updates, 2), updates, 3e-3)
    latents = building.encoded(vae, random_frames(digits))
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval()


def build_unet() -> UNetMotionModel:
    return UNetMotionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 48),
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        up_block_types=("CrossAttnUpBlockMotion", "UpBlockMotion"),
        cross_attention_dim=32,
        num_attention_heads=2,
        norm_num_groups=8,
        motion_max_seq_length=FRAMES,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )


def all_latents(vae: AutoencoderKL, digits: Tensor) -> Tensor:  # [N, 2, 9, 4, 4, 4]
    """The latent of every digit at every place on the middle lane: along x, then along y; place along."""
    along = torch.arange(ROOM + 1.0)
    corners = torch.stack([torch.full_like(along, MIDDLE), along], -1)  # [9, 2]
    corners = torch.cat([corners, corners.flip(-1)])  # [18, 2]
    latents = []
    for part in digits.split(32):
        frames = draw(part, corners.expand(len(part), -1, -1))  # [b, 18, 3, 16, 16]
        latents.append(building.encoded(vae, frames.flatten(0, 1)) * vae.config.scaling_factor)
    return torch.cat(latents).view(len(digits), 2, ROOM + 1, 4, 4, 4)


def random_latents(latents: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Latent videos [B, 4, F, 4, 4] of the digits `index` [B], and their random directions [B]."""
    count = len(index)
    directions = torch.randint(len(DIRECTIONS), (count,))
    axis = (directions >= DIRECTIONS.index("up")).long()
    corners = places(directions, torch.full((count,), MIDDLE), pick(STARTS, count))
    along = corners[torch.arange(count), :, 1 - axis].long()  # [B, F]: x of a digit that moves along x
    return latents[index[:, None], axis[:, None], along].transpose(1, 2), directions


def train_unet(
    unet: UNetMotionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    latents: Tensor,
    labels: Tensor,
    updates: int,
) -> None:
    """Noise prediction on the latent videos, the text encoder trained along, some captions wrong."""
    ids = tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids  # [40, length]
    alphas = building.build_scheduler().alphas_cumprod

    def loss_of(index: Tensor) -> Tensor:
        videos, directions = random_latents(latents, index)
        said = building.replaced(labels[index], len(WORDS)) * len(DIRECTIONS)
        said = said + building.replaced(directions, len(DIRECTIONS))
        text = text_encoder(ids).last_hidden_state[said].repeat_interleave(FRAMES, 0)  # [B * F, length, width]
        time_step, noise, noisy = building.noised(videos, alphas)
        return F.mse_loss(unet(noisy, time_step, text).sample, noise)

    parameters = [*unet.parameters(), *text_encoder.parameters()]
    building.fit(parameters, loss_of, building.batches(len(labels), 32, updates, 3), updates, 2.5e-3)


def assembled(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNetMotionModel
) -> AnimateDiffPipeline:
    """The pipeline without a motion adapter: the UNet holds the motion modules already."""
    return AnimateDiffPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        motion_adapter=None,
        scheduler=building.build_scheduler(),
    )


def build_pipeline(vae_updates: int, updates: int) -> AnimateDiffPipeline:
    digits, labels = building.load_small_digits()
    vae = train_vae(digits, vae_updates)
    tokenizer = building.build_tokenizer(("moving", *WORDS, *DIRECTIONS), length=8)
    torch.manual_seed(3)
    text_encoder, unet = building.build_text_encoder(tokenizer), build_unet()
    train_unet(unet, text_encoder, tokenizer, all_latents(vae, digits), labels, updates)
    return assembled(vae, text_encoder, tokenizer, unet)


def load_pipeline(folder: Path) -> AnimateDiffPipeline:
    pipeline = AnimateDiffPipeline.from_pretrained(folder / "pipeline", motion_adapter=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def plain_samples(folder: Path, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Videos [n, F, 3, 16, 16], captions in turn, their digits [n] and directions [n]; 10 DDIM steps, eta 1."""
    pipeline = load_pipeline(folder)
    said = torch.arange(count) % len(CAPTIONS)
    videos = pipeline(
        [CAPTIONS[caption] for caption in said],
        num_frames=FRAMES,
        num_inference_steps=10,
        eta=1.0,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    return videos, said // len(DIRECTIONS), said % len(DIRECTIONS)


@torch.no_grad()
def measure(folder: Path) -> str:
    """What the shipped files do, in one line each."""
    videos, labels, directions = plain_samples(folder, JUDGED)
    reward, judge = (load_classifier(VideoClassifier, folder / f"{name}.safetensors") for name, _, _ in CLASSIFIERS)
    digit, direction = (logits.log_softmax(1) for logits in reward(videos))
    every = torch.arange(JUDGED)
    scores = digit[every, labels] + direction[every, directions]
    read_digit, read_direction = (logits.argmax(1) for logits in judge(videos))
    return "\n".join(
        [
            f"reward classifier on held-out videos: {accuracy(reward, *held_out()):.3f}",
            f"judge classifier on held-out videos:  {accuracy(judge, *held_out()):.3f}",
            f"plain samples ({JUDGED}): judge {accuracy(judge, videos, labels, directions):.3f} "
            f"(digit {float((read_digit == labels).float().mean()):.3f}, "
            f"direction {float((read_direction == directions).float().mean()):.3f}), "
            f"reward {float(scores.mean()):.3f} (standard deviation {float(scores.std()):.3f})",
        ]
    )


def save_sheet(path: Path, videos: Tensor) -> None:
    """A contact sheet of videos [n, F, 3, H, W]: a row a video, a column a frame, four times as large."""
    rows, columns, _, height, width = videos.shape
    sheet = videos.permute(2, 0, 3, 1, 4).reshape(3, rows * height, columns * width)
    to_pil(F.interpolate(sheet[None], scale_factor=4)[0])[0].save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MOVING_DIGITS, help="folder to write (default: the package's)")
    parser.add_argument("--updates", type=int, default=4000, help="of the UNet")
    parser.add_argument("--measure", action="store_true", help="build nothing, measure what is there")
    parser.add_argument("--sheet", type=Path, help="a PNG file to write plain samples to, a row a video")
    options = parser.parse_args()
    torch.set_flush_denormal(True)  # some activations of the UNet are, and take many times as long
    started = time.monotonic()
    if not options.measure:
        options.out.mkdir(parents=True, exist_ok=True)
        parts = building.split(*building.load_small_digits())
        for name, width, seed in CLASSIFIERS:
            print(f"{name} classifier")
            classifier = train_classifier(*parts[name], width, seed, 1000)
            building.save_half(classifier, options.out / f"{name}.safetensors")
        print("pipeline")
        build_pipeline(1000, options.updates).to(dtype=torch.float16).save_pretrained(options.out / "pipeline")
    print(measure(options.out))
    if options.sheet:
        save_sheet(options.sheet, plain_samples(options.out, len(CAPTIONS))[0])
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
