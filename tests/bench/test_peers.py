"""Peers: their gradients against closed forms, runs in lockstep against single ones, what is swept, TRL's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from bench.peers import best
from bench.peers.folder import older_folder
from bench.peers.lockstep import Lockstep, engine_of, judge
from bench.peers.methods import LIMIT, LatentScore, group_advantage, nft_gradient, ratio_gradient
from rlr_ray.assets import DIGITS
from rlr_ray.core.half_order import half_order
from rlr_ray.core.sampler import Sampler, Trajectory

PROMPTS = ["a handwritten zero", "a handwritten nine", "", "what is this?"]
# Of an update of 10 chains: 100 forwards to sample, then rows with a gradient thrice.
COSTS = {
    "AWM": 100 + 3 * 40,
    "AWM, weights of its code": 100 + 5 * 40,
    "Flow-GRPO": 100 + 3 * 90,
    "DiffusionNFT": 100 + 4 * 90,
    "DiffusionNFT, 3 steps": 100 + 4 * 30,
}


def test_advantages_are_centred_by_group_over_their_run_s_spread() -> None:
    reward = torch.tensor([1.0, 3.0, 5.0, 5.0, 0.0, 20.0, 7.0, 7.0])
    spread = torch.tensor([1.0, 3.0, 5.0, 5.0]).std(), torch.tensor([0.0, 20.0, 7.0, 7.0]).std()
    expected = torch.tensor([-1.0, 1.0, 0.0, 0.0]) / spread[0], torch.tensor([-10.0, 10.0, 0.0, 0.0]) / spread[1]
    torch.testing.assert_close(group_advantage(reward, 2, 2), torch.cat(expected), rtol=1e-3, atol=1e-6)


def test_ratios_of_fresh_chains_give_reinforce_and_each_run_its_own() -> None:
    task = Lockstep([3, 4], 4)
    drawn = task.sample(task.theta, task.prompts(0, 2))
    advantage = torch.arange(8.0) - 3.5
    gradient = ratio_gradient(task, task.theta.clone().requires_grad_(), drawn, advantage, [2, 6], 0.1)
    sampler, drawn_for = Sampler(task.model, task.schedule), drawn.prompts
    for run, rows in enumerate((slice(0, 4), slice(4, 8))):
        conditioning = {name: value[drawn_for[rows]] for name, value in task.conditioning.items()}
        path = Trajectory(drawn.latents[:, rows], drawn.noise[:, rows], conditioning)
        single = [half_order(sampler, task.theta[run], path, range(k, k + 1), advantage[rows]) for k in (2, 6)]
        numbers = drawn.last[0].numel()
        torch.testing.assert_close(-gradient[run] * numbers, (single[0] + single[1]) / 2, rtol=1e-3, atol=1e-4)


def test_a_clipped_ratio_pushes_no_further() -> None:
    task = Lockstep([3], 4)
    drawn = task.sample(task.theta, task.prompts(0, 2))
    moved = (task.theta + 0.3 * torch.randn(task.theta.shape, generator=torch.Generator().manual_seed(0)))[0]
    with torch.no_grad():
        now = (drawn.latents[4] - task.mean(moved[None], 3, drawn.latents[3], drawn.prompts)) / task.schedule.sigma[3]
    better = (drawn.noise[3].square() - now.square()).flatten(1).mean(1) > 0  # likelier than it was
    advantage = torch.where(better, 1.0, -1.0)  # what the clip stops
    theta = moved[None].clone().requires_grad_()
    assert ratio_gradient(task, theta, drawn, advantage, [3], 1e-6).abs().max() == 0
    assert ratio_gradient(task, theta, drawn, -advantage, [3], 1e-6).abs().max() > 0


@pytest.mark.parametrize("mix", [1.0, 0.1])
def test_nft_begins_as_advantage_weighted_matching(mix: float) -> None:
    """At theta = old the two branches' slopes are opposite, so what is left is twice the share less 1."""
    task, advantage = Lockstep([5], 4), torch.tensor([1.0, -2.0, 0.5, 9.0])
    drawn = task.sample(task.theta, task.prompts(0, 2))
    state = task.sources[0].get_state()
    theta = task.theta.clone().requires_grad_()
    gradient = nft_gradient(task, theta, task.theta, 4, drawn, advantage, mix)
    task.sources[0].set_state(state)
    latent = task.noised(4, drawn.last, task.normal(4))
    error = task.clean(4, latent, task.predict(theta, 4, latent, drawn.prompts)) - drawn.last
    weighted = error.square().flatten(1).mean(1) / error.detach().abs().flatten(1).mean(1)
    (expected,) = torch.autograd.grad((advantage.clamp(-LIMIT, LIMIT) * weighted).mean(), theta)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "AWM")) for name in COSTS])
def test_a_run_in_lockstep_is_the_run_alone_and_costs_what_it_says(name: str) -> None:
    thetas = []
    for seeds, rates in (([7], [0.02]), ([7, 8], [0.02, 0.05])):
        task = Lockstep(seeds, 10)
        updates = best.METHODS[name](task, rates)
        thetas.append([next(updates) for _ in range(2)][1])
        assert (task.cost, task.calls) == (2 * COSTS[name], 20)
    moved = (thetas[0] - engine_of().model.initial_theta).abs().max()
    assert moved > 1e-3
    assert (thetas[1][:1] - thetas[0]).abs().max() < 0.05 * moved


def test_a_window_s_chains_share_what_comes_before_it_and_have_noise_in_it_alone() -> None:
    task = Lockstep([7], 10)
    drawn = task.sample_window(task.theta, task.prompts(0, 5), 5, range(2, 4))
    assert task.cost == 2 * 2 + 8 * 10
    groups = drawn.latents.view(11, 2, 5, -1)
    assert torch.equal(groups[:3, :, :1].expand(-1, -1, 5, -1), groups[:3])
    assert (groups[3, :, 0] - groups[3, :, 1]).abs().min() > 0
    assert drawn.noise.abs().flatten(1).sum(1).nonzero().flatten().tolist() == [2, 3]


def test_a_score_learns_to_rank_and_prompts_are_not_compared() -> None:
    source = torch.Generator().manual_seed(0)
    latents, prompts = torch.randn(500, 4, 4, 4, generator=source), torch.arange(500) % 2
    reward = latents[:, 0].flatten(1).mean(1) * (1 - 2.0 * prompts) + 100 * prompts  # the second prompt's the other way
    score = LatentScore((4, 4, 4), 2, source)
    score.keep(latents[:400], prompts[:400], reward[:400])
    score.learn(150)
    for prompt in (0, 1):
        rows = 400 + torch.arange(100)[prompts[400:] == prompt]
        said, true = score(latents[rows], prompts[rows]), reward[rows]
        agree = ((said[:, None] - said) * (true[:, None] - true) > 0).float().mean() * 50 / 49
        assert agree > 0.8


def row(variant: str, rate: float, gain: float, **more: Any) -> dict[str, Any]:
    keys = {
        "problem": "digits",
        "variant": variant,
        "chains": 20,
        "learning_rate": rate,
        "seed": best.CHOICE_SEED,
        "forwards": best.SWEPT,
    }
    return keys | {"points": [[best.SWEPT, gain]]} | more


def test_a_best_rate_at_the_edge_asks_for_the_next() -> None:
    rows = [row("AWM", rate, gain) for rate, gain in ((0.01, 0.3), (0.03, 0.2), (0.1, 0.1))]
    assert best.rates("AWM", 20, []) == [0.01, 0.03, 0.1]
    assert best.rates("AWM", 20, rows) == [0.01, 0.03, 0.1, 0.003]
    assert best.rates("AWM", 20, [*rows, row("AWM", 0.003, 0.0)]) == [0.003, 0.01, 0.03, 0.1]
    assert best.best("AWM", [*rows, row("AWM", 0.003, 9.0, chains=80)])["chains"] == 80


def test_jobs_that_differ_in_rate_or_seed_run_in_lockstep_but_for_trl_s() -> None:
    jobs = [*best.sweep_jobs(["AWM"], []), *best.sweep_jobs(["TRL DDPO"], [])]
    sizes = [len(batch) for batch in best.batches(jobs)]
    assert sizes == [3] * 3 + [1] * 12


def test_theta_is_kept_to_the_last_bit() -> None:
    theta = engine_of().model.initial_theta
    assert torch.equal(best.unpacked(best.packed(theta)), theta)


@pytest.mark.slow
def test_every_step_of_what_is_judged_is_the_adapter_s() -> None:
    base = best.base_of(0, "digits")
    assert base.against(base)["kl"] == 0
    assert -3 < base.score < -1 and 0.5 < base.judge < 0.8
    moved = judge(engine_of().model.initial_theta + 0.05, 0)
    nats = moved.evaluation.kl_by_step
    assert nats[-1] and nats[-1] > 0 and moved.against(base)["kl_without_last"] == pytest.approx(sum(nats[:-1]))
    assert {"precision", "recall", "nn", "pairwise"} <= set(moved.against(base))


def test_an_older_folder_holds_the_same_weights_and_words(tmp_path: Path) -> None:
    source = DIGITS / "pipeline"
    folder = older_folder(source, tmp_path / "pipeline")
    new, old = (load_file(place / "text_encoder" / "model.safetensors") for place in (source, folder))
    assert sorted(old) == sorted(f"text_model.{name}" for name in new)
    assert all(torch.equal(old[f"text_model.{name}"], value) for name, value in new.items())
    assert not (folder / "tokenizer" / "tokenizer.json").exists()  # so that words and merges are read
    tokens = [CLIPTokenizer.from_pretrained(place / "tokenizer")(PROMPTS).input_ids for place in (source, folder)]
    assert tokens[0] == tokens[1]
