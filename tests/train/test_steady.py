"""What steadies a run, against its formulas written out once more; steps back, cut at any moment, in two processes."""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from rlr_ray.cli.train import describe_results
from rlr_ray.config.estimator import EstimatorConfig
from rlr_ray.config.guards import GuardsConfig, StepBackConfig
from rlr_ray.config.train import TrainConfig
from rlr_ray.core.gradient import GradientEstimate
from rlr_ray.core.sampler import Sampler, Trajectory
from rlr_ray.core.schedule import Schedule
from rlr_ray.core.seeds import normal, permutation
from rlr_ray.core.weighting import TermEstimate
from rlr_ray.errors import UserError
from rlr_ray.loggers.figures import reward_figures
from rlr_ray.loggers.pictures import save_reward_curve
from rlr_ray.rewards.scores import Scores
from rlr_ray.train import steady
from rlr_ray.train import update as one_update
from rlr_ray.train.engine import Engine
from rlr_ray.train.learning_rate import gradient_signs, random_signs, rate_of_change
from rlr_ray.train.loop import _judged, train
from rlr_ray.train.process import ALONE, Process
from rlr_ray.train.run_folder import RunFolder
from rlr_ray.train.state import TrainState
from rlr_ray.train.steady import Sizes, StepBack
from tests.runs import FALLING, logged, outcome, shared, short_run, small_run, train_here

P, B, UPDATES, RATE = 6, 10, 60, 0.03


def gradients() -> list[tuple[str, Tensor]]:
    """Two kinds that take turns, one a thousand times the other, with a spike of each."""
    source = torch.Generator().manual_seed(0)
    kinds = ["half_order" if update % 7 < 3 else "first_order" for update in range(UPDATES)]
    scales = [(1000.0 if kind == "half_order" else 1.0) * (50 if i in (15, 33) else 1) for i, kind in enumerate(kinds)]
    return [(kind, scale * torch.randn(P, generator=source)) for kind, scale in zip(kinds, scales, strict=True)]


def rewards() -> list[Tensor]:  # each [B], of variance 1
    """They rise, fall at update 25 and once more at 40."""
    means = [0.1 * i - (6 if i >= 25 else 0) - (8 if i >= 40 else 0) for i in range(UPDATES)]
    noise = torch.linspace(-1, 1, B)
    return [mean + noise / noise.std() for mean in means]


def test_updates_are_the_prototypes() -> None:
    """All defaults, written out: own norms, clipped updates, warm-up, the linear schedule, EMA and steps back.

    But for what a best of many means owes to luck, which the prototype leaves out.
    """
    keys = TrainConfig(iterations=UPDATES, learning_rate=RATE, chains=B, chains_per_prompt=1, chunk_size=B)
    state = TrainState(torch.zeros(P), keys, EstimatorConfig(), GuardsConfig())
    theta = torch.nn.Parameter(torch.zeros(P))
    adam = torch.optim.AdamW([theta], RATE, betas=(0.9, 0.99), weight_decay=0)
    norms: dict[str, float] = {}
    median, best, cut, seen, ema, back, windows = None, (-1e9, torch.zeros(P)), 1.0, [], torch.zeros(P), [], 0
    for update, ((kind, g), r) in enumerate(zip(gradients(), rewards(), strict=True)):
        size = float(g.norm())
        norms[kind] = 0.9 * norms.get(kind, size) + 0.1 * min(size, 3 * norms.get(kind, size))
        g, size = g / norms[kind], size / norms[kind]
        median = size if median is None else median + 0.1 * (size - median) if size < 3 * median else median * 1.1
        g = g * min(1.0, 1.5 * median / size)
        adam.param_groups[0]["lr"] = RATE * (1 - 0.9 * update / UPDATES) * min(1.0, (update + 1) / 10) * cut
        theta.grad = -g
        adam.step()
        decay = min(0.95, (1 + update) / (10 + update)) if update else 0.0
        ema = decay * ema + (1 - decay) * theta.detach()
        seen = [*seen, (float(r.mean()), float(r.var() / B))][-4:]
        if len(seen) == 4:
            mean, error, windows = sum(m for m, _ in seen) / 4, sum(v for _, v in seen) ** 0.5 / 4, windows + 1
            luck = (2 * math.log(max(windows / 4, 1))) ** 0.5
            if mean > best[0]:
                best = (mean, ema.clone())
            elif mean < best[0] - (3 * 2**0.5 + luck) * error:
                theta.data.copy_(best[1])
                ema, seen, cut = best[1].clone(), [], cut / 2
                adam.state.clear()
                back.append(update)
        rate = state.learning_rate
        assert rate == pytest.approx(adam.param_groups[0]["lr"])
        state.update(GradientEstimate({kind: TermEstimate(gradients()[update][1], 1.0)}, r[None]), {})
        assert state.watch(r) == (update in back)
        torch.testing.assert_close(state.theta.detach(), theta.detach(), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(state.theta_to_save, ema, atol=1e-6, rtol=1e-4)
    assert len(back) >= 3 and state.step_back is not None and state.step_back.steps_back == len(back)


def test_a_step_that_changes_predictions_by_too_much_is_shortened() -> None:
    """To max_change times what the schedule says, where predictions change by theta's way; a shorter one is left.

    A third of it where first order has no part in the update.
    """
    keys = TrainConfig(iterations=10, learning_rate=0.5, warmup=0, max_change=0.2, schedule_final=0.0)
    term = TermEstimate(torch.tensor([3.0, 4.0]), 1.0)
    gradient = GradientEstimate({"first_order": term}, torch.zeros(1, 2))
    both = GradientEstimate({"first_order": term, "half_order": term}, torch.zeros(1, 2))
    alone = GradientEstimate({"half_order": term}, torch.zeros(1, 2))
    for estimate, most in ((gradient, 0.2), (both, 0.2), (alone, 0.2 / 3)):
        state = TrainState(torch.zeros(2), keys, EstimatorConfig())
        for update in range(10):
            before = state.theta.detach().clone()
            state.update(estimate, {}, lambda was, now: float((now - was).norm()))
            moved = float((state.theta.detach() - before).norm())
            assert moved == pytest.approx(most * (1 - update / 10), rel=1e-5)  # unhindered: .7 (1 - update / 10)
    with pytest.raises(UserError, match=r"update 10: .* predictions are not finite, .* lower train.learning_rate"):
        state.update(gradient, {}, lambda was, now: math.nan)  # or the rate that auto fits would become nan
    free = TrainState(torch.zeros(2), keys, EstimatorConfig())
    free.update(gradient, {}, lambda was, now: 0.2)
    torch.testing.assert_close(free.theta.detach(), torch.tensor([0.5, 0.5]))


def test_an_update_measures_the_change_at_noisy_copies_of_its_chains(tmp_path: Path) -> None:
    """The column is what the pipeline's predictions change by; no chunk size, share of work or limit moves it."""
    rows = {}
    for most in (1e-6, 10.0):
        engine = Engine(short_run(tmp_path, name=f"at-most-{most:g}", train={"max_change": most, "warmup": 0}))
        state = TrainState(engine.model.initial_theta, engine.config.train, engine.config.estimator)
        rows[most] = (
            one_update.update(engine, state, None, ALONE),
            state.theta.detach() - state.initial_theta,
        )
    (short, moved), (free, whole) = rows[1e-6], rows[10.0]
    assert short["prediction_change"] == free["prediction_change"] > 1e-6
    torch.testing.assert_close(
        moved * short["prediction_change"] / 1e-6, whole, rtol=1e-2, atol=1e-3 * float(whole.abs().max())
    )
    latents = engine.sampler.sample(state.initial_theta, *engine.train_chains(0, range(4)).start).latents[-1]
    k = permutation(engine.sampler.trained, engine.config.seed, "change", 0)[0]
    noise = normal(tuple(latents.shape), latents.dtype, engine.config.seed, "change", "noise", 0)
    noisy = engine.model.schedule.signal[k] * latents + engine.model.schedule.noise[k] * noise
    conditioning = engine.train_chains(0, range(4)).conditioning
    was, now = (
        engine.model(at, noisy, engine.model.schedule.timesteps[k], conditioning).detach()
        for at in (state.initial_theta, state.theta.detach())
    )
    assert float((now - was).norm() / was.norm()) == pytest.approx(free["prediction_change"], rel=1e-3)


def test_an_own_norm_gives_sgd_steps_of_the_learning_rate() -> None:
    """Numbers of any scale move by about the rate in the root mean square; nothing else than zeros stay zeros."""
    sizes = Sizes(own_norms=True, clip=None)
    for scale in (1e-6, 1e-6):
        gradient = scale * torch.tensor([3.0, -4.0, 0.0, 0.0])
        moved = gradient * sizes.factor("first_order", float(gradient.norm()), 4)
        assert float(moved.square().mean()) == pytest.approx(1.0)
    assert sizes.factor("half_order", 0.0, 4) == 1.0 and "half_order" not in sizes.norms
    assert Sizes(own_norms=False, clip=None).factor("half_order", 3.0, 4) == 1.0


def test_a_reward_that_stands_still_does_not_fall() -> None:
    """At most one in twenty runs of 240 updates steps back; a fall of 1.5 deviations is seen within ten updates."""
    source, ends = torch.Generator().manual_seed(0), list[int]()
    for _ in range(20):
        watch = StepBack(StepBackConfig(), torch.zeros(1))
        noise = torch.randn(250, 10, 1, generator=source, dtype=torch.float64)
        ends += [sum(watch.note_rewards(i, noise[i], torch.zeros(1)) is not None for i in range(240))]
        assert any(watch.note_rewards(240 + i, noise[240 + i] - 1.5, torch.zeros(1)) is not None for i in range(10))
    assert sum(map(bool, ends)) <= 1


def test_the_noise_of_the_best_counts_too_and_so_do_prompts() -> None:
    """Rewards of 0 and 1: all wrong once is no fall from two right in ten; chains of a prompt are not independent."""
    watch = StepBack(StepBackConfig(window=1), torch.zeros(1))
    two_right = torch.tensor([[1.0], [1.0], *[[0.0]] * 8])
    assert watch.note_rewards(1, two_right, torch.ones(1)) is None
    assert watch.note_rewards(2, torch.zeros(10, 1), torch.ones(1)) is None
    prompts = torch.tensor([[5.0] * 5, [-5.0] * 5])  # of two, each with five chains
    assert StepBack(StepBackConfig(), torch.zeros(1))._variance(prompts) == 25.0  # not that of ten chains, 2.8


def test_updates_of_one_prompt_know_how_prompts_differ_by_what_came_before() -> None:
    """Means of -1 and 1 in turn are no falls, though chains of a prompt are alike; a fall to -9 is."""
    watch = StepBack(StepBackConfig(), torch.zeros(1))
    alike = torch.tensor([[0.01, -0.01]])
    assert [watch.note_rewards(i, alike + (-1) ** i, torch.zeros(1)) for i in range(40)] == [None] * 40
    falls = [watch.note_rewards(40 + i, alike - 9, torch.zeros(1)) is not None for i in range(8)]
    assert any(falls) and watch.steps_back >= 1


STEADY: dict[str, Any] = {
    "train": {"iterations": 6, "learning_rate": 0.3, "warmup": 3, "own_norms": True, "clip_update": 1.1},
    "guards": {"ema": 0.7, "keep": "best", "step_back": {"window": 2}},
    "evaluation": {"every": "auto"},
}


@pytest.fixture
def falling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mean that is not the best is taken for a fall."""
    monkeypatch.setattr(steady, "_SURE", -1e9)


def rows_back(folder: RunFolder) -> list[int]:
    return [row["step"] + 1 for row in outcome(folder.path)["rows"] if row["stepped_back"]]


def test_a_run_cut_around_a_step_back_ends_the_same(tmp_path: Path, falling: None) -> None:
    config = small_run(tmp_path / "whole", **STEADY)
    with logged() as texts:
        whole = train_here(config)
    back, summary = rows_back(whole), whole.load_summary()
    assert back and summary["steps_back"] == len(back) and any("stepped back after update" in text for text in texts)
    rates = [row["learning_rate"] for row in outcome(whole.path)["rows"]]
    assert rates == pytest.approx([0.3 * min(1, (i + 1) / 3) * 0.5 ** sum(at <= i for at in back) for i in range(6)])
    again = small_run(tmp_path / "cut", **STEADY)
    for cut in (back[0] - 1, back[0]):
        with pytest.raises(KeyboardInterrupt):
            train_here(again, stop_after=cut, resume=cut == back[0])
    assert outcome(train_here(again, resume=True).path) == outcome(whole.path)


def test_a_run_whose_reward_really_falls_steps_back_until_the_fifth_time(tmp_path: Path) -> None:
    """With its own three standard errors: from four updates after each return on; at half the rate each time."""
    folder = train_here(small_run(tmp_path, **FALLING))
    rows, summary = outcome(folder.path)["rows"], folder.load_summary()
    back = rows_back(folder)
    assert len(back) == 5 == summary["steps_back"] and back[-1] == summary["steps"] < 30
    assert all(later - earlier >= 4 for earlier, later in zip([0, *back], back, strict=False))
    assert rows[-1]["learning_rate"] == pytest.approx(0.3 * 0.5**4)
    assert "that was step back 5 of 5 (guards.step_back.limit)" in summary["stopped"]
    cut = [row["first_order_clipped"] for row in rows]
    assert summary["clipped"] == {"first_order": statistics.median(cut)} and 0 < min(cut) <= max(cut) < 1
    assert f"clipped: {statistics.median(cut):.0%} of first order's chains (median over" in describe_results(folder)
    assert max(row["reward_mean"] for row in rows[4:]) < rows[0]["reward_mean"] - 0.1


def test_a_run_that_fell_five_times_ends_and_goes_on_if_it_may(tmp_path: Path, falling: None) -> None:
    """It says what was seen and what to change; with another guards.step_back it goes on when it is resumed."""
    guards = {"step_back": {"window": 1, "limit": 1}, "keep": "best"}
    keys = STEADY | {"guards": guards, "evaluation": {"every": None}}
    stopped = train_here(small_run(tmp_path, **keys)).load_summary()
    better = stopped["reward_last"] > stopped["reward_before"]  # where it went back to counts, though it ended there
    assert stopped["kept_update"] == (stopped["steps"] if better else 0)
    assert stopped["steps"] < 6 and stopped["steps_back"] == 1
    words = r"fell from its best .* to .* \(standard error .*lower train.learning_rate or more train.chains"
    assert re.search(words, stopped["stopped"])
    again = train_here(small_run(tmp_path, **keys), resume=True).load_summary()
    assert again["steps"] == stopped["steps"] and again["theta_sha256"] == stopped["theta_sha256"]
    on = train_here(small_run(tmp_path, **keys | {"guards": {"step_back": False}}), resume=True).load_summary()
    assert on["steps"] == 6 and on["stopped"] is None


def test_beyond_kl_stop_a_run_goes_back_below_it_and_ends_after_the_limit(tmp_path: Path) -> None:
    keys = {"guards": {"kl_stop": 1e-9, "step_back": {"limit": 2}}, "evaluation": {"every": 2}}
    folder = train_here(small_run(tmp_path, train={"iterations": 6}, **keys))
    summary = folder.load_summary()
    assert rows_back(folder) == [2, 4] and summary["steps"] == 4 and summary["kl"] == 0.0
    assert "KL to the base model above guards.kl_stop" in summary["stopped"]


def test_a_fall_and_a_divergence_in_one_update_are_two_steps_back() -> None:
    """The rate is halved twice, and the summary counts what rows say."""
    guards = GuardsConfig(kl_stop=1.0)
    state = TrainState(torch.zeros(2), TrainConfig(learning_rate=0.1), EstimatorConfig(), guards)
    engine: Any = SimpleNamespace(config=SimpleNamespace(guards=guards), device=torch.device("cpu"))
    other = Process(rank=1, size=2, reduce=lambda _: torch.tensor([0.0, 1.0]))  # the leading one saw it beyond kl_stop
    row = {"stepped_back": 1}  # by its rewards
    assert not _judged(engine, state, None, None, other, row) and row["stepped_back"] == 2


def test_two_processes_decide_alike_and_as_one_does(tmp_path: Path, falling: None) -> None:
    """The measured learning rate, steps back from falls and those from beyond kl_stop: the same bits."""
    keys = STEADY | {"train": STEADY["train"] | {"learning_rate": "auto"}, "evaluation": {"every": 3}}
    keys["guards"] = STEADY["guards"] | {"kl_stop": 1e-9}
    alone = train_here(small_run(tmp_path / "alone", **keys))
    config = small_run(tmp_path / "two", **keys)
    RunFolder(config).begin(resume=False)

    engines = [Engine(config), Engine(config)]  # not in threads, since they load

    def work(rank: int, reduce: Any) -> list[Any]:
        engine, rows = engines[rank], list[dict[str, Any]]()
        train(engine, None, rows.append, Process(rank, 2, reduce))
        return [(row["learning_rate"], row["stepped_back"], row["gradient_norm"]) for row in rows]

    leading, other = shared(2, work)
    assert leading == other and any(back for _, back, _ in leading)
    summary = RunFolder(config).load_summary()
    assert summary["theta_sha256"] == alone.load_summary()["theta_sha256"]
    assert summary["learning_rate"] == alone.load_summary()["learning_rate"] > 0


def test_a_step_back_is_drawn_in_the_report_and_in_the_curve(tmp_path: Path) -> None:
    rows = [{"step": i, "reward_mean": float(i), "stepped_back": int(i == 2)} for i in range(4)]
    figure = reward_figures(rows, {"reward": Scores(torch.zeros(2), torch.ones(2), trained=True)}, 4)["Reward"]
    (mark,) = [trace for trace in figure.data if trace.name == "stepped back"]
    assert (list(mark.x), list(mark.y)) == ([3], [2.0])
    red = {}
    for name, told in (("marked", rows), ("not", [row | {"stepped_back": 0} for row in rows])):
        save_reward_curve(tmp_path / name, told, {0: (0.0, 0.1)})
        pixels = numpy.asarray(Image.open(tmp_path / name).convert("RGB"))
        red[name] = int((pixels == (255, 0, 0)).all(-1).sum())
    assert red["marked"] > 20 and not red["not"]


SCHEDULE = Schedule((2.0, 1.0), (1.0,) * 2, (0.1,) * 2, (0.5,) * 2)
LATENTS = torch.randn(3, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
TRAJECTORY = Trajectory(LATENTS, LATENTS[:2], {})


@pytest.mark.parametrize(
    ("at", "outputs", "expected"),
    [
        (torch.full((1,), 3.0), lambda theta, latent: latent * theta, 0.02 * 3),
        (torch.zeros(4), lambda theta, latent: latent * (1 + theta.square().sum()), (0.02 / 4) ** 0.5),
    ],
)
def test_the_measured_rate_changes_predictions_by_the_fraction(at: Tensor, outputs: Any, expected: float) -> None:
    """Against the closed form, where the change is linear in the rate and where it is quadratic."""
    sampler, trajectory = Sampler(lambda theta, latent, *_: outputs(theta, latent), SCHEDULE), TRAJECTORY
    assert rate_of_change(sampler, at, random_signs(at), trajectory, [0, 1], 0.02) == pytest.approx(expected, rel=0.03)
    dead = replace(sampler, denoiser=lambda theta, latent, timestep, conditioning: latent)
    with pytest.raises(UserError, match=r"learning_rate is 'auto', but no rate.*give the rate as a number"):
        rate_of_change(dead, at, random_signs(at), trajectory, [0, 1], 0.02)


def test_signs_of_a_gradient_act_together() -> None:
    """f = latent times the sum of P numbers: P r where signs agree, against about the root of P times r."""
    sampler = Sampler(lambda theta, latent, timestep, conditioning: latent * theta.sum(), SCHEDULE)
    signs = gradient_signs(sampler, torch.ones(100), TRAJECTORY, [0, 1])
    assert bool((signs == signs[0]).all()) and abs(float(signs[0])) == 1.0
    assert abs(float(random_signs(torch.ones(100)).sum())) < 40
