"""Which keys may change when a run is resumed: every key of the schema is here one of these, or refused."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from rlr_ray.config.base import free_keys, is_free, keys_of
from rlr_ray.config.run import RunConfig
from rlr_ray.train.engine import Engine
from rlr_ray.train.process import ALONE
from rlr_ray.train.state import TrainState
from rlr_ray.train.update import update
from tests.runs import small_run

TESTS = Path(__file__).parents[1]
# With a test that sees whether the key does what it says. tests/train/test_keys.py has the keys that are refused.
FREE = {
    "cluster": "cluster/test_runs.py::test_workers_that_come_and_actors_that_die_end_with_the_local_weights",
    "device": "cli/test_cli.py::test_a_gpu_where_there_is_none",
    "estimator.checkpoint_steps": "config/test_free_keys.py::test_what_only_saves_memory_reaches_the_update",
    "evaluation.chunk_size": (
        "evaluation/test_chunks.py::test_the_chunk_of_an_evaluation_does_not_change_it_beyond_rounding"
    ),
    "evaluation.clip": "config/test_free_keys.py::test_diversity_is_measured_by_the_clip_that_is_named",
    "evaluation.every": "train/test_loop.py::test_a_run_that_goes_on_has_a_report_of_its_last_evaluation",
    "evaluation.judges": (
        "train/test_reward_failures.py::test_a_trained_run_whose_judge_fails_at_its_end_is_finished_with_another"
    ),
    "evaluation.pictures": "train/test_checkpoints.py::test_files_that_are_no_states_are_no_ones_checkpoints",
    "evaluation.reference": "train/test_reference.py::test_a_resumed_run_may_be_compared_with_other_pictures",
    "guards.keep": "train/test_guards.py::test_the_best_is_what_a_run_leaves",
    "guards.kl_stop": "train/test_guards.py::test_the_divergence_stops_a_run",
    "guards.step_back": "train/test_steady.py::test_a_run_that_fell_five_times_ends_and_goes_on_if_it_may",
    "guards.patience": "train/test_guards.py::test_a_judge_is_compared_with_its_highest_and_the_best_reward_is_kept",
    "loggers": "loggers/test_registry.py::test_loggers_are_named_or_have_options",
    "memory_budget_gib": "utils/test_memory.py::test_a_run_ends_if_and_only_if_it_needs_more_than_its_budget",
    "model.compile": "models/test_compile.py::test_a_compiled_denoiser_is_the_same_function",
    "model.decode_slice": "models/test_video.py::test_chosen_frames_and_slices_are_those_of_the_whole_video",
    "model.gradient_checkpointing": (
        "models/test_recompute.py::test_gradients_are_the_same_at_a_theta_that_is_not_the_modules_own"
    ),
    "model.offload": "models/test_offload.py::test_an_encoder_comes_for_a_new_prompt_and_goes_and_says_the_same",
    "name": "config/test_resuming.py::test_a_run_is_found_by_its_name_and_by_its_path",
    "output_dir": "config/test_resuming.py::test_a_name_is_looked_up_where_output_dir_says",
    "rewards.*.actors": "cluster/test_reward_actors.py::test_they_count_in_what_a_run_takes",
    "rewards.*.invalid": "train/test_reward_failures.py::test_or_is_replaced_and_told",
    "rewards.*.options.batch_size": "rewards/test_http.py::test_scores_come_in_order_whatever_the_batches",
    "rewards.*.options.concurrency": "rewards/test_http.py::test_scores_come_in_order_whatever_the_batches",
    "rewards.*.options.headers": "config/test_secrets.py::test_a_run_uses_a_secret_and_leaves_it_nowhere",
    "rewards.*.options.patience_s": "rewards/test_http.py::test_a_server_that_stays_away_is_named",
    "rewards.*.options.timeout_s": "rewards/test_http.py::test_a_request_that_takes_too_long_is_made_again",
    "save_also": "models/test_comfyui.py::test_a_run_leaves_the_file_that_its_recipe_asks_for",
    "save_chains": "train/test_chain_log.py::test_a_run_keeps_its_chains",
    "train.checkpoint_every": "train/test_cut.py::test_checkpoints_are_saved_when_they_are_due_and_at_the_end",
    "train.iterations": "train/test_loop.py::test_a_finished_run_resumes_to_more_updates",
    "train.keep_checkpoints": "train/test_cut.py::test_checkpoints_are_saved_when_they_are_due_and_at_the_end",
    "train.sampling_size": "config/test_free_keys.py::test_what_only_saves_memory_reaches_the_update",
}


def test_every_key_is_free_or_refused() -> None:
    assert sorted(FREE) == free_keys(RunConfig)
    for path, _ in keys_of(RunConfig):
        key = ".".join(path)
        free = any(key == name or key.startswith(f"{name}.") for name in FREE)
        assert is_free(RunConfig, path) == free, key
        assert is_free(RunConfig, [part.replace("*", "a.b") for part in path]) == free
    assert is_free(RunConfig, ["rewards", "a", "options", "headers", "Authorization"])
    assert not is_free(RunConfig, ["rewards", "a", "options", "url"])
    assert not is_free(RunConfig, ["adapter", "r"]) and not is_free(RunConfig, ["nothing"])


@pytest.mark.parametrize("key", FREE)
def test_a_test_sees_what_a_free_key_does(key: str) -> None:
    """It is there, and names the key, or uses a function or constant of its file that does."""
    file, _, test = FREE[key].partition("::")
    parts = {}
    for node in ast.parse((TESTS / file).read_text("utf-8")).body:
        for name in [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets(node))]:
            parts[name] = node
    left, words = [parts[test]], ""
    while left:
        node = left.pop()
        words += ast.unparse(node)
        uses = {getattr(one, "id", None) or getattr(one, "arg", None) for one in ast.walk(node)}
        left += [parts.pop(name) for name in uses & parts.keys() - {None}]
    assert key.split(".")[-1] in words


def targets(node: ast.stmt) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []


class Seen(Exception):
    """Raised by what stands for the real thing, with what it was given."""


def test_what_only_saves_memory_reaches_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []

    def seen(*_: Any, checkpoint_steps: bool, **others: Any) -> None:
        raise Seen(together[-1], checkpoint_steps)

    monkeypatch.setattr("rlr_ray.train.sampling.begin", lambda *arguments: together.append(arguments[3]))
    monkeypatch.setattr("rlr_ray.train.update.estimate_gradient", seen)
    for size, saves, chunks in ((None, True, 1), (2, False, 1), (5, False, 2)):
        config = small_run(
            Path("nowhere"), train={"sampling_size": size}, estimator={"checkpoint_steps": saves, "rest": "none"}
        )
        engine = Engine(config)
        state = TrainState(engine.model.initial_theta, config.train, config.estimator)
        with pytest.raises(Seen, match=rf"^\({chunks}, {saves}\)$"):
            update(engine, state, None, ALONE)


def test_diversity_is_measured_by_the_clip_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(key: str, path: str, repository: str) -> None:
        raise Seen(path)

    monkeypatch.setattr("rlr_ray.train.engine.load_clip", seen)
    assert Engine(small_run(Path("nowhere"))).clip is None
    with pytest.raises(Seen, match="my/clip"):
        Engine(small_run(Path("nowhere"), evaluation={"clip": "my/clip"})).clip  # noqa: B018
