"""A black box's phases in the laboratory, against the estimator's own parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rlr_ray.lab.measure import Candidate, Subject, estimate_batch, subject_of
from rlr_ray.lab.phases import once_trusted, until_trusted
from rlr_ray.train.engine import Engine
from tests.runs import small_run


def black_box(folder: Path, **surrogate: Any) -> tuple[Engine, Subject]:
    estimator: dict[str, Any] = {"first_order": {"steps": "all"}, "sub_chain": {"length": 0}, "rest": "none"}
    estimator |= {"half_order": {"score": "forward", "baseline": "running", "weight": 1.0}}
    estimator |= {"surrogate": {"use": "switch", "window": 1, "batch_size": 8} | surrogate}
    reward = {"name": "tests.models.tiny:brightness", "differentiable": False}
    engine = Engine(small_run(folder, estimator=estimator, reward=reward, train={"chains": 8}))
    return engine, subject_of(engine, engine.model.initial_theta, whole_updates=True)


def test_each_phase_is_what_its_updates_have(tmp_path: Path) -> None:
    """The forward term first; then the gradient of the heads' sum through all steps, at chains that they never saw."""
    engine, subject = black_box(tmp_path, trust=0.05)
    seen: list[int] = []
    batch = subject.batch
    watched = Subject(subject.sampler, subject.theta, lambda n: (seen.append(n), batch(n))[1], subject.groups)
    first, second = until_trusted(engine, watched), once_trusted(engine, watched, 8)
    assert second is not None and seen and max(seen) < 0
    assert "forward term" in str(first.shape) and str(second.shape) == "4 steps: first order on every step"
    assert list(estimate_batch(subject, Candidate("first", first.shape), 0).terms) == ["half_order"]
    found = estimate_batch(second.subject, Candidate("second", second.shape), 0)
    theta = subject.theta.clone().requires_grad_()
    climbed = []
    for chains in second.subject.batch(0):
        latent = chains.x_start
        for k in range(len(engine.sampler)):
            latent = engine.sampler.step(theta, k, latent, chains.noise[k], chains.conditioning)
        assert chains.heads is not None
        climbed.append(chains.heads(latent).sum(0))
    (expected,) = torch.autograd.grad(torch.cat(climbed).mean(), theta)
    torch.testing.assert_close(found.terms["first_order"].gradient, expected, rtol=1e-3, atol=1e-7)
    assert found.of_surrogate and float(expected.norm()) > 0


def test_a_surrogate_that_is_not_trusted_has_no_second_phase(tmp_path: Path) -> None:
    assert once_trusted(*black_box(tmp_path, trust=0.99), 2) is None
