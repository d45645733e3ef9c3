"""Which keys may change when a run is resumed: every key of the schema is here one of these, or refused."""

from __future__ import annotations

from rlr_ray.config.base import free_keys, is_free, keys_of
from rlr_ray.config.run import RunConfig

FREE = [
    "cluster",
    "device",
    "evaluation.chunk_size",
    "evaluation.clip",
    "evaluation.every",
    "evaluation.judges",
    "evaluation.pictures",
    "estimator.checkpoint_steps",
    "guards.keep",
    "guards.kl_stop",
    "guards.patience",
    "loggers",
    "memory_budget_gib",
    "model.compile",
    "model.decode_slice",
    "model.gradient_checkpointing",
    "name",
    "output_dir",
    "rewards.*.actors",
    "rewards.*.invalid",
    "rewards.*.options.batch_size",
    "rewards.*.options.concurrency",
    "rewards.*.options.headers",
    "rewards.*.options.patience_s",
    "rewards.*.options.timeout_s",
    "train.checkpoint_every",
    "train.iterations",
    "train.keep_checkpoints",
    "train.sampling_size",
]


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
