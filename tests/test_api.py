"""The public API: its names exist, importing it costs nothing, and the example that shows it learns."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import rlr_ray
from rlr_ray.config.estimator import merge
from rlr_ray.config.recipe import parse_config
from rlr_ray.errors import UserError
from tests.runs import RECIPE, SMALL

EXAMPLE = Path(__file__).parent.parent / "examples" / "minimal.py"


def test_every_name_of_the_api_exists() -> None:
    assert all(callable(getattr(rlr_ray, name)) for name in rlr_ray.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Planes'; it has Chains, "):
        rlr_ray.Planes  # noqa: B018


def test_importing_it_imports_nothing_heavy_and_the_estimator_needs_torch_alone() -> None:
    code = """
import sys, rlr_ray
assert not {"torch", "diffusers", "transformers", "ray"} & set(sys.modules), "import rlr_ray"
for name in rlr_ray.__all__:
    if name not in ("load_config", "run"):
        getattr(rlr_ray, name)
assert not {"diffusers", "transformers", "ray", "pydantic"} & set(sys.modules), "the estimator's names"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_example_is_unbiased_and_its_reward_rises(capsys: pytest.CaptureFixture[str]) -> None:
    rewards, share, error = runpy.run_path(str(EXAMPLE))["main"](updates=20, batches=16)
    assert abs(share - 1) < 3.5 * error < 0.2
    assert rewards[-1] > rewards[0] + 1
    assert "update 20: reward" in capsys.readouterr().out


@pytest.mark.usefixtures("nothing_shown")
def test_a_recipe_runs_and_goes_on_from_python(tmp_path: Path) -> None:
    keys = merge(merge(RECIPE, SMALL), {"output_dir": str(tmp_path), "train": {"iterations": 1}})
    rows: list[dict[str, object]] = []
    assert rlr_ray.run(parse_config(keys), rows.append)["steps"] == 1 and len(rows) == 1
    with pytest.raises(UserError, match="already holds a run"):
        rlr_ray.run(parse_config(keys))
    longer = parse_config(merge(keys, {"train": {"iterations": 2}}))
    assert rlr_ray.run(longer, rows.append, resume=True)["steps"] == 2 and len(rows) == 2
