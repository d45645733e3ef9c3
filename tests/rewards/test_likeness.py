"""Precision, recall and distances of pictures against a computation pair by pair, and their errors against chance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlr_ray.rewards.likeness import Likeness, Pictures, Reference, summarised, within_prompt


def drawn(count: int, seed: int, prompts: int = 5, scale: float = 1.0, size: int = 6) -> Pictures:
    noise = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    which = torch.arange(count) % prompts
    return Pictures(scale * noise + torch.eye(size)[which], which)


def apart(one: Tensor, other: Tensor) -> float:
    return math.sqrt(float((one.double() - other.double()).square().sum()))


def covered(features: Tensor, centres: Tensor) -> list[float]:
    """The paper's equation (1), k = 3: whether each lies within some centre's distance to its third nearest other."""
    radii = []
    for i, centre in enumerate(centres):
        radii.append(sorted(apart(centre, other) for j, other in enumerate(centres) if j != i)[2])
    return [float(any(apart(one, c) <= r for c, r in zip(centres, radii, strict=True))) for one in features]


def nearest(one: Pictures, other: Pictures, *, same: bool = False) -> list[float]:
    """Within each prompt; of a set to itself every other."""
    return [
        min(
            apart(a, b)
            for j, (b, q) in enumerate(zip(*vars(other).values(), strict=True))
            if p == q and (i != j or not same)
        )
        for i, (a, p) in enumerate(zip(*vars(one).values(), strict=True))
    ]


def mean_pair(pictures: Pictures) -> float:
    pairs = [
        apart(pictures.features[i], pictures.features[j])
        for i in range(len(pictures.prompts))
        for j in range(i)
        if pictures.prompts[i] == pictures.prompts[j]
    ]
    return sum(pairs) / len(pairs)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def test_against_real_pictures_they_are_the_papers_pair_by_pair() -> None:
    pictures, real = drawn(40, 0), drawn(50, 1, scale=0.8)
    found = Reference(real).of(pictures)
    assert found.precision.tolist() == covered(pictures.features, real.features)
    assert found.recall.tolist() == covered(real.features, pictures.features)
    assert 0 < found.means["precision"] < 1 and 0 < found.means["recall"] < 1
    scale = mean(nearest(real, real, same=True))
    assert found.nn.tolist() == pytest.approx([one / scale for one in nearest(pictures, real)])
    assert found.means["pairwise"] == pytest.approx(mean_pair(pictures) / mean_pair(real))


def test_against_the_base_model_each_half_is_compared_with_the_other_half() -> None:
    base, after = drawn(40, 0), drawn(40, 1, scale=1.3)
    first = torch.arange(40) // 5 % 2 == 0  # chains of each prompt in turn
    found = Reference.base(base).of(after)
    parts = [(after[~first], base[first]), (after[first], base[~first])]
    assert found.precision.tolist() == [one for part in parts for one in covered(part[0].features, part[1].features)]
    assert found.recall.tolist() == [one for part in parts for one in covered(part[1].features, part[0].features)]
    scale = mean(nearest(base[~first], base[first]) + nearest(base[first], base[~first]))
    assert found.means["nn"] == pytest.approx(mean([one for part in parts for one in nearest(*part)]) / scale)
    assert found.means["pairwise"] == pytest.approx(mean_pair(after) / mean_pair(base))
    itself = Reference.base(base).of(base).means
    assert itself["nn"] == pytest.approx(1) and itself["pairwise"] == pytest.approx(1)
    assert itself["precision"] < 1  # no chain is compared with itself


def test_the_same_others_and_a_part() -> None:
    pictures = drawn(60, 0, prompts=3)
    same = Reference(pictures).of(pictures).means
    assert (same["precision"], same["recall"]) == (1, 1) and same["nn"] == pytest.approx(0, abs=1e-6)
    far = Reference(pictures).of(Pictures(pictures.features + 100, pictures.prompts)).means
    assert (far["precision"], far["recall"]) == (0, 0) and far["nn"] > 10 and far["pairwise"] == pytest.approx(1)
    few = Reference(pictures).of(pictures[pictures.features[:, 3] > 0.5]).means  # half the space
    assert few["precision"] == 1 and 0.4 < few["recall"] < 0.8
    collapsed = Reference(pictures).of(Pictures(pictures.features[:1].expand(60, -1), pictures.prompts)).means
    assert collapsed["precision"] == 1 and collapsed["recall"] < 0.05 and collapsed["pairwise"] == 0


def test_what_cannot_be_measured_is_nan_and_left_out() -> None:
    few = drawn(6, 0)  # three in a half have no third nearest other
    found = Reference.base(few).of(drawn(6, 1))
    assert found.precision.isnan().all() and found.recall.isnan().all() and not found.nn.isnan().any()
    before = Reference.base(few).of(few)
    told = summarised({"base": before}, {"base": found})
    assert told == {"base": {}}  # nor have so few an error
    alone = Pictures(few.features, torch.arange(6))
    assert within_prompt(alone).isnan().all() and math.isnan(Reference.base(alone).of(alone).means["pairwise"])
    unknown = Reference(drawn(20, 2, prompts=2)).of(drawn(20, 3, prompts=3))  # a third prompt without real pictures
    assert unknown.nn.isnan().tolist() == [i % 3 == 2 for i in range(20)] and not math.isnan(unknown.means["nn"])
    unsorted = Reference(Pictures(few.features, torch.zeros(6)), by_prompt=False).of(few).means
    assert unsorted["nn"] == pytest.approx(0, abs=1e-6) and math.isnan(unsorted["pairwise"])


@pytest.mark.parametrize("against", ["base", "real"])
def test_two_evaluations_of_one_model_on_other_seeds_differ_by_their_errors(against: str) -> None:
    """Change over error in 60 pairs: mean 0 (standard error .13), deviation 1 (standard error .09)."""
    ratios: dict[str, list[float]] = {}
    for pair in range(60):
        before, after = drawn(120, 2 * pair), drawn(120, 2 * pair + 1)
        reference = Reference.base(before) if against == "base" else Reference(drawn(90, 1000 + pair))
        for name, (change, error) in reference.of(after).changes(reference.of(before)).items():
            ratios.setdefault(name, []).append(change / error)
    for name, values in ratios.items():
        z = torch.tensor(values)
        assert abs(float(z.mean())) < 0.45 and 0.7 < float(z.std()) < 1.35, (name, float(z.mean()), float(z.std()))


def test_a_collapse_is_far_beyond_its_error() -> None:
    before, real = drawn(120, 0), Reference(drawn(90, 2))
    narrow = Pictures(0.5 * drawn(120, 1).features, before.prompts)
    for reference in (Reference.base(before), real):
        was: Likeness = reference.of(before)
        for name in ("recall", "pairwise"):
            change, error = reference.of(narrow).changes(was)[name]
            assert change < -4 * error, (name, change, error)
