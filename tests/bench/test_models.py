"""The benches' random pipelines have the published models' shapes: their numbers of parameters are the same."""

from __future__ import annotations

import pytest
import torch

from bench.models import denoiser

PARAMETERS = {"sd14": 859_520_964, "sdxl": 2_567_463_684}  # of the UNets on the hub


@pytest.mark.parametrize("size", PARAMETERS)
def test_denoisers_are_as_large_as_the_published_ones(size: str) -> None:
    with torch.device("meta"):
        unet = denoiser(size)
    assert sum(parameter.numel() for parameter in unet.parameters()) == PARAMETERS[size]
