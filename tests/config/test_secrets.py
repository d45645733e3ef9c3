"""Secrets come from the environment, and no file, checkpoint or message holds one."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

from rlr_ray.cli import main
from rlr_ray.cluster.reward_actors import _without_secrets
from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward, score
from rlr_ray.utils.environment import expanded
from tests.rewards.servers import server
from tests.runs import short_run, small_recipe

CPU = torch.device("cpu")
SECRET = "s3cret-of-this-test"
OWN = """
import torch
class Asked:
    differentiable = True
    def __init__(self, headers, url):
        assert (headers, url) == ({"X-Who": "Bearer s3cret-of-this-test"}, "https://me:s3cret-of-this-test@judge")
    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3))
"""


def test_a_run_uses_a_secret_and_leaves_it_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JUDGE_TOKEN", SECRET)
    code = tmp_path / "own_reward_with_a_secret.py"
    code.write_text(OWN)
    options = {"headers": {"X-Who": "Bearer ${JUDGE_TOKEN}"}, "url": "https://me:${JUDGE_TOKEN}@judge"}
    reward = {"name": "own_reward_with_a_secret:Asked", "options": options}
    command = ["train", "--config", str(small_recipe(tmp_path)), "--set", f"reward={json.dumps(reward)}"]
    for more in (["--dry-run"], ["--set", "train.iterations=1"], ["--set", "train.iterations=2", "--resume"]):
        assert main([*command, *more]) == 0
    code.unlink()
    told = capfd.readouterr()
    assert "${JUDGE_TOKEN}" in told.out and SECRET not in told.out + told.err
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert len(files) > 10 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    monkeypatch.delenv("JUDGE_TOKEN")
    with pytest.raises(UserError, match=r"names \$\{JUDGE_TOKEN\}, which the environment on .* lacks; export JUDGE"):
        expanded(options, "it")


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"headers": {"Accept": SECRET}}, "options.headers.Accept"),
        ({"headers": [{"a": SECRET}]}, "options.headers.a"),
        ({"api_key": SECRET}, "options.api_key"),
        ({"deep": {"HF_TOKEN": SECRET}}, "options.deep.HF_TOKEN"),
        ({"url": f"https://me:{SECRET}@judge/"}, "options.url"),
        ({"url": f"https://{SECRET}@judge/"}, "options.url"),
        ({"url": f"https://judge/?a=1&key={SECRET}"}, "options.url"),
    ],
)
def test_a_secret_in_the_clear_is_refused_and_not_repeated(tmp_path: Path, options: dict[str, Any], where: str) -> None:
    reward = {"name": "http", "options": options, "differentiable": False}
    for changes, key in (
        ({"reward": reward}, "rewards.http"),
        ({"evaluation": {"judge": reward}}, "evaluation.judges.http"),
        ({"estimator": {"surrogate": {"name": "a:b", "options": options}}}, "estimator.surrogate"),
    ):
        with pytest.raises(UserError) as refused:
            short_run(tmp_path, **changes)
        assert f"{key}.{where} holds a secret in the clear" in str(refused.value)
        assert SECRET not in str(refused.value)


def test_secrets_of_actors_and_loggers_are_refused_too_and_plain_words_are_not(tmp_path: Path) -> None:
    environment = {"runtime_env": {"env_vars": {"HF_HOME": "/cache", "HF_TOKEN": SECRET}}}
    with pytest.raises(UserError, match=r"rewards\.digits\.actors\.runtime_env\.env_vars\.HF_TOKEN holds a secret"):
        short_run(tmp_path, reward={"name": "digits", "actors": environment}, cluster={})
    with pytest.raises(UserError, match=r"loggers\.wandb\.api_key holds a secret"):
        short_run(tmp_path, loggers=[{"wandb": {"api_key": SECRET}}])
    plain = {"max_tokens": 7, "tokenizer": "gpt2", "key": "score", "url": "http://judge:80/?model=a", "headers": None}
    plain |= {"pip": "git+ssh://git@judge/a.git"}
    short_run(tmp_path, evaluation={"judge": {"name": "http", "options": plain}})


@pytest.mark.parametrize(("answer", "fails"), [({}, 9), ({"who": "a b/c+d="}, 0), ({"scores": [1, 2]}, 0)])
@pytest.mark.parametrize("options", [{"url": "?key=${JUDGE_TOKEN}"}, {"headers": {"X-Who": "${JUDGE_TOKEN}\n"}}])
def test_what_a_server_answers_tells_no_secret(
    answer: Any, fails: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_TOKEN", "a b/c+d=")  # which is quoted in a URL
    with server(lambda asked: answer, fail_first=fails) as (url, _):
        reward = load_reward("http", options | {"url": url + options.get("url", ""), "patience_s": 0.1}, CPU)
        with pytest.raises(UserError) as error:
            score(reward, torch.zeros(1, 3, 4, 4), ["1"], [{}], "http")
    told = "".join(traceback.format_exception(error.value)) + caplog.text
    assert "a b/c" not in told and "a%20b" not in told and "${JUDGE_TOKEN}" in told


def test_an_error_of_ones_own_reward_tells_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_reward_that_tells.py").write_text("def told(*_, key): raise ValueError(key)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("JUDGE_TOKEN", SECRET)
    reward = load_reward("own_reward_that_tells:told", {"key": "${JUDGE_TOKEN}"}, CPU)
    with pytest.raises(UserError, match=r"raised ValueError: \$\{JUDGE_TOKEN\} \(.*own_reward_that_tells"):
        score(reward, torch.zeros(1, 3, 4, 4), ["1"], [{}], "own")


def test_variables_of_secret_names_are_not_in_the_runtime_env_that_ray_logs() -> None:
    plain, secrets = _without_secrets({"pip": ["a"], "env_vars": {"HF_HOME": "/cache", "HF_TOKEN": SECRET}})
    assert plain == {"pip": ["a"], "env_vars": {"HF_HOME": "/cache"}} and secrets == {"HF_TOKEN": SECRET}
    assert _without_secrets({"env_vars": 3}) == ({"env_vars": 3}, {}) and _without_secrets({}) == ({}, {})
