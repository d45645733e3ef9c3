"""Extra memory of one update's gradient estimate, by the number of chunks.

    python -m bench.speed.update_memory                        # P = 2e7 at 1 and 128 chunks: some minutes
    python -m bench.speed.update_memory --parameters 200000    # seconds

A denoiser that uses all P numbers and does next to nothing else, on the CPU, a process a row: the peak of what torch's
allocator handed out beyond what was there, and of the process's resident memory. "Before" is what the estimate took
until it summed as it went, by its formula, which held to 1 % at P = 2e5: float32 rows [2, chunks, P], kept and
concatenated for the all-reduce; with several workers once more.
"""

from __future__ import annotations

import multiprocessing
import resource
from typing import Any

import torch
from torch import Tensor

from bench.common import RESULTS, options, write_json
from rlr_ray.core.gradient import estimate_gradient
from rlr_ray.core.plan_shape import PlanShape
from rlr_ray.core.sampler import Chains, Sampler
from rlr_ray.core.schedule import Schedule
from rlr_ray.core.weighting import TermEstimate
from rlr_ray.utils.memory import peak_bytes

FILE = RESULTS / "speed" / "update_memory_cpu.json"
STEPS, CHAINS = 3, 2  # T, chains in a chunk
CHUNKS = (1, 128)
PLANS = {
    "first order": PlanShape(STEPS, STEPS, 0, rest="none"),
    "first and half order": PlanShape(STEPS, 1, 2, rest="none"),
    "first, half and zeroth order": PlanShape(STEPS, 1, 1),
}


def estimate(name: str, parameters: int, chunks: int) -> Any:
    """One estimate as a function, its inputs made."""
    theta, fixed = torch.full((2, parameters), 1e-3).unbind()
    schedule = Schedule((2.0, 1.0, 0.0), (1.0,) * STEPS, (0.1,) * STEPS, (0.5,) * STEPS)

    def denoiser(theta: Tensor, latent: Tensor, timestep: float, conditioning: Any) -> Tensor:
        return latent * (theta @ fixed)

    source, plan, work = torch.Generator().manual_seed(0), PLANS[name].draw(0), {}
    for c in range(chunks):
        start = torch.randn(CHAINS, 1, 2, 2, generator=source)
        noise = torch.randn(STEPS, CHAINS, 1, 2, 2, generator=source)
        work[c] = plan, Chains(start, noise, {}, lambda latent: latent.flatten(1).sum(1))
    arguments = (Sampler(denoiser, schedule), theta, work, torch.zeros(chunks * CHAINS))
    return lambda: estimate_gradient(*arguments, lambda: TermEstimate(theta.clone(), 1.0))


def measure(name: str, parameters: int, chunks: int) -> dict[str, Any]:
    """One row, in a process that has done nothing else."""
    torch.set_num_threads(1)
    estimate(name, 1000, 2)()  # what libraries take for themselves
    work = estimate(name, parameters, chunks)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    resident = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    handed_out = peak_bytes(work, torch.device("cpu"))
    row = {"plan": name, "parameters": parameters, "chunks": chunks, "bytes": handed_out, "resident_bytes": resident}
    return row | {"numbers": handed_out / 4 / parameters, "bytes_before": 2 * 2 * chunks * parameters * 4}


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--parameters", type=int, default=20_000_000, metavar="P")
    parameters, rows = parser.parse_args().parameters, []
    for name in PLANS:
        for chunks in CHUNKS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                row = pool.apply(measure, (name, parameters, chunks))
            rows.append(row)
            print(
                f"{name}, {chunks} chunks, P = {parameters:g}: {row['bytes'] / 1e9:.3f} GB = {row['numbers']:.2f} P "
                f"float32 (resident {row['resident_bytes'] / 1e9:.3f}); before {row['bytes_before'] / 1e9:.1f} GB",
                flush=True,
            )
    write_json(FILE, rows)


if __name__ == "__main__":
    main()
