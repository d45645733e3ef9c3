"""Prompts by ranges of steps: what a recipe may say of them, a run with them, and how they are written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch

from rlr_ray.cli import main
from rlr_ray.config.estimator import DcotConfig
from rlr_ray.errors import UserError
from rlr_ray.prompts.expand import TEMPLATE
from rlr_ray.prompts.load import load_prompts
from rlr_ray.prompts.prompt import Prompt
from rlr_ray.train.engine import Engine
from tests.rewards.servers import listening
from tests.runs import outcome, short_run

TRIPLE = {"coarse": "outline three", "mid": "shape three", "fine": "stroke three"}


def prompts_file(folder: Path, *rows: dict[str, Any]) -> str:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def staged_file(folder: Path) -> str:
    return prompts_file(folder, {"prompt": "a handwritten three", **TRIPLE}, {"prompt": "a handwritten eight"})


def test_stages_are_columns_of_a_prompts_file(tmp_path: Path) -> None:
    first, second = load_prompts(staged_file(tmp_path))
    assert first == Prompt("a handwritten three", stages=("outline three", "shape three", "stroke three"))
    assert second.stages is None
    with pytest.raises(UserError, match="jsonl:1: mid is empty; allowed: coarse, mid and fine"):
        load_prompts(prompts_file(tmp_path, {"prompt": "a", "coarse": "b", "fine": "c"}))


def test_ranges_share_the_steps_out() -> None:
    dcot = DcotConfig(mid=2, fine=3)
    assert dcot.ranges(5) == {"coarse": (0, 1), "mid": (2, 2), "fine": (3, 4)}
    assert dcot.stage_of_step(5) == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("stage", "steps"), [("coarse", [0]), ("mid", [1, 2]), ("fine", [3])], ids=["coarse", "mid", "fine"]
)
def test_a_sub_chain_stays_in_its_stage(tmp_path: Path, stage: str, steps: list[int]) -> None:
    sub_chain = {"sub_chain": {"length": 1, "place": stage}}
    config = short_run(tmp_path, dcot={"mid": 1, "fine": 3}, estimator=sub_chain)
    drawn = {config.plan_shape.draw(0, update).sub_chains[0].start for update in range(40)}
    assert sorted(drawn) == steps  # of fine's two steps, the last is first order's


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"estimator": {"sub_chain": {"place": "mid"}}}, ["place is 'mid'", "no dcot", "dcot: {mid:"]),
        ({"dcot": {"mid": 3, "fine": 2}}, ["mid begins at step 3 and fine at 2", "0 < mid < fine < sampler.steps"]),
        ({"dcot": {"mid": 0, "fine": 2}}, ["dcot.mid", "found 0"]),
        ({"dcot": {"mid": 2, "fine": 5}}, ["dcot.fine begins at step 5", "5 steps", "raise sampler.steps"]),
        (
            {"dcot": {"mid": 3, "fine": 4}, "estimator": {"sub_chain": {"length": 2, "place": "mid"}}},
            ["does not fit in steps 3 to 3", "widen estimator.sub_chain.place"],
        ),
    ],
)
def test_ranges_that_do_not_work_are_refused(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        short_run(tmp_path, **changes)
    assert [word for word in words if word not in str(error.value)] == [], str(error.value)


def test_stages_that_nothing_heeds_are_refused_and_ranges_without_stages_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'a handwritten three' has texts.*set dcot"):
        Engine(short_run(tmp_path, prompts=staged_file(tmp_path)))
    with pytest.raises(UserError, match=r"no prompt has texts.*rlr-ray dcot expand"):
        Engine(short_run(tmp_path, dcot={"mid": 2, "fine": 3}))


def test_the_engine_conditions_each_step_on_its_stage_and_the_reward_on_the_prompt(tmp_path: Path) -> None:
    config = short_run(tmp_path, prompts=staged_file(tmp_path), dcot={"mid": 2, "fine": 3})
    engine = Engine(config)
    plain = Engine(short_run(tmp_path)).model
    chains = engine.chains([1, 2], engine.prompts)  # the reward refuses texts that name no digit
    assert chains.objective(torch.zeros(2, *engine.model.latent_shape)).shape == (2,)
    for k, stage in enumerate(("coarse", "coarse", "mid", "fine", "fine")):
        expected = plain(
            plain.initial_theta,
            chains.x_start,
            engine.model.schedule.timesteps[k],
            plain.encode([TRIPLE[stage], "a handwritten eight"]),
        )
        arguments = (chains.x_start, engine.model.schedule.timesteps[k], chains.conditioning)
        assert torch.equal(engine.model(engine.model.initial_theta, *arguments), expected)


def test_a_run_with_stages_and_a_sub_chain_in_one_of_them(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    config = short_run(
        tmp_path,
        prompts=staged_file(tmp_path),
        dcot={"mid": 1, "fine": 4},
        estimator={"sub_chain": {"place": "mid"}},
        train={"iterations": 2},
    )
    file.write_text(json.dumps(config.model_dump(mode="json")))
    assert main(["train", "--config", str(file)]) == 0
    found = outcome(config.folder)
    assert found["steps"] == 2 and "within steps 1-3" in found["plan"]
    assert found["reward_after"] != found["reward_before"]


def expanded(folder: Path, *words: str) -> list[dict[str, Any]]:
    source = prompts_file(folder, {"prompt": "a cat", "box": 3}, {"prompt": "own", **TRIPLE})
    out = folder / "out" / "triples.jsonl"
    assert main(["dcot", "expand", "--prompts", source, "--out", str(out), *words]) == 0
    assert [prompt.text for prompt in load_prompts(str(out))] == ["a cat", "own"]
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_the_template_needs_nothing_else(tmp_path: Path) -> None:
    cat, own = expanded(tmp_path)
    assert cat == {"prompt": "a cat", "box": 3} | {key: text.format(prompt="a cat") for key, text in TEMPLATE.items()}
    assert own == {"prompt": "own", **TRIPLE}  # as they were


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    cat, _ = expanded(tmp_path, "--template", "coarse=blurred {prompt} {x}", "fine={prompt}: hair")
    assert (cat["coarse"], cat["fine"]) == ("blurred a cat {x}", "a cat: hair")
    assert cat["mid"] == TEMPLATE["mid"].format(prompt="a cat")


@contextmanager
def server(*answers: Any) -> Iterator[tuple[str, list[tuple[Any, Any]]]]:
    """An OpenAI API that gives these answers, or functions of the prompt, in turn, the last one again.

    Yields its address, and what it was asked with whose key.
    """
    asked: list[tuple[Any, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = answers[min(len(asked), len(answers) - 1)]
            asked.append((body, self.headers["Authorization"]))
            answer = answer(body["messages"][-1]["content"]) if callable(answer) else answer
            said = answer if isinstance(answer, dict) else {"choices": [{"message": {"content": answer}}]}
            self.send_response(503 if answer is None else 200)
            content = answer if isinstance(answer, bytes) else json.dumps(said).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    with listening(Handler) as url:
        yield f"{url}/v1", asked


def test_a_language_model_is_asked_until_it_answers_with_a_triple(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret")
    answers = (None, "no JSON here", f"Sure:\n```json\n{json.dumps(TRIPLE)}\n```")  # None: overloaded
    with server(*answers) as (url, asked):
        cat, _ = expanded(tmp_path, "--endpoint", url, "--model", "some", "--api-key-env", "SOME_KEY")
    assert cat == {"prompt": "a cat", "box": 3, **TRIPLE}
    assert len(asked) == 3  # and never of the prompt that has its stages
    body, key = asked[-1]
    assert key == "Bearer secret" and body["model"] == "some" and body["messages"][-1]["content"] == "a cat"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("nothing", ["'nothing'", "a JSON object"]),
        (json.dumps(TRIPLE | {"mid": ""}), ["outline three", "'a cat'"]),
        ({"error": "no such model"}, ["no such model", "/chat/completions"]),
        (b"<html>", ["answered '<html>'", "/chat/completions"]),
    ],
)
def test_an_answer_that_is_no_triple_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], answer: Any, words: list[str]
) -> None:
    with server(answer) as (url, _):
        source = prompts_file(tmp_path, {"prompt": "a cat"})
        out = str(tmp_path / "out.jsonl")
        assert main(["dcot", "expand", "--prompts", source, "--out", out, "--endpoint", url, "--model", "some"]) == 2
    said = capsys.readouterr().err
    assert [word for word in words if word not in said] == [], said
    assert not Path(out).exists()


def test_what_was_answered_before_a_failure_is_kept_and_not_asked_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"cat {i}", "id": i} for i in range(6)]
    rows += [{"prompt": "cat 0", "id": 6}, {"prompt": "cat 0", "negative_prompt": "dog", "id": 7}]
    out = tmp_path / "out.jsonl"
    words = ["dcot", "expand", "--prompts", prompts_file(tmp_path, *rows), "--out", str(out), "--model", "some"]

    def answer(prompt: str) -> str:
        return "no" if prompt == "cat 3" and broken else json.dumps(TRIPLE | {"mid": f"shape {prompt}"})

    broken = True
    with server(answer) as (url, asked):
        assert main([*words, "--endpoint", url]) == 2
        said = capsys.readouterr()
        assert "3 of 8 prompts are in" in said.out and "for 'cat 3'" in said.err
        assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [0, 1, 2]
        kept = out.read_bytes()
        out.write_bytes(kept + b'{"prompt": "cat 3", "coa')  # killed amid a line
        broken = False
        asked.clear()
        assert main([*words, "--endpoint", url]) == 0
        assert "3 of 8 prompts kept" in capsys.readouterr().out
        expected = ["cat 0", "cat 0", "cat 3", "cat 4", "cat 5"]  # with another id, with a negative
        assert sorted(body["messages"][-1]["content"] for body, _ in asked) == expected
        assert out.read_bytes().startswith(kept)
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert found == [row | TRIPLE | {"mid": f"shape {row['prompt']}"} for row in rows]
        asked.clear()
        out.write_bytes(out.read_bytes()[:-1])  # as an editor may leave it
        one = prompts_file(tmp_path, rows[5])
        assert main([*words, "--endpoint", url, "--prompts", one]) == 0 and not asked
        assert "7 rows of other prompts stay" in capsys.readouterr().out
        assert [json.loads(line) for line in out.read_text().splitlines()] == found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "a cat"}\n', "'a cat' has no coarse, mid and fine"),
        (b'{"prompt": "a cat"}\nhalf a line of mine', "'a cat' has no coarse, mid and fine"),
        (b"all of mine", "its last line is no row"),
    ],
)
def test_a_file_of_anyone_elses_is_not_gone_on_with_and_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    assert main(["dcot", "expand", "--prompts", prompts_file(tmp_path, {"prompt": "a cat"}), "--out", str(out)]) == 2
    assert words in capsys.readouterr().err
    assert out.read_bytes() == content


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--out", "a.csv"], ".jsonl"),
        (["--model", "some"], "--endpoint URL"),
        (["--endpoint", "http://localhost:1/v1"], "--model"),
        (["--endpoint", "http://localhost:1/v1", "--model", "a", "--api-key-env", "NO_SUCH_KEY"], "NO_SUCH_KEY"),
        (["--template", "rough={prompt}"], "coarse, mid or fine"),
        (["--template", "coarse=a cat"], "{prompt}"),
    ],
)
def test_options_that_do_not_work_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    given = ["--prompts", prompts_file(tmp_path, {"prompt": "a cat"}), "--out", str(tmp_path / "out.jsonl"), *words]
    assert main(["dcot", "expand", *given]) == 2
    assert told in capsys.readouterr().err
