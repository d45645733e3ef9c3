"""AnimateDiff and Wan against plain diffusers pipelines of their class, tiny and with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    MotionAdapter,
    UniPCMultistepScheduler,
    WanPipeline,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from rlr_ray.config.model import AdapterConfig, ModelConfig, SamplerConfig
from rlr_ray.errors import UserError
from rlr_ray.models.loading import load_model
from rlr_ray.utils.memory import peak_bytes
from tests.models.common import (
    assert_close_in_float32,
    assert_last_step_is_the_base_models,
    assert_loop_over_chains,
    assert_same,
    calls,
    drawn,
    generators,
    model_of,
    recipe,
    some_theta,
    updates_raise_the_reward,
)
from tests.models.tiny import TOKENS, save_animatediff, save_motion_adapter, save_stable_diffusion, save_wan

PROMPTS = ["a handwritten two", "seven"]
NEGATIVES = ["a handwritten one", ""]
SIZES = {"animatediff": {"height": 16, "width": 8}, "wan": {"height": 16, "width": 32}}
FRAMES = {"animatediff": 3, "wan": 5}
CHOSEN = {"animatediff": [2, 0], "wan": [3, 0]}  # frames
LORA = {"type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_out.0"]}
IA3 = {"type": "IA3", "target_modules": ["to_v"], "feedforward_modules": []}
MOTION_ONLY = LORA | {"target_modules": r".*motion_modules.*\.to_(q|k|v|out\.0)"}
FAMILIES = pytest.mark.parametrize("name", FRAMES)

pytestmark = pytest.mark.filterwarnings("ignore:timestep_spacing 'leading'")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As a run has; what is so small only waits for others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pipelines by name: of the families, and others; and motion modules."""
    folder = tmp_path_factory.mktemp("pipelines")
    save_stable_diffusion(folder / "stable_diffusion")
    save_motion_adapter(folder / "motion")
    save_motion_adapter(folder / "wide_motion", width=16)
    save_animatediff(folder / "animatediff", folder / "motion")
    save_animatediff(folder / "without_adapter", folder / "motion", with_adapter=False)
    save_wan(folder / "wan")
    save_wan(folder / "euler", unipc=False)
    return {place.name: place for place in folder.iterdir()}


def load(name: str, folder: Path, adapter: dict[str, Any] = LORA, sampler: Any = (), **model: Any) -> Any:
    keys = {"num_frames": FRAMES[name], **SIZES[name], "call": calls(name), **model}
    return model_of(name, folder, adapter, {"steps": 3, "eta": 0.0, "guidance_scale": 3.0, **dict(sampler)}, **keys)


def some_latents(model: Any, seed: int = 1) -> Tensor:  # [2, C, F, H, W]
    return torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def our_videos(model: Any, theta: Tensor) -> Tensor:  # [2, n, 3, h, w]
    return drawn(model, theta, PROMPTS, NEGATIVES)


def plain(name: str, folder: Path, **parts: Any) -> Any:
    """A plain pipeline whose scheduler takes Euler's steps, or DDIM's."""
    pipeline = {"animatediff": AnimateDiffPipeline, "wan": WanPipeline}[name].from_pretrained(folder, **parts)
    config = pipeline.scheduler.config
    if name == "animatediff":
        pipeline.scheduler = DDIMScheduler.from_config(config, timestep_spacing="trailing")
    elif isinstance(pipeline.scheduler, UniPCMultistepScheduler):  # of order 1, without corrections, it is Euler
        pipeline.scheduler = UniPCMultistepScheduler.from_config(config, solver_order=1, disable_corrector=range(9))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_videos(name: str, pipeline: Any, **options: Any) -> Tensor:  # [2, n, 3, h, w]
    own = {"max_sequence_length": TOKENS} if name == "wan" else {}
    arguments = {"negative_prompt": NEGATIVES, "guidance_scale": 3.0, "num_frames": FRAMES[name]} | SIZES[name] | own
    more = {"generator": generators(2), "num_inference_steps": 3, "output_type": "pt"}
    videos: Tensor = torch.as_tensor(pipeline(PROMPTS, **more | arguments | options).frames)
    return videos


@FAMILIES
def test_without_noise_the_chain_draws_the_videos_of_a_plain_pipeline(name: str, folders: dict[str, Path]) -> None:
    """Guided, with negative prompts, and not square; then without guidance."""
    model = load(name, folders[name])
    found = our_videos(model, model.initial_theta)
    pipeline = plain(name, folders[name])
    assert_same(found, plain_videos(name, pipeline))
    assert found.shape == (2, FRAMES[name], 3, *SIZES[name].values()) and model.frames == FRAMES[name]
    assert (found[:, 0] - found[:, -1]).abs().max() > 1e-2  # it moves
    free = load(name, folders[name], sampler={"guidance_scale": 1.0})
    without = our_videos(free, free.initial_theta)
    assert_same(without, plain_videos(name, pipeline, guidance_scale=1.0))
    assert (found - without).abs().max() > 1e-3


def test_animatediff_with_noise_draws_the_videos_of_a_plain_pipeline(folders: dict[str, Path]) -> None:
    model = load("animatediff", folders["animatediff"], sampler={"eta": 1.0})
    pipeline = plain("animatediff", folders["animatediff"])
    assert_same(our_videos(model, model.initial_theta), plain_videos("animatediff", pipeline, eta=1.0))


def test_motion_modules_in_stable_diffusion_are_the_whole_pipeline(folders: dict[str, Path]) -> None:
    """Also one that was saved without them apart."""
    whole = load("animatediff", folders["animatediff"])
    latent, time = some_latents(whole), whole.schedule.timesteps[1]
    expected = whole(some_theta(whole), latent, time, whole.encode(PROMPTS))
    motion = {"motion_adapter": str(folders["motion"])}
    for place, options in (("without_adapter", {}), ("stable_diffusion", motion)):
        other = load("animatediff", folders[place], **options)
        assert torch.equal(other(some_theta(whole), latent, time, other.encode(PROMPTS)), expected)
        assert other.weights() == whole.weights()


def test_motion_modules_are_given_the_noise_levels_that_they_were_trained_with(folders: dict[str, Path]) -> None:
    model = load("animatediff", folders["stable_diffusion"], motion_adapter=str(folders["motion"]))
    motion = MotionAdapter.from_pretrained(folders["motion"])
    pipeline = plain("animatediff", folders["stable_diffusion"], motion_adapter=motion)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, beta_schedule="linear")
    assert_same(our_videos(model, model.initial_theta), plain_videos("animatediff", pipeline))


def test_wan_with_eulers_scheduler_draws_the_videos_of_a_plain_pipeline(folders: dict[str, Path]) -> None:
    model = load("wan", folders["euler"])
    assert_same(our_videos(model, model.initial_theta), plain_videos("wan", plain("wan", folders["euler"])))
    times = load("wan", folders["wan"]).schedule.timesteps
    assert max(abs(a - b) for a, b in zip(model.schedule.timesteps, times, strict=True)) > 100  # other times


def test_wan_2_2_of_one_transformer_draws_the_videos_of_a_plain_pipeline(tmp_path: Path) -> None:
    """Its time is told for every token, its VAE is another."""
    save_wan(tmp_path, wan22=True)
    model = load("wan", tmp_path)
    assert_same(our_videos(model, model.initial_theta), plain_videos("wan", plain("wan", tmp_path)))


def test_wans_times_are_those_of_its_scheduler(folders: dict[str, Path]) -> None:
    """UniPC's, shifted by flow_shift 3; a step's mean without noise is Euler's from its sigma to the next."""
    schedule = load("wan", folders["wan"]).schedule
    even = numpy.linspace(1, 1e-3, 4)[:-1]
    shifted = 3 * even / (1 + 2 * even)
    assert schedule.timesteps == (999, *(1000 * shifted[1:]).astype(int))  # 1 less a millionth, then cut
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(3, sigmas=even)
    latent, velocity = torch.randn(2, 2, 4, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    for k, time in enumerate(scheduler.timesteps):
        expected = scheduler.step(velocity, time, latent).prev_sample
        assert_same(schedule.mean(k, latent, velocity), expected)


@FAMILIES
@pytest.mark.parametrize("adapter", [LORA, IA3], ids=["lora", "ia3"])
def test_a_theta_for_each_chain_is_a_loop_over_chains(
    name: str, adapter: dict[str, Any], folders: dict[str, Path]
) -> None:
    model = load(name, folders[name], adapter)
    assert_loop_over_chains(model, PROMPTS, NEGATIVES)
    assert_last_step_is_the_base_models(model, PROMPTS, NEGATIVES)


@FAMILIES
def test_chosen_frames_and_slices_are_those_of_the_whole_video(name: str, folders: dict[str, Path]) -> None:
    """Gradient included, at which slices are decoded again; what Wan's VAE keeps between frames is let go."""
    size = {"animatediff": 4, "wan": 1}[name]
    whole, sliced = load(name, folders[name]), load(name, folders[name], decode_slice=size)
    latents = some_latents(whole).requires_grad_()
    everything = whole.decode(latents)
    pull = torch.randn(everything.shape, generator=torch.Generator().manual_seed(2))
    for frames in (None, CHOSEN[name]):
        expected, own = (everything, pull) if frames is None else (everything[:, frames], pull[:, frames])
        (gradient,) = torch.autograd.grad((expected * own).sum(), latents, retain_graph=True)
        for model in (whole, sliced):
            found = model.decode(latents, frames)
            assert_same(found, expected)
            assert_same(torch.autograd.grad((found * own).sum(), latents)[0], gradient, atol=1e-4)
        assert gradient.abs().max() > 1e-2
    if name == "wan":
        assert not any(isinstance(part, Tensor) for part in sliced.pipeline.vae._feat_map)


def test_wans_slices_need_less_memory_for_the_gradient(folders: dict[str, Path]) -> None:
    """Of one video too: a latent frame at a time."""

    def peak(**options: Any) -> int:
        model = load("wan", folders["wan"], num_frames=17, **options)
        latents = some_latents(model)[:1].requires_grad_()
        return peak_bytes(lambda: model.decode(latents).sum().backward(), torch.device("cpu"))

    assert peak(decode_slice=1) < 0.6 * peak()


def test_only_the_latents_of_chosen_frames_matter(folders: dict[str, Path]) -> None:
    """AnimateDiff decodes a frame's own latent, Wan up to its latent frame."""
    for name, before in (("animatediff", 1), ("wan", 0)):
        model = load(name, folders[name])
        latents = some_latents(model).requires_grad_()
        (gradient,) = torch.autograd.grad(model.decode(latents, [before]).sum(), latents)
        touched = gradient.abs().amax((0, 1, 3, 4)) > 0
        assert touched.nonzero().flatten().tolist() == [before]


@pytest.mark.parametrize(
    ("name", "adapter"),
    [("animatediff", LORA), ("animatediff", MOTION_ONLY), ("wan", LORA)],
    ids=["animatediff", "motion modules", "wan"],
)
def test_lora_loads_in_plain_diffusers_and_draws_the_same_videos(
    name: str, adapter: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    model = load(name, folders[name], adapter)
    theta = some_theta(model)
    file = model.save_adapter(theta, tmp_path)
    assert adapter is LORA or all("motion_modules" in key for key in load_file(file))
    pipeline = plain(name, folders[name])
    before = plain_videos(name, pipeline)
    pipeline.load_lora_weights(tmp_path / "lora")
    expected = plain_videos(name, pipeline)
    assert_same(our_videos(model, theta), expected)
    assert (expected - before).abs().max() > 1e-3
    assert torch.equal(load(name, folders[name], adapter).load_adapter(tmp_path), theta)


@FAMILIES
def test_bfloat16_weights_keep_a_float32_adapter_and_chain(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model, reference = load(name, folders[name], dtype="bfloat16"), load(name, folders[name])
    assert_close_in_float32(model, reference, PROMPTS, tmp_path)
    latent = some_latents(model)
    videos = model.decode(latent)
    assert videos.dtype == torch.float32 and (videos - reference.decode(latent)).abs().mean() < 0.02


def test_what_a_tokenizer_cuts_is_truncated(folders: dict[str, Path]) -> None:
    for name, most in (("animatediff", 14), ("wan", TOKENS - 1)):
        texts = ["a " * (most + 1), "a " * most]
        assert load(name, folders[name]).truncated(texts) == texts[:1]


def test_a_video_is_as_long_and_as_large_as_the_pipelines_own_if_nothing_is_said(tmp_path: Path) -> None:
    save_stable_diffusion(tmp_path / "base")
    save_motion_adapter(tmp_path / "motion", most_frames=32)
    plain = {"num_frames": None, "height": None, "width": None}
    motion = load("animatediff", tmp_path / "base", motion_adapter=str(tmp_path / "motion"), **plain)
    assert (motion.frames, motion.latent_shape) == (16, (4, 16, 8, 8))


@pytest.mark.parametrize(("name", "frames", "chains"), [("animatediff", 2, 12), ("wan", 5, 64)])
def test_updates_of_all_orders_raise_a_reward(
    name: str, frames: int, chains: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    changes = {
        "model": {"num_frames": frames, **SIZES[name]},
        "adapter": LORA,
        "reward": {"frames": 1},
        "estimator": {"zeroth_order": {"count": 2, "chunk_size": 2}},
        "train": {"chains": 4, "chains_per_prompt": 2, "chunk_size": 2, "learning_rate": 0.4},
        "evaluation": {"chains": chains},
    }
    folder = updates_raise_the_reward(
        lambda output: recipe(name, folders[name], output, **changes), tmp_path, interrupted=name == "wan", shown=True
    )
    assert Image.open(folder / "samples" / "before_after.gif").n_frames == frames


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("animatediff", {"num_frames": 7}, r"model.num_frames is 7; allowed: up to 6 for these motion modules"),
        ("animatediff", {"height": 15}, "divisible by 8 but are 15"),
        ("animatediff", {"folder": "stable_diffusion"}, "which has no motion modules; set model.motion_adapter to"),
        ("animatediff", {"motion_adapter": "motion"}, "holds a AnimateDiffPipeline; .* leave the key out"),
        (
            "animatediff",
            {"folder": "stable_diffusion", "motion_adapter": "/nowhere"},
            "'/nowhere': there is no such folder",
        ),
        (
            "animatediff",
            {"folder": "stable_diffusion", "motion_adapter": "stable_diffusion/unet"},
            "holds a UNet2DConditionModel; allowed: a MotionAdapter",
        ),
        ("animatediff", {"folder": "stable_diffusion", "motion_adapter": "wide_motion"}, "(?s)could not be load.*size"),
        (
            "animatediff",
            {"adapter": LORA | {"target_modules": ["proj_in"]}},
            "sits in .*proj_in.*diffusers calls",
        ),
        ("animatediff", {"folder": "wan"}, "holds a WanPipeline; .*; leave model.name out"),
        ("wan", {"num_frames": 7}, "num_frames is 7, of which a WanPipeline of this model makes 5"),
        ("wan", {"num_frames": 3}, "num_frames is 3, of which .* makes 1"),
        ("wan", {"width": 20}, "divisible by 16 but are 16 and 20"),
        ("wan", {"motion_adapter": "motion"}, "motion_adapter is set, .* holds a WanPipeline"),
        ("wan", {"sampler": {"timestep_spacing": "linspace"}}, "'linspace', but this pipeline's times are its UniPC"),
        ("wan", {"folder": "animatediff"}, "holds a AnimateDiffPipeline; .*; leave model.name out"),
    ],
)
def test_what_does_not_work_is_refused(
    name: str, changes: dict[str, Any], words: str, folders: dict[str, Path]
) -> None:
    places = {key: str(folders[name].parent / changes[key]) for key in ("folder", "motion_adapter") if key in changes}
    with pytest.raises(UserError, match=words):
        load(name, **{"folder": folders[name]} | changes | places)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("num_frames", "a StableDiffusionPipeline takes no num_frames"),
        ("motion_adapter", "allowed for .* 'stab"),
    ],
)
def test_keys_of_videos_are_refused_for_pictures(key: str, words: str, folders: dict[str, Path]) -> None:
    config = ModelConfig(name="stable_diffusion", path=str(folders["stable_diffusion"]), **{key: "4"})
    with pytest.raises(UserError, match=words):
        load_model(config, AdapterConfig(**LORA), SamplerConfig(steps=3), torch.device("cpu"))
