"""Encoders that are in main memory but while they encode; with a GPU, tests/gpu sees them come and go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPTextModel

from tests.models.common import CPU, model_of

LORA = {"type": "LORA", "r": 1, "target_modules": ["to_q"]}


def test_an_encoder_comes_for_a_new_prompt_and_goes_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = (model_of("digits", None, LORA, {"steps": 2}, offload=choice) for choice in (False, True))
    moves = list[Any]()
    to = CLIPTextModel.to

    def goes(module: Any, place: Any) -> Any:
        moves.append(place)
        return to(module, place)

    def comes(hook: Any, module: Any, *arguments: Any, **options: Any) -> Any:  # accelerate's does so on a GPU alone
        moves.append(hook.execution_device)
        return arguments, options

    monkeypatch.setattr(CLIPTextModel, "to", goes)
    monkeypatch.setattr("accelerate.hooks.CpuOffload.pre_forward", comes)
    prompts = ["a handwritten three", "a handwritten three"]
    encoded = model.encode(prompts, ["", ""])
    assert moves and moves == [CPU, "cpu"] * (len(moves) // 2)  # to the model's device and back: it never stays
    expected, count = plain.encode(prompts, ["", ""]), len(moves)
    assert all(torch.equal(encoded[key], value) for key, value in expected.items())
    model.encode(prompts, ["", ""])
    assert len(moves) == count  # what is known is not encoded again
    assert model.weights() == plain.weights()  # the device is main memory here
