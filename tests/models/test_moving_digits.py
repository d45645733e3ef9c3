"""The shipped video model is what its card says, and draws what plain diffusers draws."""

from __future__ import annotations

from pathlib import Path

import torch

from rlr_ray.assets import MOVING_DIGITS
from rlr_ray.config.recipe import load_config
from rlr_ray.rewards.digits import load_classifier
from rlr_ray.rewards.moving_digits import DIRECTIONS, VideoClassifier
from rlr_ray.train.picture_engine import PictureEngine, chain_rows
from scripts.build_moving_digits import CAPTIONS, accuracy, load_pipeline, plain_samples

ROOT = Path(__file__).parents[2]
SAMPLES = 100


def test_plain_samples_leave_headroom() -> None:
    """The digit is listened to by half, the direction hardly."""
    videos, digits, directions = plain_samples(MOVING_DIGITS, SAMPLES)
    judge = load_classifier(VideoClassifier, MOVING_DIGITS / "judge.safetensors")
    assert 0.05 < accuracy(judge, videos, digits, directions) < 0.35
    read = judge(videos)[0].argmax(1)
    assert 0.35 < float((read == digits).double().mean()) < 0.75  # standard error .05


def test_the_recipe_draws_the_videos_of_the_plain_pipeline() -> None:
    config = load_config(str(ROOT / "configs" / "moving_digits.yaml"), ["cluster=none"])
    engine = PictureEngine(config)
    assert [prompt.text for prompt in engine.prompts] == CAPTIONS and len(CAPTIONS) == 10 * len(DIRECTIONS)
    assert engine.model.latent_shape == (4, 8, 4, 4) and engine.model.frames == 8
    ours = engine.sample(engine.model.initial_theta, range(3))[1]
    rows = chain_rows(*engine.held_out(range(3)))
    plain = load_pipeline(MOVING_DIGITS)(
        [row["prompt"] for row in rows],
        num_frames=8,
        num_inference_steps=10,
        eta=1.0,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(row["seed"]) for row in rows],
        output_type="pt",
    ).frames
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)
