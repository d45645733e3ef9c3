"""Videos for VBench read back frame by frame, and its result files against averages computed by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import imageio.v3
import pytest
import torch

from rlr_ray.config.recipe import parse_config
from rlr_ray.errors import UserError
from rlr_ray.evaluation.vbench import VBenchVideos, read_results, vbench_table, weighted_average
from tests.runs import RECIPE

PROMPTS = ["a three moving left", 'a "four", moving: up?']


def videos_of(folder: Path, prompts: list[str] | str) -> VBenchVideos:
    return VBenchVideos(folder, parse_config(RECIPE | {"prompts": prompts}))


def test_videos_are_named_by_prompt_and_number_and_hold_the_frames(tmp_path: Path) -> None:
    keep = videos_of(tmp_path, PROMPTS)
    greys = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    videos = greys[..., None, None, None].expand(3, 4, 3, 24, 40)
    keep("base", range(1, 4), videos)
    folder = tmp_path / "base" / "videos"
    names = [f"{PROMPTS[1]}-0.mp4", f"{PROMPTS[0]}-1.mp4", f"{PROMPTS[1]}-1.mp4"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for name, grey in zip(names, greys, strict=True):
        frames = imageio.v3.imread(folder / name)
        assert frames.shape == (4, 24, 40, 3)
        assert frames.mean((1, 2, 3)) / 255 == pytest.approx(grey.tolist(), abs=0.02)  # it is compressed
    assert "base are in" in keep.next_step and "vbench evaluate" in keep.next_step
    videos_of(tmp_path, PROMPTS)  # the same again
    with pytest.raises(UserError, match=r"up\?-0\.mp4 is of another evaluation"):
        videos_of(tmp_path, PROMPTS[:1])


def test_prompts_that_are_no_file_names_and_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'a/b' cannot be such a name"):
        videos_of(tmp_path, ["a/b"])
    with pytest.raises(UserError, match="two have the text 'a three moving left'"):
        lines = [json.dumps({"prompt": PROMPTS[0], "hint": hint}) for hint in (1, 2)]
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
        videos_of(tmp_path, str(tmp_path / "prompts.jsonl"))
    with pytest.raises(UserError, match="draws pictures"):
        videos_of(tmp_path, PROMPTS)("base", range(2), torch.zeros(2, 3, 24, 40))


def test_the_average_counts_the_dynamic_degree_half() -> None:
    """(0.9 + 0.6 + 0.5 * 0.4) / 2.5 = 0.68."""
    assert weighted_average({"motion_smoothness": 0.9, "aesthetic_quality": 0.6, "dynamic_degree": 0.4}) == (
        pytest.approx(0.68)
    )


def write(folder: Path, name: str, results: object, when: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(results))
    os.utime(folder / name, (when, when))


def test_results_are_read_back(tmp_path: Path) -> None:
    """Several files of a model, the newer one's score where both have it, imaging quality also in percent."""
    details = [{"video_path": "videos/a three moving left-0.mp4", "video_results": True}]
    assert read_results(tmp_path, ["base", "run"]) == {}
    write(tmp_path / "base", "a_eval_results.json", {"dynamic_degree": [0.2, details]}, 2)
    write(tmp_path / "base", "b_eval_results.json", {"dynamic_degree": [0.9, []], "imaging_quality": [50.0, []]}, 1)
    write(tmp_path / "run" / "deep", "c_eval_results.json", {"dynamic_degree": 0.5, "imaging_quality": [0.8, []]}, 3)
    assert read_results(tmp_path, ["base", "run", "other"]) == {}  # whose videos are still to be drawn
    found = read_results(tmp_path, ["base", "run"])
    assert found == {
        "base": {"dynamic_degree": 0.2, "imaging_quality": 0.5},
        "run": {"dynamic_degree": 0.5, "imaging_quality": 0.8},
    }
    cells = [list(column.cells) for column in vbench_table(found).columns]
    # (0.5 * 20 + 50) / 1.5 = 40 and (0.5 * 50 + 80) / 1.5 = 70
    assert [row for row in zip(*cells, strict=True)][-1] == ("weighted average", "40.00", "70.00")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "base", "a_eval_results.json", [1, 2], 1)
    with pytest.raises(UserError, match=r"a_eval_results\.json is no result of VBench"):
        read_results(tmp_path, ["base"])
