"""Frozen weights of 8 bits: what is drawn, learned and saved is as with the same weights rounded beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from rlr_ray.errors import UserError
from rlr_ray.models import module_bytes
from tests.models.common import assert_loop_over_chains, model_of, some_theta
from tests.models.tiny import save_stable_diffusion

LORA = {"type": "LORA", "r": 1, "target_modules": ["to_q", "to_v"]}
PROMPTS = ["a handwritten three", "a handwritten two"]
INT8 = {"backend": "torchao"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "sd"
    save_stable_diffusion(path)
    return path


def load(folder: Path, quantization: dict[str, Any] | None = None, **keys: Any) -> Any:
    return model_of("auto", folder, LORA, {"steps": 2}, quantization=quantization, **keys)


def learned(model: Any) -> tuple[Tensor, Tensor]:
    """The model's output at a step, and the gradient of its square."""
    theta = some_theta(model).requires_grad_()
    latent = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    output = model(theta, latent, model.schedule.timesteps[0], model.encode(PROMPTS))
    return output.detach(), torch.autograd.grad(output.square().sum(), theta)[0]


def test_int8_weights_are_those_rounded_beforehand_and_gradients_float32s(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    plain, rounded, model = load(folder), load(folder), load(folder, INT8)
    whole = learned(plain)
    weights = dict(model.pipeline.unet.named_parameters())
    quantised = {name: value.dequantize() for name, value in weights.items() if hasattr(value, "qdata")}
    assert "mid_block.attentions.0.transformer_blocks.0.attn1.to_k.weight" in quantised
    with torch.no_grad():
        for name, value in quantised.items():
            rounded.pipeline.unet.get_parameter(name).copy_(value)
    ours, expected = learned(model), learned(rounded)
    torch.testing.assert_close(ours[0], expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[1], expected[1], atol=1e-4 * float(expected[1].abs().max()), rtol=0)
    assert cosine_similarity(ours[1], whole[1], dim=0) > 0.999
    assert abs(ours[1].norm() / whole[1].norm() - 1) < 0.02
    assert_loop_over_chains(model, PROMPTS)
    kept, size = module_bytes(model.pipeline.unet), sum(value.numel() for value in quantised.values())
    saved = module_bytes(plain.pipeline.unet) - kept
    assert 2 * size < saved < 3 * size  # of 4 bytes a weight 1, and the scales
    model.save_adapter(some_theta(model), tmp_path)
    assert torch.equal(plain.load_adapter(tmp_path), some_theta(plain))


def test_bitsandbytes_needs_a_gpu(folder: Path) -> None:
    pytest.importorskip("bitsandbytes")
    if torch.cuda.is_available():
        pytest.skip("says what happens without a GPU, and here is one")
    with pytest.raises(UserError, match=r"could not be loaded .* GPU is needed for quantization"):
        load(folder, {"backend": "bitsandbytes_4bit"})


@pytest.mark.parametrize("backend", ["torchao", "bitsandbytes_4bit", "bitsandbytes_8bit"])
def test_a_package_that_is_not_there_is_named(backend: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    package = backend.partition("_")[0]
    with pytest.raises(UserError, match=f"needs the package {package}; install it: pip install --no-deps {package}"):
        load(folder, {"backend": backend})


@pytest.mark.parametrize(
    ("quantization", "file", "words"),
    [
        (INT8 | {"parts": ["transformer"]}, None, "'transformer', which is not the pipeline's; allowed .* unet, vae"),
        (INT8, {"unet": "unet.ckpt"}, "'unet', which has weights in a single_file, which is not quantised"),
    ],
)
def test_parts_that_cannot_be_quantised_are_refused(
    quantization: dict[str, Any], file: Any, words: str, folder: Path
) -> None:
    with pytest.raises(UserError, match=words):
        load(folder, quantization, single_file=file)


def test_an_option_that_the_backend_has_not_is_refused(folder: Path) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(UserError, match=r"has \{'quant_type': 'Int3'\}, which torchao does not take"):
        load(folder, INT8 | {"quant_type": "Int3"})
