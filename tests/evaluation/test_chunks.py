"""An evaluation is the same however many chains are sampled at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlr_ray.rewards.scores import Evaluation
from rlr_ray.train.engine import Engine
from rlr_ray.train.held_out import evaluate
from tests.runs import small_run

CHAINS = 43
EVALUATION = {"chains": CHAINS, "judge": {"name": "digits_judge"}}


@pytest.fixture(scope="module")
def usual() -> tuple[Engine, Evaluation]:
    """In chunks of the training's size."""
    engine = Engine(small_run(Path("nowhere"), train={"chains": 8, "chunk_size": 4}, evaluation=EVALUATION))
    return engine, evaluate(engine, engine.model.initial_theta + 0.05)


@pytest.mark.parametrize("size", [9, 50])
def test_the_chunk_of_an_evaluation_does_not_change_it_beyond_rounding(
    usual: tuple[Engine, Evaluation], size: int
) -> None:
    """Smaller and larger than the number of chains whose divergence is measured."""
    engine, one = usual
    other = engine.under(small_run(Path("nowhere"), evaluation=EVALUATION | {"chunk_size": size}))
    seen: list[int] = []
    two = evaluate(other, engine.model.initial_theta + 0.05, lambda indices, images: seen.append(len(images)))
    assert seen == [size] * (CHAINS // size) + [CHAINS % size]
    assert one.scores.keys() == two.scores.keys() == {"digits", "digits_judge"}
    for label, scores in one.scores.items():
        torch.testing.assert_close(two.scores[label], scores, rtol=1e-4, atol=1e-4)
    assert len(one.divergence) == 40 and float(one.divergence.min()) > 0
    torch.testing.assert_close(two.divergence, one.divergence, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(two.images, one.images, rtol=0, atol=1e-4)
    assert two.diversity == pytest.approx(one.diversity, rel=1e-4)


def test_replaced_scores_are_counted_over_every_chunk_of_the_rewards_and_the_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "def no_number(images, prompts, metadata):\n    return images.mean((1, 2, 3)) * float('nan')\n"
    (tmp_path / "score_of_none.py").write_text(module)
    monkeypatch.chdir(tmp_path)
    bad = {"name": "score_of_none:no_number", "invalid": -1.0, "differentiable": True}
    evaluation = {"chains": 5, "chunk_size": 2, "judge": None, "judges": {"judge": bad}}
    engine = Engine(small_run(tmp_path, reward=bad, evaluation=evaluation))
    evaluated = evaluate(engine, engine.model.initial_theta)
    assert [scores.tolist() for scores in evaluated.scores.values()] == [[-1.0] * 5] * 2
    assert evaluated.invalid == 10
    assert bool(evaluated.measured_rows(engine.rewards.labels).isnan().all())
