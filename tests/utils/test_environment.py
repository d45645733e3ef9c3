"""What a process sets for itself: once, at its start, and nothing by an import or a constructor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rlr_ray.cli import main
from rlr_ray.errors import UserError
from rlr_ray.train.engine import Engine
from rlr_ray.train.picture_engine import PictureEngine
from rlr_ray.utils.environment import _VARIABLES, prepare_process
from tests.runs import small_recipe, small_run


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    prepare_process(1)


def test_an_engine_refuses_other_threads_than_its_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"torch computes with 1 CPU threads here.*prepare_process\(3\)"):
        Engine(small_run(tmp_path, threads=3))
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("command", [["train"], ["plan"], ["lab"], ["dcot", "locate"], ["sample"]], ids=str)
def test_every_command_computes_with_its_recipes_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    seen: list[int] = []

    def note(engine: PictureEngine, *arguments: Any) -> None:
        seen.append(torch.get_num_threads())
        raise UserError("seen")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PictureEngine, "__init__", note)
    assert main([*command, "--config", str(small_recipe(tmp_path)), "--set", "threads=3"]) == 2
    assert seen == [3]


def test_imports_leave_the_environment_alone_and_take_what_they_need() -> None:
    """A node's report needs no plots, a driver on Ray no diffusers: 2.8 CPU seconds of imports, not 7.3."""
    code = (
        "import os, sys, rlr_ray.cluster.machine\n"
        "assert not {'matplotlib', 'plotly', 'diffusers'} & sys.modules.keys()\n"
        "import rlr_ray.cli.train, rlr_ray.cluster.launch, rlr_ray.utils.memory\n"
        "assert not {'diffusers', 'transformers', 'peft', 'torch._dynamo', 'torch.distributed.fsdp'} & {*sys.modules}\n"
        "from rlr_ray.utils.environment import _VARIABLES\n"
        "assert not os.environ.keys() & _VARIABLES.keys()"
    )
    bare = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=bare)
    assert done.returncode == 0, done.stderr
