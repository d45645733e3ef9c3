"""A part of a pipeline that makes NaN is named, in updates, evaluations and pictures alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlr_ray.errors import UserError
from rlr_ray.train.engine import Engine
from tests.runs import small_run

PARTS: dict[str, Callable[[Any], Any]] = {
    "the text encoder": lambda pipeline: pipeline.text_encoder.get_input_embeddings(),
    "the denoiser": lambda pipeline: pipeline.unet.conv_out,
    "the VAE": lambda pipeline: pipeline.vae.decoder.conv_out,
}


def rounded(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:  # [B]
    """Of NaN it makes 0, as a reward of 8-bit pictures does."""
    return images.nan_to_num(0.0).mean((1, 2, 3))


rounded.differentiable = True  # type: ignore[attr-defined]


def engine_with(folder: Path, part: str, **changes: Any) -> Engine:
    reward = {"name": "tests.models.test_finite:rounded", **changes}
    config = small_run(folder, reward=reward)
    engine = Engine(config)
    with torch.no_grad():
        PARTS[part](engine.model.pipeline).weight.fill_(torch.nan)  # type: ignore[attr-defined]
    return engine


@pytest.mark.parametrize("part", PARTS)
def test_the_part_that_makes_nan_is_named(part: str, tmp_path: Path) -> None:
    engine = engine_with(tmp_path, part)
    theta = engine.model.initial_theta
    with pytest.raises(UserError, match=f"[12] of 2 pictures are not finite .* came from {part}"):
        engine.sample(theta, range(2))
    chains = engine.train_chains(0, range(2))
    latents = engine.sampler.sample(theta, *chains.start).latents[-1]
    with pytest.raises(UserError, match=f"came from {part}"):
        chains.objective(latents)


def test_where_a_number_is_given_for_such_pictures_they_are_counted(tmp_path: Path) -> None:
    engine = engine_with(tmp_path, "the VAE", invalid=-1.0)
    chains = engine.train_chains(0, range(2))
    latents = engine.sampler.sample(engine.model.initial_theta, *chains.start).latents[-1]
    assert chains.objective(latents).tolist() == [-1.0, -1.0]
    assert chains.replaced[0].all()


def test_a_float16_vae_that_overflows_is_named_with_what_to_do(tmp_path: Path) -> None:
    config = small_run(tmp_path, reward={"name": "tests.models.test_finite:rounded"}, model={"dtype": "float16"})
    engine = Engine(config)
    with torch.no_grad():
        engine.model.pipeline.vae.decoder.conv_in.weight.mul_(2.0e4)  # type: ignore[attr-defined]
    weights = engine.model.pipeline.vae.decoder.state_dict().values()  # type: ignore[attr-defined]
    assert all(value.isfinite().all() for value in weights)
    words = "came from the VAE: the last latents are finite; set model.dtype: bfloat16 or float32, since float16 ends"
    theta = engine.model.initial_theta
    with pytest.raises(UserError, match=words):  # evaluation, `sample`
        engine.sample(theta, range(2))
    chains = engine.train_chains(0, range(2))
    with pytest.raises(UserError, match=words):
        chains.objective(engine.sampler.sample(theta, *chains.start).latents[-1])
