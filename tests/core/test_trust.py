"""Trust in a surrogate, against closed forms: rewards are a prompt's mean, what Q knows, and what it does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlr_ray.core.seeds import normal
from rlr_ray.core.trust import RunningMeans, Trust

PROMPTS = 400  # one chain of each in an update
IDS = list(range(PROMPTS))
MEANS = 30.0 * torch.arange(PROMPTS)  # what prompts differ in


def drawn(name: str, step: int, count: int = len(IDS)) -> Tensor:
    return normal((count,), torch.float64, name, step)


def trust_of(
    rate: Callable[[int], tuple[Tensor, Tensor, Tensor | None]],  # scores, rewards, a second rating
    updates: int = 12,
    prompts: list[int] = IDS,
    **options: float,
) -> Trust:
    trust = Trust(1, **options)  # type: ignore[arg-type]
    for step in range(updates):
        scores, rewards, again = rate(step)
        trust.observe(scores[None], rewards[None], prompts, None if again is None else again[None])
    return trust


@pytest.mark.parametrize("share", [0.8, 0.55, 0.45, 0.0])
def test_what_is_explained_is_the_share_within_prompts(share: float) -> None:
    """Q knows each prompt's mean and so much of the variance within."""

    def rate(step: int) -> tuple[Tensor, Tensor, None]:
        known = math.sqrt(share) * drawn("known", step)
        return MEANS + known, MEANS + known + math.sqrt(1 - share) * drawn("rest", step), None

    trust = trust_of(rate)
    explained, error = (float(value) for value in trust.measured())
    assert abs(explained - share) < 3.5 * error < 0.15, (explained, error)
    assert trust.trusted == [share > 0.5]


def test_the_standard_error_is_that_of_repetitions() -> None:
    def explained(seed: int) -> tuple[float, float]:
        def rate(step: int) -> tuple[Tensor, Tensor, None]:
            known = drawn("known", 1000 * seed + step, 10)
            return known, known + drawn("rest", 1000 * seed + step, 10), None

        value, error = trust_of(rate, 6, list(range(10))).measured()
        return float(value), float(error)

    values, errors = zip(*(explained(seed) for seed in range(40)), strict=True)
    assert 0.6 < torch.tensor(values).std() / torch.tensor(errors).mean() < 1.6


def noisy(signal: float, noise: float, name: str = "signal") -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    """Q knows all that can be known of a reward whose every rating has noise of its own."""

    def rate(step: int) -> tuple[Tensor, Tensor, Tensor]:
        known = MEANS + signal * drawn(name, step)
        rewards = (known + noise * drawn(f"noise {i}", step) for i in range(2))
        return known, *rewards

    return rate


def test_the_bar_knows_the_rewards_own_noise() -> None:
    trust = trust_of(noisy(1.0, 2.0))
    assert float(trust.noise_share) == pytest.approx(0.8, abs=0.08)
    assert float(trust.measured()[0]) < 0.3 and trust.trusted == [True]
    blind = trust_of(noisy(0.0, 2.0))
    assert blind.trusted == [False] and float(blind.noise_share) > 0.9


def test_a_few_noisy_chains_do_not_trust_by_luck() -> None:
    """Q knows less than half of what can be known, on 2 chains an update: often above the bar, seldom for sure."""

    def opened(seed: int) -> tuple[bool, bool]:
        def rate(step: int) -> tuple[Tensor, Tensor, Tensor]:
            number = 1000 * seed + step
            known, hidden = 0.7 * drawn("known", number, 2), 0.8 * drawn("hidden", number, 2)
            return known, known + hidden + 2 * drawn("a", number, 2), known + hidden + 2 * drawn("b", number, 2)

        trust = trust_of(rate, 6, [0, 1])
        share = trust.noise_share
        return trust.trusted[0], float(trust.measured()[0]) > 0.5 * float((1 - share).clamp_min(0.05))

    sure, above = (sum(column) for column in zip(*(opened(seed) for seed in range(60)), strict=True))
    assert above > 15 and sure < 8, (above, sure)


def test_a_reward_is_rated_again_until_its_noise_is_known() -> None:
    exact = Trust(2)
    asked = []
    for step in range(12):
        asked.append(exact.rates_again)
        rewards = torch.stack([drawn("a", step), drawn("b", step)])
        exact.observe(rewards, rewards, IDS, rewards if asked[-1] else None)
    assert asked == [True] + [False] * 11
    asked, one = [], Trust(2)
    for step in range(12):
        asked.append(one.rates_again)
        again = rewards + torch.stack([torch.zeros(len(IDS)), drawn("noise", step)])
        one.observe(rewards, rewards, IDS, again if asked[-1] else None)
    assert asked == [True] * 10 + [False] * 2


def test_scores_that_are_not_there_have_no_say() -> None:
    """A chain whose reward is NaN in one part leaves that part's measure as without the chain; the other has it."""
    whole, gaps = Trust(2), Trust(2)
    short = Trust(1)
    for step in range(7):
        rewards = torch.stack([drawn("a", step, 20), drawn("b", step, 20)])
        scores = 0.9 * rewards
        whole.observe(scores, rewards, IDS[:20])
        missing = rewards.clone()
        missing[0, ::3] = math.nan
        gaps.observe(scores, missing, IDS[:20])
        left = [i for i in range(20) if i % 3]
        short.observe(scores[:1, left], rewards[:1, left], [IDS[i] for i in left])
    assert torch.equal(gaps.measured()[0][1], whole.measured()[0][1])
    torch.testing.assert_close(gaps.measured()[0][:1], short.measured()[0])
    nothing = Trust(1)
    for _ in range(9):
        nothing.observe(torch.zeros(1, 2), torch.full((1, 2), math.nan), [0, 1])
    assert nothing.trusted == [False] and bool(nothing.measured()[0].isnan())


def test_it_goes_on_from_its_state() -> None:
    rate, restored = noisy(1.0, 0.4), Trust(1)
    whole = trust_of(rate, 9)
    restored.load_state_dict(trust_of(rate, 6).state_dict())
    for step in range(6, 9):
        restored.observe(*(value[None] for value in rate(step)[:2]), IDS, rate(step)[2][None])
    assert all(torch.equal(one, other) for one, other in zip(whole.measured(), restored.measured(), strict=True))
    assert whole.trusted == restored.trusted == [True] and torch.equal(whole.noise_share, restored.noise_share)


def test_a_new_prompt_has_the_mean_of_all() -> None:
    means = RunningMeans()
    assert bool(means.before(["a"], 1).isnan().all())
    means.add(["a", "a", "b"], torch.tensor([[1.0, 3.0, 8.0]]))
    means.add(["a"], torch.tensor([[12.0]]))
    found = means.before(["a", "b", "c"], 1)
    expected = [[[0.7 * 2 + 0.3 * 12, 8.0, 0.7 * 4 + 0.3 * 12]], [[0.49 / 2 + 0.09, 1.0, 0.49 / 3 + 0.09]]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_a_baselines_own_error_is_as_it_says() -> None:
    """Over 400 prompts of equal chains, the mean's variance is the stated part of a chain's."""
    means, prompts = RunningMeans(), list(range(400))
    for step in range(12):
        means.add(prompts, drawn("chains", step, 400)[None])
    mean, added = means.before(prompts, 1)
    assert float(added[0, 0]) == pytest.approx(0.3 / 1.7, rel=0.01)
    assert float(mean.var()) == pytest.approx(float(added[0, 0]), rel=3.5 * (2 / 400) ** 0.5)


def test_of_many_prompts_the_means_of_those_that_came_last_are_kept() -> None:
    """Or they, and every checkpoint, would grow with every new prompt."""
    means = RunningMeans(most=3)
    for step in range(50):
        means.add(["often", step], torch.full((1, 2), float(step)))
    assert set(means.means) == {"often", 48, 49, None}
    assert means.before([49, 0], 1)[0].tolist() == [[49.0, means.before([None], 1)[0].item()]]  # an early one is new
    means.add(list(range(7)), torch.zeros(1, 7))  # an update's own all stay
    assert set(means.means) == {*range(7), None}
