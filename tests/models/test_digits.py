"""The shipped files are what the model card says."""

from __future__ import annotations

import pytest
import torch

from rlr_ray.assets import DIGITS
from rlr_ray.config.model import AdapterConfig, ModelConfig, SamplerConfig
from rlr_ray.models.loading import load_model
from rlr_ray.rewards.digits import DigitClassifier, load_classifier
from scripts.build_digits import accuracy, load_data, plain_samples, split_data

SAMPLES = 400


def test_the_files_are_small() -> None:
    assert sum(file.stat().st_size for file in DIGITS.rglob("*") if file.is_file()) < 2.5e6


@pytest.mark.parametrize("name", ["reward", "judge"])
def test_the_classifiers_read_digits_that_they_have_not_seen(name: str) -> None:
    assert accuracy(load_classifier(DigitClassifier, DIGITS / f"{name}.safetensors"), *split_data()["test"]) > 0.97


def test_the_classifiers_saw_disjoint_pictures() -> None:
    parts = split_data()
    assert [len(labels) for _, labels in parts.values()] == [718, 719, 360]
    pictures = torch.cat([images.flatten(1) for images, _ in parts.values()])
    assert torch.equal(pictures, load_data()[0].flatten(1))  # each picture of the data in one part


def test_plain_samples_leave_headroom() -> None:
    images, labels = plain_samples(DIGITS, SAMPLES)
    found = accuracy(load_classifier(DigitClassifier, DIGITS / "judge.safetensors"), images, labels)
    assert 0.55 < found < 0.75  # .678 on 1,000 samples; standard error of 400: .023


def test_the_model_is_loaded_by_name() -> None:
    adapter = AdapterConfig(type="LORA", r=1, target_modules=["attn2.to_out.0"])
    model = load_model(ModelConfig(name="digits"), adapter, SamplerConfig(steps=10), torch.device("cpu"))
    assert model.latent_shape == (4, 4, 4)
    assert len(model.initial_theta) == 576
    assert len(model.schedule) == 10
