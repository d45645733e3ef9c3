"""Build the pipelines of the problems whose weights are not kept: `python -m bench.problems.build`.

early: the embedded digits' UNet, stopped early in its training, on linear noise levels and with a last step without
noise; its reward is a classifier of another architecture. flow: a transformer of Stable Diffusion 3's class, trained by
flow matching to draw the digits. Beside them the prompts that never repeat. All into build/problems; seeded; some
minutes on a core.
Letters: B batch, s noise's share of a latent (1: all).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusion3Pipeline
from torch import Tensor
from transformers import CLIPTokenizer

from bench.common import options
from bench.problems.problem import problems
from bench.problems.rewards import FOLDER, OtherClassifier
from rlr_ray.assets import DIGITS
from rlr_ray.rewards.digits import WORDS
from scripts import building
from scripts.build_digits import CAPTIONS, augment, build_pipeline, load_data, split_data
from scripts.small_pipelines import clip_config, sd3_transformer, stable_diffusion_3, t5_tokenizer

EARLY_UPDATES, FLOW_UPDATES = 900, 2000


def embedded_vae() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(DIGITS / "pipeline" / "vae", torch_dtype=torch.float32).eval()


def build_early(folder: Path) -> None:
    images, labels = split_data()["reward"]
    torch.manual_seed(5)
    classifier = OtherClassifier()

    def loss_of(index: Tensor) -> Tensor:
        return F.cross_entropy(classifier(augment(images[index])), labels[index], label_smoothing=0.05)

    building.fit(list(classifier.parameters()), loss_of, building.batches(len(images), 64, 1500, 5), 1500, 3e-3)
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, timestep_spacing="trailing")
    pipeline = build_pipeline(EARLY_UPDATES, embedded_vae(), scheduler)
    building.save_half(classifier.eval(), folder / "reward.safetensors")
    pipeline.save_pretrained(folder / "pipeline")


def build_flow(folder: Path) -> None:
    torch.manual_seed(6)
    pipeline = flow_pipeline()
    train_flow(pipeline, FLOW_UPDATES)
    pipeline.save_pretrained(folder / "pipeline")


def flow_pipeline() -> StableDiffusion3Pipeline:
    """Untrained, but for the VAE, which is the embedded digits'.

    Its CLIP encoders have two layers, of which the pipeline reads the first one's output, and the last one's of the
    whole text. Without T5 it would attend to 256 tokens of zeros.
    """
    vae = embedded_vae()
    vae.register_to_config(shift_factor=0.0)
    clip = CLIPTokenizer.from_pretrained(DIGITS / "pipeline" / "tokenizer")
    transformer = sd3_transformer(4, layers=3, heads=4, head=12, patch_size=1)
    tokenizers = (clip, t5_tokenizer(("a", "handwritten", *WORDS), 4))
    pipeline = stable_diffusion_3(transformer, vae, clip_config(clip, inner=32), tokenizers, shift=1.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def train_flow(pipeline: StableDiffusion3Pipeline, updates: int) -> None:
    """Velocity e - x0 at x = (1 - s) x0 + s e, the CLIP encoders trained along, some captions wrong."""
    images, labels = load_data()
    latents = building.encoded(pipeline.vae, images) * pipeline.vae.config.scaling_factor  # [N, 4, 4, 4]
    call = problems()["flow matching"].recipe["model"]["call"]  # as runs will have it

    def loss_of(index: Tensor) -> Tensor:
        said = building.replaced(labels[index], len(WORDS))
        text, _, pooled, _ = pipeline.encode_prompt(
            CAPTIONS, None, None, device=torch.device("cpu"), do_classifier_free_guidance=False, **call
        )
        clean, noise, s = latents[index], torch.randn_like(latents[index]), torch.rand(len(index))
        share = s[:, None, None, None]
        velocity = pipeline.transformer(
            hidden_states=(1 - share) * clean + share * noise,
            timestep=1000 * s,
            encoder_hidden_states=text[said],
            pooled_projections=pooled[said],
        ).sample
        return F.mse_loss(velocity, noise - clean)

    parts = (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    parameters = [parameter for part in parts for parameter in part.parameters()]
    building.fit(parameters, loss_of, building.batches(len(images), 96, updates, 6), updates, 3e-3)


BUILDERS: dict[str, Callable[[Path], None]] = {"early": build_early, "flow": build_flow}
HANDS = ("neat", "bold", "thin", "wide", "fine", "calm", "fast", "soft", "dark", "pale")  # short: 16 tokens a text


def prompts(count: int) -> list[str]:
    """Texts that name one digit and differ from one another; digits and hands in turn.

    What the model never saw stands behind what it did: before the digit it would leave one picture in twelve right.
    """
    return [f"a handwritten {WORDS[n % 10]} {HANDS[n // 10 % 10]} {n // 10:03}" for n in range(count)]


def write_prompts() -> None:
    """2,000 to train on, 200 others to look at."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    texts = prompts(2200)
    (FOLDER / "prompts.txt").write_text("\n".join(texts[:2000]) + "\n", "utf-8")
    (FOLDER / "held_out.txt").write_text("\n".join(texts[2000:]) + "\n", "utf-8")


def build(name: str) -> None:
    """Into the folder of that name, which is there when all of it is."""
    unfinished = FOLDER / f".{name}"
    unfinished.mkdir(parents=True, exist_ok=True)
    BUILDERS[name](unfinished)
    shutil.rmtree(FOLDER / name, ignore_errors=True)
    unfinished.rename(FOLDER / name)


def build_missing() -> None:
    """All that the problems' recipes read."""
    write_prompts()
    for name in BUILDERS:
        if not (FOLDER / name).exists():
            print(f"{name}: built once, some minutes", flush=True)
            build(name)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BUILDERS)}; none: those that lack")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)  # some activations are, and take many times as long
    started = time.monotonic()
    for name in arguments.names:
        build(name)
    if not arguments.names:
        build_missing()
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
