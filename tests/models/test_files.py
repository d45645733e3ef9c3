"""Weights as others publish them: variants, shards, pickles, whole checkpoints in LDM's names, single files, GGUF."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlr_ray.errors import UserError
from tests.models import ldm
from tests.models.common import drawn, model_of, some_theta
from tests.models.tiny import save_flux, save_stable_diffusion

LORA = {"type": "LORA", "r": 1, "target_modules": ["to_q"]}
PROMPTS = ["a handwritten three", "a handwritten two"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "sd"
    save_stable_diffusion(folder)
    return folder


def pictures(path: Path, **keys: Any) -> Tensor:
    model = model_of("auto", path, LORA, {"steps": 2}, **keys)
    return drawn(model, some_theta(model), PROMPTS)


@pytest.fixture(scope="module")
def expected(plain: Path) -> Tensor:
    return pictures(plain)


def _saved(**options: Any) -> Callable[[Path, Path], dict[str, Any]]:
    def save(plain: Path, folder: Path) -> dict[str, Any]:
        StableDiffusionPipeline.from_pretrained(plain, safety_checker=None).save_pretrained(folder, **options)
        return {"variant": options["variant"]} if "variant" in options else {}

    return save


def _pickled(plain: Path, folder: Path) -> dict[str, Any]:
    _saved(safe_serialization=False)(plain, folder)
    file = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()
    return {}


def _one_part(plain: Path, folder: Path) -> dict[str, Any]:
    """Of the unet alone there is a variant, and no other weights."""
    shutil.copytree(plain, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".fp16.safetensors"))
    return {"variant": "fp16"}


def _whole(plain: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(ldm.checkpoint(plain), folder / "whole.safetensors")
    return {"single_file": str(folder / "whole.safetensors")}


def _by_part(plain: Path, folder: Path) -> dict[str, Any]:
    """The unet in LDM's names as a pickle, the VAE in diffusers'."""
    shutil.copytree(plain, folder)
    torch.save({"state_dict": ldm.unet(plain)}, folder / "unet.ckpt")
    for part in ("unet", "vae"):
        (folder / part / "diffusion_pytorch_model.safetensors").rename(folder / f"{part}.safetensors")
    return {"single_file": {"unet": str(folder / "unet.ckpt"), "vae": str(folder / "vae.safetensors")}}


PUBLISHED: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "shards": _saved(max_shard_size="20KB"),
    "a variant": _saved(variant="fp16"),
    "a variant in shards": _saved(variant="fp16", max_shard_size="20KB"),
    "a variant of one part": _one_part,
    "pickles": _pickled,
    "a whole checkpoint": _whole,
    "parts in files": _by_part,
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_same_weights_draw_the_same_however_they_are_published(
    kind: str, plain: Path, expected: Tensor, tmp_path: Path
) -> None:
    keys = PUBLISHED[kind](plain, tmp_path / "published")
    assert torch.equal(pictures(tmp_path / "published", **keys), expected)


def test_a_gguf_file_draws_what_its_rounded_weights_do(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    save_flux(tmp_path / "flux")
    weights = load_file(tmp_path / "flux" / "transformer" / "diffusion_pytorch_model.safetensors")
    kind, rounded, writer = gguf.GGMLQuantizationType.Q8_0, dict(weights), gguf.GGUFWriter(tmp_path / "f.gguf", "flux")
    for name, value in weights.items():
        if value.dim() == 2 and value.shape[1] % 32 == 0:
            blocks = gguf.quants.quantize(value.numpy(), kind)
            product = torch.from_numpy(gguf.quants.dequantize(blocks, kind))  # of a float16 scale and 8 bits
            rounded[name] = product.half().float()  # which diffusers has in float16
            writer.add_tensor(name, blocks, raw_dtype=kind)
        else:
            writer.add_tensor(name, value.numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    shutil.copytree(tmp_path / "flux", tmp_path / "rounded")
    save_file(rounded, tmp_path / "rounded" / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    keys: dict[str, Any] = {"height": 8, "width": 8, "call": {"max_sequence_length": 12}}
    adapter = {"type": "LORA", "r": 1, "target_modules": ["attn.to_q"]}
    drawings, gradients = [], []
    for folder, file in (("flux", {"transformer": str(tmp_path / "f.gguf")}), ("rounded", None)):
        sampler = {"steps": 2, "guidance_scale": 1.0, "eta": 0.5}
        model = model_of("auto", tmp_path / folder, adapter, sampler, single_file=file, **keys)
        theta = some_theta(model).requires_grad_()
        drawings.append(drawn(model, theta.detach(), PROMPTS))
        latent = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
        output = model(theta, latent, model.schedule.timesteps[0], model.encode(PROMPTS))
        gradients.append(torch.autograd.grad(output.square().sum(), theta)[0])
    torch.testing.assert_close(*drawings, atol=1e-5, rtol=0)
    torch.testing.assert_close(*gradients, atol=1e-4 * float(gradients[1].abs().max()), rtol=0)


def _copied(plain: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(plain, folder)
    return {}


def _hidden(plain: Path, folder: Path) -> dict[str, Any]:
    """A variant that the recipe does not say."""
    _one_part(plain, folder)
    return {}


def _unet_as_all(plain: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(plain, folder)
    save_file(ldm.unet(plain), folder / "unet.safetensors")
    return {"single_file": str(folder / "unet.safetensors")}


def _lacking(plain: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(plain, folder)
    weights = ldm.unet(plain)
    del weights["model.diffusion_model.middle_block.1.proj_in.bias"]
    save_file(weights, folder / "unet.safetensors")
    return {"single_file": {"unet": str(folder / "unet.safetensors")}}


def _empty_gguf(plain: Path, folder: Path) -> dict[str, Any]:
    shutil.copytree(plain, folder)
    (folder / "unet.gguf").touch()
    return {"single_file": str(folder / "unet.gguf")}


WRONG: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], dict[str, Any], str]] = {
    "no such variant": (_copied, {"variant": "fp16"}, "is fp16, the folder's variants: none"),
    "a variant alone": (_hidden, {}, "is not set, the folder's variants: fp16"),
    "a revision of a folder": (_copied, {"revision": "main"}, "'main', but model.path is a folder, which has none"),
    "no such file": (_copied, {"single_file": "no.ckpt"}, "single_file 'no.ckpt': there is no such file"),
    "no such part": (_copied, {"single_file": {"transformer": "x"}}, "'transformer', which .* allowed: unet, vae, or"),
    "a whole GGUF": (_empty_gguf, {}, r"GGUF file, which holds one part; allowed: .*\{PART: FILE\}"),
    "a variant of a file": (_unet_as_all, {"variant": "fp16"}, "is set beside model.variant"),
    "a part in place of all": (_unet_as_all, {}, r"StableDiffusionPipeline built as .*, with all .*\{PART: FILE\}"),
    "a file that lacks a tensor": (_lacking, {}, "UNet2DConditionModel built as model.path says, with all weights"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_not_there_or_do_not_fit_are_refused(case: str, plain: Path, tmp_path: Path) -> None:
    prepare, keys, words = WRONG[case]
    with pytest.raises(UserError, match=words):
        pictures(tmp_path / "published", **prepare(plain, tmp_path / "published"), **keys)
