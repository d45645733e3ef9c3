"""A denoiser's step at true sizes as it is computed: seconds, and memory beside what is counted without data.

    python -m bench.speed.steps --size flux       # on a GPU; sd14, sdxl and sd35_medium likewise
    python -m bench.speed.steps --size tiny_sd3   # on a CPU: that the script works

Random weights in bfloat16, on a CPU in float32; the parts are `bench.speed.true_memory`'s. No Ray, no network.
"""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel

from bench.models import DEVICE
from bench.speed.measuring import Kept, arguments, measure, rounded
from bench.speed.true_memory import SD35, SHAPES, Shape, Steps, adapted
from rlr_ray.utils.memory import GIB

TINY = SD35 | {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128, "dual_attention_layers": (0,)}
SIZES = SHAPES | {"tiny_sd3": Shape(lambda: SD3Transformer2DModel(**TINY), SHAPES["sd35_medium"].inputs, 2)}


def main() -> None:
    args = arguments(__doc__, sizes=SIZES, side=0)
    shape, side = SIZES[args.size], args.side or (16 if args.size.startswith("tiny") else 128)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    torch.set_default_dtype(dtype)
    with DEVICE, torch.random.fork_rng([DEVICE] if DEVICE.type == "cuda" else []):
        torch.manual_seed(0)
        model = adapted(shape)
        steps = Steps(model, shape, side)
        weights = sum(one.numel() * one.element_size() for one in model.parameters())
        facts = {"side": side, "dtype": str(dtype).removeprefix("torch."), "weights_gib": rounded(weights / GIB)}
        kept = Kept("steps", args.size, facts, args.limit_s)
        for name, part in steps.parts().items():
            kept.row(name, lambda part=part: measure(part))  # type: ignore[misc]
            model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
