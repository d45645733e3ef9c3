"""A user's own reward: called as it takes its arguments, believed as it answers, and shut in with all else it does."""

from __future__ import annotations

import copy
import logging
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlr_ray.config.recipe import checked, with_facts
from rlr_ray.config.rewards import JudgeConfig
from rlr_ray.errors import UserError
from rlr_ray.rewards import load_reward, score
from rlr_ray.utils.environment import own_module

CPU = torch.device("cpu")
IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
MEANS = IMAGES.mean((1, 2, 3))
PROMPTS, METADATA = ["a", "bb", "ccc"], [{"n": [number]} for number in range(3)]
LENGTHS = torch.tensor([1.0, 2.0, 3.0])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def scored(code: str, name: str = "f", **keys: Any) -> torch.Tensor:
    """The scores of a reward of these lines, as a file of its own."""
    file = Path(f"reward_{abs(hash(code))}.py")
    file.write_text(f"import os, random, sys, logging, numpy, torch\n{code}\n")
    reward = load_reward(f"{file}:{name}", keys.pop("options", {}), CPU, **keys)
    return score(reward, IMAGES, PROMPTS, METADATA, "mine")


# --- what it does stays in it


CHANGES = {
    "images": "images.zero_()",
    "prompts": "prompts.clear()",
    "a dictionary of metadata": "metadata[0]['new'] = 1",
    "a value in metadata": "metadata[0]['n'].append(1)",
    "the metadata": "metadata.pop()",
    "default type": "torch.set_default_dtype(torch.float64)",
    "default device": "torch.set_default_device('meta')",
    "gradients": "torch.set_grad_enabled(not torch.is_grad_enabled())",
    "torch's seed": "torch.manual_seed(7)",
    "numpy's seed": "numpy.random.seed(7)",
    "random's seed": "random.seed(7)",
    "random numbers": "random.random(), numpy.random.rand(), torch.rand(1)",
    "threads": "torch.set_num_threads(3)",
    "determinism": "torch.use_deterministic_algorithms(True, warn_only=True)",
    "anomaly mode": "torch.autograd.set_detect_anomaly(True)",
    "precision": "torch.set_float32_matmul_precision('medium')",
    "numpy's errors": "numpy.seterr(all='raise')",
    "the working folder": "os.chdir('/')",
    "logging": "logging.disable(logging.CRITICAL)",
}


def _state() -> list[Any]:
    return [
        *(
            IMAGES.clone(),
            copy.deepcopy(PROMPTS),
            copy.deepcopy(METADATA),
            torch.get_rng_state(),
            torch.is_grad_enabled(),
        ),
        *(torch.get_default_dtype(), torch.get_default_device(), torch.get_num_threads(), torch.is_anomaly_enabled()),
        *(torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.matmul.fp32_precision),
        *(random.getstate(), np.random.get_state()[1].tolist(), np.geterr(), os.getcwd(), logging.root.manager.disable),
    ]


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


@pytest.mark.parametrize("line", [pytest.param(line, id=name) for name, line in CHANGES.items()])
@pytest.mark.parametrize("where", ["module", "call", "error"])
def test_what_a_reward_sets_and_changes_stays_in_it(line: str, where: str) -> None:
    """In the module while it is imported, in a call, and in a call that then raises an error."""
    of_arguments = any(word in line for word in ("images", "prompts", "metadata"))
    before = _state()
    if where == "module" and not of_arguments:
        scored(f"{line}\ndef f(images): return [0, 0, 0]")
    elif where == "call":
        scored(f"def f(images, prompts, metadata):\n    {line}\n    return [0.0, 0.0, 0.0]")
    else:
        with pytest.raises(UserError, match="ZeroDivisionError"):
            scored(f"def f(images, prompts, metadata):\n    {line}\n    return 1 / 0")
    assert all(map(_same, before, _state()))


def test_what_it_sets_is_there_when_it_is_called_again() -> None:
    code = "torch.set_default_dtype(torch.float64)\ntorch.manual_seed(3)\ndef f(images): return torch.rand(3)"
    again = scored(code + "\n").double(), scored(code + "\n").double()
    generator = torch.Generator().manual_seed(3)
    expected = [torch.rand(3, generator=generator, dtype=torch.float64) for _ in range(2)]
    for found, value in zip(again, expected, strict=True):
        torch.testing.assert_close(found, value, rtol=0, atol=1e-7)


def test_gradients_pass_through_what_changes_its_images_in_place() -> None:
    Path("in_place.py").write_text("def f(images):\n    images.mul_(2)\n    return images.square().mean((1, 2, 3))\n")
    images = IMAGES.clone().requires_grad_()
    reward = load_reward("in_place:f", {}, CPU)
    (gradient,) = torch.autograd.grad(score(reward, images * 1, PROMPTS, METADATA, "mine").sum(), images)
    torch.testing.assert_close(gradient, 8 * IMAGES / 48)


# --- what it is called with


CALLS = {
    "one": ("def f(x): return x.mean((1, 2, 3))", MEANS),
    "two": ("def f(x, texts): return [len(text) for text in texts]", LENGTHS),
    "three": ("def f(x, texts, data): return [one['n'][0] + 1 for one in data]", LENGTHS),
    "two by other names": ("def f(images, metadata): return [one['n'][0] + 1 for one in metadata]", LENGTHS),
    "another order": ("def f(prompts, images): return [len(text) for text in prompts]", LENGTHS),
    "by keyword alone": ("def f(*, prompts, images): return [len(text) for text in prompts]", LENGTHS),
    "a default": ("def f(x, power=1): return x.mean((1, 2, 3)) ** power", MEANS),
    "none by default": ("def f(x, texts=None, data=None): return [len(text) for text in texts]", LENGTHS),
    "any number": ("def f(*all): return [len(text) for text in all[1]]", LENGTHS),
    "any keywords": ("def f(images, **more): return [len(text) for text in more['prompts']]", LENGTHS),
    "a method": ("class A:\n    def __call__(self, x): return x.mean((1, 2, 3))\nf = A()", MEANS),
    "a class": ("class f:\n    def __call__(self, x): return x.mean((1, 2, 3))", MEANS),
    "a module": ("class f(torch.nn.Module):\n    def forward(self, images): return images.mean((1, 2, 3))", MEANS),
}


@pytest.mark.parametrize(("code", "expected"), CALLS.values(), ids=CALLS)
def test_it_takes_what_it_names(code: str, expected: torch.Tensor) -> None:
    torch.testing.assert_close(scored(code), expected)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def f(): return 0", "takes no images"),
        ("def f(a, b, c, d): return 0", "must be called with a, b, c, d; allowed: images, prompts and metadata"),
        ("def f(text, images): return 0", "must be called with text, images; allowed"),
        ("def f(images, *, model): return 0", "must be called with images, model; allowed"),
    ],
)
def test_what_cannot_be_called_is_refused(code: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        scored(code)


def test_pictures_of_pil_and_options() -> None:
    code = "def f(seen, prompts, scale): return [scale * len(one.getcolors()) * (one.mode == 'RGB') for one in seen]"
    colors = [
        len(Image.fromarray((one * 255).round().byte().permute(1, 2, 0).numpy()).getcolors() or []) for one in IMAGES
    ]
    assert scored(code, options={"scale": 2}, shown="pil").tolist() == [2.0 * count for count in colors]
    known = with_facts(checked(JudgeConfig, {"name": "jpeg_compressibility", "input": "pil"}))
    assert not known.has_gradient and not checked(JudgeConfig, {"name": "a:b", "input": "pil"}).has_gradient
    with pytest.raises(UserError, match="input: pil; allowed: one of them"):
        checked(JudgeConfig, {"name": "a:b", "input": "pil", "differentiable": True})


# --- what it returns


RETURNS = {
    "scores, info": "x.mean((1, 2, 3)), {'n': 1}",
    "scores, None": "x.mean((1, 2, 3)), None",
    "a dictionary": "{'scores': x.mean((1, 2, 3)), 'other': 1}",
    "another key": "{'reward': x.mean((1, 2, 3))}",
    "an array": "x.mean((1, 2, 3)).numpy()",
    "an array's numbers": "list(x.mean((1, 2, 3)).numpy())",
    "floats": "x.mean((1, 2, 3)).tolist()",
    "tensors": "[one.mean() for one in x]",
    "tensors of one": "[one.mean()[None] for one in x]",
    "doubles": "x.double().mean((1, 2, 3))",
}


@pytest.mark.parametrize("returned", RETURNS.values(), ids=RETURNS)
def test_scores_of_every_common_kind_are_taken(returned: str) -> None:
    torch.testing.assert_close(scored(f"def f(x): return {returned}"), MEANS)


def test_tensors_in_a_list_keep_their_gradients() -> None:
    Path("listed.py").write_text("def f(x): return [one.mean() for one in x]")
    images = IMAGES.clone().requires_grad_()
    scores = score(load_reward("listed:f", {}, CPU), images, PROMPTS, METADATA, "mine")
    torch.testing.assert_close(torch.autograd.grad(scores.sum(), images)[0], torch.full_like(images, 1 / 48))


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("None", "returned NoneType"),
        ("'high'", "returned str"),
        ("['a', 'b', 'c']", "returned list .*str"),
        ("{'a': 1}", "returned a dictionary with the keys 'a'"),
        ("{'score': x, 'reward': x}", "returned a dictionary with the keys 'score', 'reward'"),
        ("(i for i in x)", "returned generator"),
        ("x.mean((1, 2, 3)) * 1j", "returned complex numbers"),
        ("numpy.array([None, 1, 2])", "returned ndarray"),
    ],
)
def test_what_holds_no_scores_is_refused_by_name(returned: str, words: str) -> None:
    with pytest.raises(UserError, match=f"reward 'mine' {words}") as error:
        scored(f"def f(x): return {returned}")
    assert "allowed: one number an image" in str(error.value) and "rlr_ray/" not in str(error.value)


# --- how it fails


@pytest.mark.parametrize(
    ("code", "words", "line"),
    [
        ("def f(x): return x.no_such_thing", "AttributeError", 2),
        ("def f(x): return torch.cat([x, x[:, :1]])", "RuntimeError", 2),
        ("def f(x):\n    return numpy.linalg.inv(numpy.zeros((2, 2)))", "LinAlgError", 3),
        ("def f(x): sys.exit('no weights')", "SystemExit: no weights", 2),
        ("def f(x): os._exit(3)", "SystemExit: 3", 2),
        ("sys.exit(4)\ndef f(x): return 0", "importing .* raised SystemExit: 4", 2),
        ("os._exit(4)\ndef f(x): return 0", "importing .* raised SystemExit: 4", 2),
        ("class f:\n    def __init__(self): sys.exit(5)", "could not be built with {}: SystemExit: 5", 3),
        ("import no_such_module_at_all", "no module 'no_such_module_at_all' was found", None),
    ],
)
def test_an_error_names_the_users_line(code: str, words: str, line: int | None) -> None:
    with pytest.raises(UserError, match=words) as error:
        scored(code)
    assert line is None or f".py, line {line}" in str(error.value)
    assert "rlr_ray/" not in str(error.value) and "site-packages" not in str(error.value)


def test_an_error_in_no_line_of_theirs_names_no_line_of_ours() -> None:
    with pytest.raises(UserError, match=r"raised ValueError: [^/]*$"):
        scored("from math import sqrt as f")


# --- where it lies


@pytest.mark.parametrize(
    "name", ["rew.py:f", "sub/rew:f", "sub/rew.py:f", "{}/sub/rew.py:f", "$HERE/sub/rew:f", "sub.rew:f"]
)
def test_a_file_is_named_as_people_name_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("sub").mkdir()
    for file in (Path("rew.py"), Path("sub/rew.py")):
        file.write_text("def f(x): return x.mean((1, 2, 3))")
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.delitem(sys.modules, "sub.rew", raising=False)
    monkeypatch.delitem(sys.modules, "sub", raising=False)
    torch.testing.assert_close(
        score(load_reward(name.format(tmp_path), {}, CPU), IMAGES, PROMPTS, METADATA, "m"), MEANS
    )


def test_a_file_that_is_not_there_is_refused_by_its_whole_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"there is no file {tmp_path}/sub/rew.py; write its path from {tmp_path}"):
        load_reward("sub/rew:f", {}, CPU)
    Path("beside.py").write_text("VALUE = 3")
    Path("user_of_beside.py").write_text("import beside\ndef f(x): return [beside.VALUE] * 3")
    assert own_module("user_of_beside.py").f([]) == [3, 3, 3]
